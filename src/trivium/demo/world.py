"""The demo's story world: short stories, requests for them and pairs of answers, all from a seed.

    stories     {"text"}                                             what a language model is pretrained on
    requests    {"messages", "request"}                              what it is taught to follow
    pairs       {"prompt", "chosen", "rejected", "fault", "request"} what it is taught to prefer

How answers are judged is in ``checker.py``. A story is about one name, at one place, with one toy, and ends happy or
sad. An eighth of all (name, place, end) is held out by hash: nothing that trains ever holds one of these, stories,
answers and rejected answers included.

Most stories that pretrain open with a title in the words of a request, every story begins by announcing what it is
about in the same words, and says each attribute twice: what a small model reads once, it learns or not by luck.

The same seed gives the same bytes on every version of Python: only ``Random.random()`` is drawn from, whose
sequence Python guarantees. Cost: about 30,000 stories a second.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trivium import files
from trivium.demo.checker import KINDS, QUESTIONS, Request, split_sentences
from trivium.demo.plots import ANNOUNCEMENTS, ENDINGS, OPENINGS, PLOTS
from trivium.demo.words import GIRLS, PLACES, PRONOUNS, SLOTS

WORDS = (40, 90)  # the fewest and the most words of a story, its title not counted
TITLED = 0.9  # of the stories that pretrain
WITH_TOY = 0.5  # of requests; titles always name the toy
SPARE = 0.1  # how often a story has a step that it could do without
HELD_OUT = 8  # one in so many (name, place, end) is held out

Row = dict[str, Any]
T = TypeVar("T")

WORDINGS = (
    "Tell a story about {who} {at} with a {end} end.",
    "Write a story about {who} {at}. It has a {end} end.",
    "Please tell me about {who} {at}. Make the end {end}.",
    "I want a story with a {end} end. It is about {who} {at}.",
    "Can you tell a story of {who} {at}? The end must be {end}.",
    "Give me a story that plays {at}. It is about {who}, and the end is {end}.",
    "Make up a story: {who} {at}, a {end} end.",
    "Story time! {who} {at}, and a {end} end, please.",
)
AGAIN = (
    "Now tell it with a {end} end.",
    "Tell another one, but make the end {end}.",
    "The same again, please, with a {end} end.",
)


def stories(n: int, seed: int, *, held_out: bool = False) -> Iterator[Row]:
    """``n`` rows ``{"text"}``; most open with a title line. ``held_out`` tells of what no training row tells of."""
    rng = _stream("stories", seed)
    for _ in range(n):
        told = _worded(_wish(rng, held_out), with_toy=True)
        text = _tell(told, rng)
        if rng.random() < TITLED:
            text = _fill("Title: {who} {at}, a {end} end\n", told) + text
        yield {"text": text}


def requests(n: int, seed: int, *, held_out: bool = False) -> Iterator[Row]:
    """``n`` rows ``{"messages", "request"}``, the last message an answer that keeps ``request``.

    Six in ten ask for a story; the others ask about a given story, about the story just told, or for another end.
    """
    rng = _stream("requests", seed)
    for _ in range(n):
        wish = _wish(rng, held_out)
        kind = rng.random()
        if kind < 0.6:
            messages, request = _ask_story(wish, rng)
        elif kind < 0.75:
            messages, request = _ask_about_a_story(wish, rng)
        else:
            first, _ = _ask_story(wish, rng)
            other = {**wish, "end": _other("end", wish["end"], rng)}
            if kind >= 0.9 and is_held_out(other) == held_out:
                messages, request = _ask_again(other, rng)
            else:
                messages, request = _ask_question(wish, rng)
            messages = first + messages
        yield {"messages": messages, "request": request}


def held_out_requests(n: int, seed: int) -> Iterator[Row]:
    """``n`` rows as ``requests`` gives them, of (name, place, end) that no training row has."""
    return requests(n, seed, held_out=True)


def pairs(n: int, seed: int) -> Iterator[Row]:
    """``n`` rows; ``check(request, rejected)[fault]`` is False, and ``chosen`` keeps everything.

    Half are answers to questions. A rejected answer is the chosen one but for its fault, so that this is what differs.
    """
    rng = _stream("pairs", seed)
    for _ in range(n):
        wish = _wish(rng, held_out=False)
        if rng.random() < 0.5:
            messages, request = _ask_about_a_story(wish, rng)
            chosen, fault = messages.pop()["content"], "answer"
            wrong = _other(request["ask"], request["answer"], rng)
            rejected = _answer(chosen, request["ask"], request["answer"], wrong)
        else:
            told = _draw(rng)
            messages, request = _ask_story(wish, rng, told)
            chosen = messages.pop()["content"]
            faults = ("finished", "unrepeated", *(k for k in KINDS if k in request))
            fault, rejected = _spoilt(wish, chosen, faults, "toy" in request, told, rng)
        yield {"prompt": messages, "chosen": chosen, "rejected": rejected, "fault": fault, "request": request}


TABLES: dict[str, Callable[[int, int], Iterator[Row]]] = {
    "stories": stories,
    "requests": requests,
    "pairs": pairs,
    "held_out": held_out_requests,
    "valid": partial(stories, held_out=True),
}


def write(
    folder: Path, seed: int, stories: int = 20_000, requests: int = 4_000, pairs: int = 3_000, held_out: int = 200
) -> None:
    """Write ``stories``, ``requests``, ``pairs`` and, as many as ``held_out``, ``held_out`` and ``valid`` (.jsonl).

    A table of no rows is not written.
    """
    sizes = {"stories": stories, "requests": requests, "pairs": pairs, "held_out": held_out, "valid": held_out}
    files.make_folder(folder)
    for name, rows in TABLES.items():
        if not sizes[name]:
            continue
        lines = (json.dumps(row) + "\n" for row in rows(sizes[name], seed))
        files.write_text(folder / f"{name}.jsonl", "".join(lines))


def is_held_out(request: Request) -> bool:
    """Whether this (name, place, end) is kept from everything that trains."""
    key = " ".join(request[k] for k in ("name", "place", "end"))
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0


def _tell(wish: Request, rng: random.Random) -> str:
    """A story of ``WORDS`` words that keeps the wish, which is `_worded`."""
    while True:
        plot = PLOTS[_pick(rng, tuple(PLOTS))]
        turn = plot.happy if wish["end"] == "happy" else plot.sad
        told = [step for n, step in enumerate(plot.steps) if n not in plot.spare or rng.random() < SPARE]
        opening = [OPENINGS] if rng.random() < SPARE else []
        steps = (ANNOUNCEMENTS, *opening, *told, *turn, *ENDINGS[wish["end"]])
        cast = {k: _pick(rng, SLOTS[k]) for k in ("color", "animal", "weather", "time", "family", "hidden", "food")}
        cast |= {**wish, **PRONOUNS[wish["name"] in GIRLS]}
        sentences = []
        for step in steps:
            loose = {k: _pick(rng, SLOTS[k]) for k in ("trait", "fruit", "friend")}
            sentences.append(_fill(_pick(rng, step), {**cast, **loose}))
        story = " ".join(sentences)
        if WORDS[0] <= len(story.split()) <= WORDS[1]:
            return story


def _ask_story(wish: Request, rng: random.Random, told: int | None = None) -> tuple[list[Row], Request]:
    """A request for the wish's story, which may name the toy, and its answer; ``told`` fixes how the story goes."""
    asked = _asked(wish, rng)
    request = _request("story", wish)
    if asked["who"] != wish["name"]:
        request["toy"] = wish["toy"]
    story = _tell(asked, rng if told is None else random.Random(told))
    return _turn(_fill(_pick(rng, WORDINGS), asked), story), request


def _ask_about_a_story(wish: Request, rng: random.Random) -> tuple[list[Row], Request]:
    """A story and a question about it in one message, and the answer."""
    return _ask_question(wish, rng, before=f"{_tell(_asked(wish, rng), rng)}\n\n")


def _ask_again(wish: Request, rng: random.Random) -> tuple[list[Row], Request]:
    """After a story: the same name and place with this wish's end."""
    story = _tell(_worded(wish, False), rng)
    return _turn(_fill(_pick(rng, AGAIN), wish), story), _request("story", wish)


def _ask_question(wish: Request, rng: random.Random, before: str = "") -> tuple[list[Row], Request]:
    """A question about a story of the wish, and its answer."""
    ask = _pick(rng, tuple(QUESTIONS))
    question, answer = (_fill(t, {**wish, "at": _at(wish)}) for t in _pick(rng, QUESTIONS[ask]))
    return _turn(before + question, answer), {**_request("question", wish), "ask": ask, "answer": wish[ask]}


def _answer(chosen: str, ask: str, right: str, wrong: str) -> str:
    """The same answer with another value; a place brings the word that stands before it."""
    if ask == "place":
        return chosen.replace(_at({"place": right}), _at({"place": wrong}))
    return re.sub(rf"\b{right}\b", wrong, chosen)


def _spoilt(
    wish: Request, chosen: str, faults: Sequence[str], with_toy: bool, told: int, rng: random.Random
) -> tuple[str, str]:
    """One of the faults, and the chosen answer with it; an attribute that is held out is passed over."""
    while True:
        fault = _pick(rng, faults)
        if fault == "finished":
            words = chosen.split()
            return fault, " ".join(words[: int(len(words) * (0.4 + 0.45 * rng.random()))]).rstrip('.,!?"')
        if fault == "unrepeated":
            sentences = split_sentences(chosen)
            start, length = 3 + int(rng.random() * 3), 1 + int(rng.random() * 2)
            return fault, " ".join(sentences[:start] + sentences[start - length : start] * (2 + int(rng.random() * 2)))
        other = {**wish, fault: _other(fault, wish[fault], rng)}
        if not is_held_out(other):
            return fault, _tell(_worded(other, with_toy), random.Random(told))


def _wish(rng: random.Random, held_out: bool) -> Request:
    while True:
        wish = {kind: _pick(rng, values) for kind, values in KINDS.items()}
        if is_held_out(wish) == held_out:
            return wish


def _request(task: str, wish: Request) -> Request:
    return {"task": task, **{k: wish[k] for k in ("name", "place", "end")}}


def _asked(wish: Request, rng: random.Random) -> Request:
    """The wish in the words of a request, which may name the toy."""
    return _worded(wish, rng.random() < WITH_TOY)


def _worded(wish: Request, with_toy: bool) -> Request:
    who = f"{wish['name']} and a {wish['toy']}" if with_toy else wish["name"]
    return {**wish, "who": who, "at": _at(wish)}


def _at(wish: Request) -> str:
    return f"{PLACES[wish['place']]} {wish['place']}"


def _other(kind: str, value: str, rng: random.Random) -> str:
    return _pick(rng, [v for v in KINDS[kind] if v != value])


def _turn(user: str, assistant: str) -> list[Row]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _fill(template: str, values: Request) -> str:
    return template.format_map(values)


def _draw(rng: random.Random) -> int:
    """A seed for a story of its own."""
    return int(rng.random() * 2**53)


def _pick(rng: random.Random, values: Sequence[T]) -> T:
    return values[int(rng.random() * len(values))]


def _stream(kind: str, seed: int) -> random.Random:
    """One stream of numbers per table, so that none depends on how much another was asked for."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{kind} {seed}".encode()).digest()[:8], "big"))
