"""The words of the demo's story world, and the slots that its sentences are filled with.

Names, places and toys are what a request can ask for, so a story holds exactly one of each and no sentence of
``plots.py`` uses one of these words by itself. The feelings decide by program how a story ends.
"""

from __future__ import annotations

from typing import NamedTuple

Step = tuple[str, ...]  # the sentences that one step of a story chooses from


class Plot(NamedTuple):
    """The steps of a story up to its turn, and the turn to either end. ``spare``: steps that a story may leave out."""

    steps: tuple[Step, ...]
    happy: tuple[Step, ...]
    sad: tuple[Step, ...]
    spare: tuple[int, ...]


GIRLS = ("Mia", "Anna", "Lily", "Rosa", "Nora", "Emma", "Zoe", "Ella")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Otto", "Paul")
NAMES = GIRLS + BOYS

# place -> the words in front of it
PLACES = {
    "park": "at the",
    "beach": "at the",
    "forest": "in the",
    "farm": "on the",
    "garden": "in the",
    "harbor": "by the",
    "market": "at the",
    "meadow": "in the",
    "village": "in the",
    "hill": "on the",
    "castle": "at the",
    "school": "at the",
}

TOYS = ("kite", "ball", "drum", "boat", "doll", "truck", "train", "robot", "puppet", "wagon", "plane", "whistle")
ENDS = ("happy", "sad")

HAPPY = ("happy", "glad", "joy", "smile", "smiled", "laughed", "cheered", "proud")
SAD = ("sad", "cried", "tears", "lonely", "wept", "sorry", "unhappy", "sighed")

SLOTS: dict[str, tuple[str, ...]] = {
    "color": ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "silver"),
    "animal": ("dog", "cat", "rabbit", "duck", "bird", "frog", "squirrel", "pony", "goat", "mouse", "turtle", "fox"),
    "trait": ("little", "brave", "kind", "funny", "quiet", "clever", "shy", "gentle", "young", "friendly"),
    "weather": ("sunny", "warm", "bright", "cool", "fresh", "cloudy", "clear"),
    "family": ("Mom", "Dad", "Grandma", "Grandpa"),
    "time": ("morning", "afternoon", "day"),
    "hidden": ("bush", "box", "bench", "log", "basket", "rock"),
    "food": ("cake", "pie", "tart", "pudding"),
    "fruit": ("apples", "berries", "cherries", "plums", "nuts", "honey"),
    "friend": ("boy", "girl"),
}

PRONOUNS = {
    True: {"child": "girl", "he": "she", "He": "She", "him": "her", "his": "her", "His": "Her"},
    False: {"child": "boy", "he": "he", "He": "He", "him": "him", "his": "his", "His": "His"},
}
