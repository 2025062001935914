"""How the demo's stories begin and end, and the table of the plots in between.

``{name}``, ``{at}`` ("at the park"), ``{place}`` ("park") and ``{toy}`` are what a request can ask for; the other
slots are in ``words.py``. A small model learns what a story says twice and learns by luck what it says once, so
every plot names the place and the toy again after the opening, and an end is shown by two sentences.
"""

from __future__ import annotations

from trivium.demo.plots_making import BAKE, BROKEN, HUNT, RESCUE
from trivium.demo.plots_outside import FRIEND, LOST, RACE, STORM
from trivium.demo.words import Plot, Step

PLOTS: dict[str, Plot] = {
    "lost": LOST,
    "race": RACE,
    "storm": STORM,
    "friend": FRIEND,
    "bake": BAKE,
    "broken": BROKEN,
    "hunt": HUNT,
    "rescue": RESCUE,
}

# What a story is about, in the order of a request: small models learn to follow a request by finding these words in it.
ANNOUNCEMENTS: Step = (
    "This is the story of {who} {at}, with a {end} end.",
    "Here is a story about {who} {at}. It has a {end} end.",
    "Let me tell you about {who} {at}. The end is {end}.",
    "Listen! {who} {at}, and a {end} end.",
    "This is a {end} story about {who} {at}.",
    "I know a story about {who} {at}, with a {end} end.",
)

OPENINGS: Step = (
    "Once upon a time, there was a {trait} {child} named {name}. One {weather} {time}, {name} was {at}.",
    "One {weather} {time}, a {trait} {child} named {name} went to play {at}.",
    "{name} was a {trait} {child} who loved to play {at}.",
    "There was once a {trait} {child} named {name}. {He} liked to be {at} more than anywhere else.",
    "It was a {weather} {time} {at}, and {name} wanted to have fun.",
    "Early one {weather} {time}, {name} came with {family} to play {at}.",
    "{name} woke up early. It was a {weather} day, and {he} ran out to play {at}.",
    "{family} took {name} out for the day. They stayed {at}, where it was {weather} and quiet.",
)

ENDINGS: dict[str, tuple[Step, Step]] = {
    "happy": (
        (
            "In the end, {name} was very happy.",
            "So {name} was happy at last.",
            "{name} felt happy and proud.",
            "Now {name} was full of joy.",
            "{name} was so glad that {he} jumped up and down.",
            "That made {name} very happy.",
            "{name} cheered and gave {family} a big hug.",
        ),
        (
            "{He} smiled all the way home.",
            "{He} laughed and danced in the sun.",
            "{He} went to bed with a smile.",
            "Everyone laughed and it was a happy end.",
            "They all laughed together until the sun went down.",
            "{He} told {family} about it with a big smile.",
            "It was a happy day that {he} never forgot.",
        ),
    ),
    "sad": (
        (
            "In the end, {name} was very sad.",
            "So {name} was sad and said nothing.",
            "{name} felt sad and lonely.",
            "{name} sat down and cried.",
            "Now there were tears on the face of {name}.",
            "That made {name} very sad.",
            "{name} wept and did not want to talk.",
        ),
        (
            "{He} cried all the way home.",
            "{He} went to bed with tears in {his} eyes.",
            "{He} walked home alone and was unhappy for a long time.",
            "Even {family} was sorry, and it was a sad end.",
            "{He} sighed and looked at the floor until night came.",
            "{He} told {family} about it and wept.",
            "It was a sad day that {he} never forgot.",
        ),
    ),
}
