"""Judges an answer by program: which attributes of a request it keeps, and whether it is whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from trivium.demo.plots import ANNOUNCEMENTS, ENDINGS, OPENINGS, PLOTS
from trivium.demo.words import ENDS, HAPPY, NAMES, PLACES, PRONOUNS, SAD, SLOTS, TOYS

Request = dict[str, str]

# what is asked -> the questions, each with its answer
QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "name": (
        ("Who is the story about?", "The story is about {name}."),
        ("What is the name of the child?", "The name of the child is {name}."),
    ),
    "place": (
        ("Where was {name}?", "{name} was {at}."),
        ("Where does the story play?", "The story plays {at}."),
    ),
    "toy": (
        ("Which toy is in the story?", "The toy is a {toy}."),
        ("What did {name} have or want?", "It was a {toy}."),
    ),
    "end": (
        ("Is the end happy or sad?", "The end is {end}."),
        ("How does the story end?", "It has a {end} end."),
    ),
}
KINDS = {"name": NAMES, "place": tuple(PLACES), "toy": TOYS, "end": ENDS}


def check(request: Request, answer: str) -> dict[str, bool]:
    """What of a request an answer keeps: each attribute asked for, and that it is whole.

    Whole: it begins as a sentence does, every word is a word, it is finished and does not repeat a sentence.
    A name, place or toy is kept when it is said and no other of its kind is; an end, when one of the last two
    sentences has a word of that feeling and neither has one of the other.
    """
    sentences = split_sentences(answer)
    seen = [s.lower() for s in sentences]
    kept = {
        "begun": bool(re.match(r"\"?[A-Z]", answer)),
        "spelled": {w.lower() for w in words_of(answer)} <= known_words(),
        "finished": bool(re.search(r"[.!?]\"?\s*$", answer)),
        "unrepeated": len(set(seen)) == len(seen),
    }
    words = words_of(answer)
    if request["task"] == "question":
        return {"answer": _said(request["answer"], KINDS[request["ask"]], words), **kept}
    for kind in ("name", "place", "toy"):
        if kind in request:
            kept[kind] = _said(request[kind], KINDS[kind], words)
    feelings = {w.lower() for s in sentences[-2:] for w in words_of(s)}
    wanted, unwanted = (HAPPY, SAD) if request["end"] == "happy" else (SAD, HAPPY)
    kept["end"] = not feelings.isdisjoint(wanted) and feelings.isdisjoint(unwanted)
    return kept


def split_sentences(text: str) -> list[str]:
    """Cut after ``.``, ``!`` or ``?`` (and a closing quote), where a capital or a quote follows."""
    return [s for s in re.split(r"(?:(?<=[.!?])|(?<=[.!?]\"))\s+(?=[A-Z\"])", text.strip()) if s]


def _said(value: str, values: Sequence[str], words: set[str]) -> bool:
    return value in words and words.isdisjoint(v for v in values if v != value)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z']+", text))


@cache
def known_words() -> frozenset[str]:
    """Every word of the world, in lower case."""
    plots = [steps for plot in PLOTS.values() for steps in (*plot.steps, *plot.happy, *plot.sad)]
    ends = [step for steps in ENDINGS.values() for step in steps]
    answers = [answer for pairs in QUESTIONS.values() for _, answer in pairs]
    texts = [sentence for step in (ANNOUNCEMENTS, OPENINGS, *plots, *ends, answers) for sentence in step]
    texts += [*NAMES, *PLACES, *PLACES.values(), *TOYS, *ENDS, *(v for values in SLOTS.values() for v in values)]
    texts += [v for pronouns in PRONOUNS.values() for v in pronouns.values()]
    return frozenset(w.lower() for text in texts for w in words_of(re.sub(r"{\w+}", " ", text)))
