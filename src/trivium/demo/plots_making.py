"""Plots of the demo's story world, second half: baking, a broken toy, a treasure hunt, a rescue. See ``plots.py``."""

from __future__ import annotations

from trivium.demo.words import Plot

BAKE = Plot(
    spare=(2,),
    steps=(
        (
            "Everyone in town was there to bake, and the best cook would get a {color} {toy}.",
            'A man with a tall hat said, "Who bakes best will win this {color} {toy}!"',
            "On a table stood a {color} {toy}. It was the prize for the best {food}.",
        ),
        (
            "{name} wished for the {toy} and wanted to make a {food} with {fruit}.",
            '"I will make a {food} with {fruit} and win the {toy}," said {name}.',
            "{name} looked at the {toy} and took out {fruit}, milk and flour for {his} {food}.",
        ),
        (
            "{He} mixed it all in a big bowl, and {family} made the fire.",
            "{He} put in some sugar, and then a little more.",
            "There was flour on {his} nose, but {he} did not mind.",
        ),
        (
            "Soon a sweet smell went over the whole {place}.",
            "All the people around the {place} stopped to smell the {food}.",
            "A hungry {animal} came across the {place} to have a look.",
        ),
    ),
    happy=(
        (
            "Everybody took a bite and asked for more.",
            "The {food} came out of the oven warm and golden.",
            '"This is the best {food} of all!" said the man with the hat.',
        ),
        (
            "{name} won the {toy} and shared the {food} with everyone.",
            "The {color} {toy} was for {name}, and a {animal} got the last bite.",
            "{family} clapped as {name} was given the {toy}.",
        ),
    ),
    sad=(
        (
            "But {he} forgot the time, and the {food} was burned and black.",
            "But {he} had used salt and no sugar, and nobody could eat it.",
            "Then a {animal} jumped on the table, and the {food} fell to the ground.",
        ),
        (
            "A {friend} with a better dish won the {toy}.",
            "The {toy} was given to a {friend}, and {name} got nothing.",
            "There was no prize for {him}, and the {toy} was gone.",
        ),
    ),
)

BROKEN = Plot(
    spare=(3,),
    steps=(
        (
            "{His} best toy was a {color} {toy} that {family} had made.",
            "{He} had just been given a {color} {toy} for {his} birthday.",
            "{He} carried a {color} {toy} under {his} arm and would not let go of it.",
        ),
        (
            "{He} ran too fast across the {place} and fell over a {hidden}.",
            "A {animal} ran across the {place} and bumped into {him}.",
            "{He} wanted to show a trick to a {friend} from the {place}.",
        ),
        (
            "Crack! The {toy} broke into two pieces.",
            "The {toy} hit the ground hard, and a part came off.",
            "There was a bad sound, and the {toy} was broken.",
        ),
        (
            '"Oh no!" said {name}. "Can we fix it?"',
            "{name} picked up the pieces one by one.",
            '"Let me see," said {family} and looked at it from all sides.',
        ),
    ),
    happy=(
        (
            "They found glue, string and a small nail, and they began to work.",
            "{family} knew what to do and took out a box of tools.",
            "A {animal} brought a piece of wood that was just right.",
        ),
        (
            "An hour later, the {toy} was as good as new.",
            "Soon the {toy} was whole again and even better than before.",
            "When they were done, nobody could see that the {toy} had been broken.",
        ),
    ),
    sad=(
        (
            "They tried glue and string, but it did not hold.",
            "They worked until night, but one piece was missing.",
            "They tried again and again, but nothing helped.",
        ),
        (
            "The {toy} could not be fixed.",
            "{name} had to put the {toy} away for good.",
            "It was the end of the {color} {toy}.",
        ),
    ),
)

HUNT = Plot(
    spare=(1, 3),
    steps=(
        (
            "In an old book {he} found a map. It showed a {color} {toy} with a star on it.",
            '{family} gave {him} a map and said, "Follow it, and you will find a {color} {toy}."',
            "A {trait} {animal} told {him} that a {color} {toy} was hidden under the ground.",
        ),
        (
            '"A treasure! I must find that {toy}," said {name}.',
            "{name} took a lamp and a rope and began to look for the {toy}.",
            "{He} could think of nothing but the {toy}.",
        ),
        (
            "First {he} took ten steps to the left, and then {he} went around the {place}.",
            "The way led over the whole {place} and across a small bridge.",
            "{He} crossed the {place} and counted every tree.",
        ),
        (
            "Next to a {hidden}, {he} began to dig.",
            "There was a dark hole behind a {hidden}, and {he} went in.",
            "A {animal} helped {him} to dig next to a {hidden}.",
        ),
    ),
    happy=(
        (
            "Soon {he} hit something hard. It was a chest!",
            "Deep in the ground there was a chest with a gold lock.",
            "{He} saw a light, and there stood a chest.",
        ),
        (
            "Inside lay the {color} {toy}, and {he} could keep it.",
            "{He} opened it and took out the {toy}.",
            "It was full of coins, and on top lay the {toy}.",
        ),
    ),
    sad=(
        (
            "{He} dug until {his} hands hurt, but there was only sand.",
            "There was a chest, but it was empty.",
            "All {he} found was an old spoon.",
        ),
        (
            "Someone else had taken the {toy} long ago.",
            "It had all been a trick, and there was no {toy}.",
            "Night came, and {he} had to give up the {toy}.",
        ),
    ),
)

RESCUE = Plot(
    spare=(1, 3),
    steps=(
        (
            "{He} was on the way with a {color} {toy} in {his} arms.",
            "{He} was playing with a {color} {toy} and sang a song.",
            "{family} had given {him} a {color} {toy} to play with.",
        ),
        (
            'Then {he} heard a small voice. "Help! Please help me!"',
            "Suddenly somebody called for help.",
            "All at once there was a cry from above.",
        ),
        (
            "A {animal} was stuck high up in the tallest tree of the {place}.",
            "A {trait} {animal} had fallen into a deep hole in the middle of the {place}.",
            "At the end of the {place}, a {animal} was caught in a net.",
        ),
        (
            "{name} put the {toy} down and ran to help.",
            '"I am coming!" said {name} and dropped the {toy}.',
            "{name} threw the {toy} aside and looked for a rope.",
        ),
    ),
    happy=(
        (
            "{He} pulled with all {his} might until the {animal} was free.",
            "With the help of {family}, {he} got the {animal} out.",
            "It took a long time, but then the {animal} was safe in {his} arms.",
        ),
        (
            '"Thank you!" said the {animal} and gave {him} back the {toy}.',
            "The {animal} was not hurt, and they played with the {toy}.",
            "Then they sat down with the {toy} and had some {fruit}.",
        ),
    ),
    sad=(
        (
            "{He} pulled and pulled, but {he} was not strong enough.",
            "But the rope was too short, and {he} had to go for help.",
            "{He} tried to climb up, but {he} fell and hurt {his} leg.",
        ),
        (
            "When {he} came back, the {animal} and the {toy} were gone.",
            "The {animal} was hurt badly, and somebody had stepped on the {toy}.",
            "In the dark {he} lost the {toy} as well.",
        ),
    ),
)
