"""The story world: everything it makes passes its own checker, and what is held out is nowhere else."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import pytest

from trivium.demo import world
from trivium.demo.checker import check, known_words, split_sentences
from trivium.demo.plots import ANNOUNCEMENTS, ENDINGS, OPENINGS, PLOTS
from trivium.demo.words import ENDS, HAPPY, NAMES, PLACES, SAD, SLOTS, TOYS

N = 3000


def combination(request: dict[str, str]) -> tuple[str, ...]:
    return tuple(request[k] for k in ("name", "place", "end"))


def told(story: str) -> dict[str, str]:
    """Read back from a story alone what it tells of."""
    words = re.findall(r"[A-Za-z']+", story)
    found = {
        kind: [v for v in values if v in words] for kind, values in (("name", NAMES), ("place", PLACES), ("toy", TOYS))
    }
    assert all(len(v) == 1 for v in found.values()), f"one of each kind: {found} in {story!r}"
    last = re.findall(r"[a-z]+", " ".join(split_sentences(story)[-2:]).lower())
    ends = [end for end, feelings in (("happy", HAPPY), ("sad", SAD)) if set(feelings) & set(last)]
    assert len(ends) == 1, f"one end: {ends} in {story!r}"
    return {"task": "story", "end": ends[0], **{kind: v[0] for kind, v in found.items()}}


def test_every_story_passes_its_own_checker() -> None:
    for row in world.stories(N, seed=1):
        story = row["text"].split("\n")[-1]
        request = told(story)
        assert all(check(request, story).values()), story
        assert not world.is_held_out(request)


def test_a_story_says_every_attribute_twice() -> None:
    for row in world.stories(N, seed=2):
        story = row["text"].split("\n")[-1]
        request = told(story)
        words = re.findall(r"[A-Za-z']+", story)
        assert all(words.count(request[kind]) >= 2 for kind in ("name", "place", "toy")), story
        feelings = HAPPY if request["end"] == "happy" else SAD
        for sentence in split_sentences(story)[-2:]:
            assert set(feelings) & set(re.findall(r"[a-z]+", sentence.lower())), story


def test_most_stories_have_a_title_that_tells_the_truth() -> None:
    titled = [row["text"].split("\n") for row in world.stories(N, seed=3) if "\n" in row["text"]]
    assert 0.95 < len(titled) / (world.TITLED * N) < 1.05
    for title, story in titled:
        request = told(story)
        assert re.fullmatch(
            rf"Title: {request['name']}( and a {request['toy']})? \w+ the {request['place']}, a {request['end']} end",
            title,
        )


def test_sizes() -> None:
    started = time.perf_counter()
    texts = [row["text"] for row in world.stories(20_000, seed=4)]
    assert time.perf_counter() - started < 10
    stories = [text.split("\n")[-1] for text in texts]
    assert len(set(stories)) > 0.95 * len(stories)
    lengths = [len(story.split()) for story in stories]
    assert min(lengths) >= world.WORDS[0]
    assert max(lengths) <= world.WORDS[1]
    assert 250 <= len({w for text in texts for w in re.findall(r"[a-z']+", text.lower())}) <= 700


def test_every_answer_keeps_its_request() -> None:
    tasks, turns = set(), set()
    for row in world.requests(N, seed=5):
        messages, request = row["messages"], row["request"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(check(request, messages[-1]["content"]).values()), row
        assert combination(request) == combination(told_of(row))
        tasks.add((request["task"], request.get("ask")))
        turns.add(len(messages))
    assert tasks == {("story", None), *(("question", ask) for ask in ("name", "place", "toy", "end"))}
    assert turns == {2, 4}


def told_of(row: dict) -> dict[str, str]:
    """What the last story in a conversation tells of."""
    long = [m["content"] for m in row["messages"] if len(m["content"].split()) >= world.WORDS[0]]
    return told(long[-1].split("\n\n")[0])


def test_chosen_keeps_everything_and_rejected_fails_where_its_fault_says() -> None:
    faults: dict[str, int] = {}
    for row in world.pairs(N, seed=6):
        request, fault = row["request"], row["fault"]
        assert row["prompt"][-1]["role"] == "user"
        assert all(check(request, row["chosen"]).values()), row
        verdict = check(request, row["rejected"])
        assert verdict[fault] is False, row
        if fault not in ("finished", "unrepeated"):
            assert [k for k, kept in verdict.items() if not kept] == [fault], "one fault, and no other"
        if fault in ("name", "place", "toy", "end"):
            assert not world.is_held_out(told(row["rejected"]))
            if fault != "end":  # the very same story, but for what is wrong with it
                swapped = re.sub(rf"\b{told(row['rejected'])[fault]}\b", request[fault], row["rejected"])
                alike = sum(a == b for a, b in zip(swapped.split(), row["chosen"].split(), strict=True))
                assert alike > 0.8 * len(row["chosen"].split())
        faults[fault] = faults.get(fault, 0) + 1
    assert set(faults) == {"name", "place", "toy", "end", "answer", "finished", "unrepeated"}
    assert min(faults.values()) > N / 30


def test_what_is_held_out_is_nowhere_else() -> None:
    held_out = {combination(row["request"]) for row in world.held_out_requests(N, seed=7)}
    valid = {combination(told(row["text"].split("\n")[-1])) for row in world.stories(N, seed=7, held_out=True)}
    everything = len(NAMES) * len(PLACES) * len(ENDS)
    assert held_out == valid
    assert everything / 16 < len(held_out) < everything / 5
    stories = [row["text"].split("\n")[-1] for row in world.stories(N, seed=7)]
    for row in [*world.requests(N, seed=7), *world.pairs(N, seed=7)]:
        assert combination(row["request"]) not in held_out
        stories += [
            m["content"].split("\n\n")[0]
            for m in row.get("messages", [])
            if len(m["content"].split()) >= world.WORDS[0]
        ]
    assert held_out.isdisjoint(combination(told(story)) for story in stories)
    for name in NAMES:
        assert sum(name in c for c in held_out) < len(PLACES), f"more than half of what {name} does is held out"
    for place in PLACES:
        assert sum(place in c for c in held_out) < len(NAMES), f"more than half of the {place} is held out"
    for row in world.held_out_requests(300, seed=8):
        assert all(check(row["request"], row["messages"][-1]["content"]).values())


def test_the_checker_says_no() -> None:
    request = {"task": "story", "name": "Mia", "place": "park", "end": "happy", "toy": "kite"}
    good = "Mia was at the park with a kite. Mia was glad. She smiled."
    assert all(check(request, good).values())
    bad = {
        "name": good + " Tom smiled.",
        "place": good.replace("park", "farm"),
        "toy": good.replace(" with a kite", ""),
        "end": good + " Then she cried.",
        "finished": good[:-1],
        "unrepeated": good + " She smiled.",
        "begun": "and " + good,
        "spelled": good.replace("glad", "glad and arated"),
    }
    for fault, answer in bad.items():
        assert [k for k, kept in check(request, answer).items() if not kept] == [fault]
    assert not any(check(request, "")[k] for k in ("name", "place", "toy", "end", "begun", "finished"))
    question = {"task": "question", "ask": "place", "answer": "park", "name": "Mia", "place": "park", "end": "sad"}
    assert check(question, "Mia was at the park.")["answer"]
    assert not check(question, "Mia was at the park or on the farm.")["answer"]


def test_no_sentence_uses_a_word_that_a_request_can_ask_for() -> None:
    steps = [
        ANNOUNCEMENTS,
        OPENINGS,
        *(s for e in ENDINGS.values() for s in e),
        *(s for p in PLOTS.values() for t in (p.steps, p.happy, p.sad) for s in t),
    ]
    words = {
        w for step in steps for sentence in step for w in re.findall(r"[A-Za-z']+", re.sub(r"{\w+}", "", sentence))
    }
    words |= {w for values in SLOTS.values() for value in values for w in value.split()}
    assert words.isdisjoint([*NAMES, *PLACES, *TOYS])
    assert len(PLOTS) >= 5
    assert {w.lower() for w in [*words, *NAMES, *PLACES, *TOYS]} <= known_words()
    assert all(len(step) >= 3 and len(set(step)) == len(step) for step in steps)


@pytest.mark.parametrize("table", list(world.TABLES))
def test_the_same_seed_gives_the_same_rows_and_a_shorter_table_is_a_beginning(table: str) -> None:
    rows = world.TABLES[table]
    assert list(rows(50, 9)) == list(rows(50, 9))
    assert list(rows(20, 9)) == list(rows(50, 9))[:20]
    assert list(rows(50, 9)) != list(rows(50, 10))


def test_write(tmp_path: Path) -> None:
    sizes = {"stories": 40, "requests": 30, "pairs": 20, "held_out": 10}
    for folder in ("a", "b"):
        world.write(tmp_path / folder / "data", seed=0, **sizes)
    written = {path.name: path.read_bytes() for path in sorted((tmp_path / "a" / "data").iterdir())}
    assert written == {path.name: path.read_bytes() for path in sorted((tmp_path / "b" / "data").iterdir())}
    assert {name: len(lines.splitlines()) for name, lines in written.items()} == {
        "held_out.jsonl": 10,
        "pairs.jsonl": 20,
        "requests.jsonl": 30,
        "stories.jsonl": 40,
        "valid.jsonl": 10,
    }
    assert set(json.loads(written["stories.jsonl"].splitlines()[0])) == {"text"}
    # the bytes themselves, so that another version of Python or a careless edit shows
    assert hashlib.sha256(b"".join(written.values())).hexdigest()[:16] == "e20d3029af60ba7e"
