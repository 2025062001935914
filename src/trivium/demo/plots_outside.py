"""Plots of the demo's story world, first half: lost and found, a race, a storm, a new friend. See ``plots.py``."""

from __future__ import annotations

from trivium.demo.words import Plot

LOST = Plot(
    spare=(2,),
    steps=(
        (
            "{He} had a {color} {toy} and took it along wherever {he} went.",
            "In {his} bag there was a {color} {toy}, a gift from {family}.",
            "{He} played with {his} {color} {toy} for a long time.",
        ),
        (
            "Then {he} looked down, and the {toy} was gone!",
            "After a short nap, {he} could not find the {toy} any more.",
            "But when {he} came back from lunch, the {toy} was not there.",
        ),
        (
            "{name} looked all over the {place}, under every leaf and stone.",
            "{He} walked up and down the whole {place} and called for help.",
            "{He} asked everyone in sight if they had seen it.",
        ),
        (
            "A {animal} came by and wanted to help. They searched the {place} side by side.",
            'A {trait} {animal} heard {him}. "I will help you look around the {place}," it said.',
            "{family} came too, and together they looked at each corner of the {place}.",
        ),
    ),
    happy=(
        (
            "At last they saw something {color} behind a {hidden}. It was the {toy}!",
            'Then a voice called, "Here it is!" The {toy} was under a {hidden}.',
            "Near a {hidden}, {he} saw a bit of {color}. The {toy} was safe.",
        ),
    ),
    sad=(
        (
            "They looked until dark, but the {toy} was lost for good.",
            "Behind a {hidden} there was only an old shoe. The {toy} was never found.",
            "The river had taken the {toy} away, and nobody could bring it back.",
        ),
    ),
)

RACE = Plot(
    spare=(1, 3),
    steps=(
        (
            "That day there was a big race, and the prize was a {color} {toy}.",
            'A sign said, "Big race today! Win a {color} {toy}!"',
            "Everyone came to run a race for a {color} {toy}.",
        ),
        (
            "{name} wanted the {toy} more than anything.",
            '{He} looked at the {toy} and thought, "I will run as fast as the wind."',
            "{He} had trained every day for a week to win such a {toy}.",
        ),
        (
            "The runners had to go around the {place} three times.",
            "The way led once around the whole {place} and back again.",
            "They all stood in a line at the end of the {place}. One, two, three, go!",
        ),
        (
            "A {animal} was fast and ran in front of {him}.",
            "At first a {trait} {friend} was ahead, and {name} was second.",
            "{His} legs hurt, but {he} did not stop.",
        ),
    ),
    happy=(
        (
            "Near the line {he} ran faster and faster, and {he} was the first one there!",
            "With one last jump {he} came in first, and everyone clapped.",
            "The others got tired, but {name} did not. {He} won the race!",
        ),
        (
            "{family} put the {toy} into {his} hands.",
            "The {color} {toy} belonged to {him} now.",
            "{He} held the {toy} up high.",
        ),
    ),
    sad=(
        (
            "Then {he} fell over a stone, and all the others ran past.",
            "But {his} shoe came off, and {he} was the last one to come in.",
            "{He} ran the wrong way and had to stop.",
        ),
        ("A {friend} took the {toy} home.", "The {toy} went to another child.", "There was no {toy} for {him}."),
    ),
)

STORM = Plot(
    spare=(1, 3),
    steps=(
        (
            "{He} sat on the ground with a {color} {toy}.",
            "{He} had brought a {color} {toy} to show to {family}.",
            "{He} was busy with {his} new {color} {toy}.",
        ),
        (
            "Soon the sky turned dark, and a strong wind began to blow.",
            "All at once there was a loud boom. A storm was near!",
            "Big drops of rain fell, and the clouds were as black as night.",
        ),
        (
            "The wind blew over the {place} and took the {toy} up into the air.",
            "Rain came down on the whole {place}, and the wind pulled at the {toy}.",
            "The trees around the {place} shook, and the {toy} flew out of {his} hands.",
        ),
        (
            "A {animal} was afraid too and hid behind a {hidden}.",
            '"Come inside!" called {family}. "It is not safe out there."',
            "{name} held on to a {hidden} and closed {his} eyes.",
        ),
    ),
    happy=(
        (
            "Then the rain stopped, and the sun came out again.",
            "After a while the storm was over, and the air was still.",
            "Soon a rainbow stood above them, and it was warm again.",
        ),
        (
            "The {toy} lay in the grass and was not even wet.",
            "A {animal} brought the {toy} back without a scratch.",
            "The {toy} hung in a tree, and {family} got it down.",
        ),
    ),
    sad=(
        (
            "When the storm was over, there was mud all around.",
            "It rained until night, and the water did not stop.",
            "At last the wind was still, but it was too late.",
        ),
        (
            "The {toy} was gone, and nobody ever saw it again.",
            "The {toy} lay in the mud, broken into many pieces.",
            "The storm had taken the {toy} far away.",
        ),
    ),
)

FRIEND = Plot(
    spare=(3,),
    steps=(
        (
            "{He} had no one to play with, only a {color} {toy}.",
            "{He} sat alone and looked at {his} {color} {toy}.",
            "{He} had a {color} {toy}, but it is more fun to play with a friend.",
        ),
        (
            "Then {he} saw a {trait} {animal} that was alone as well.",
            "A {animal} came out from behind a {hidden} and looked at {him}.",
            "On the other side of the {place}, a {trait} {animal} stood and watched.",
        ),
        (
            '"Hello!" said {name}. "Do you want to play with my {toy}?"',
            '{name} held out the {toy} and said, "We can share it."',
            '{He} put the {toy} down and took one step back. "You can try it," {he} said.',
        ),
        (
            "The {animal} was afraid at first and did not say a word.",
            "The {animal} had just come to the {place} and did not know anyone.",
            "The {animal} looked at the {toy} and then at {name}.",
        ),
    ),
    happy=(
        (
            "Then it came near, and they played all over the {place}.",
            '"Yes, please!" it said, and they ran through the {place} side by side.',
            "Soon they took turns, and the {place} was full of their games.",
        ),
        (
            "From that day on, they were best friends.",
            "Now {name} had a friend and was never alone.",
            'They shared some {fruit} and said, "See you soon!"',
        ),
    ),
    sad=(
        (
            "But the {animal} turned around and ran out of the {place}.",
            '"No," it said. "I have to leave the {place} today."',
            "But it took the {toy} and left the {place} without a word.",
        ),
        (
            "{name} waited for a long time, but it never came back.",
            "{He} called and called, but there was no answer.",
            "Once more {he} had nobody to play with.",
        ),
    ),
)
