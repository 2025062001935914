"""``trivium demo``: the three steps on the story world, and what each step made of the same requests."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

from trivium.demo import world
from trivium.files import make_folder, write_json
from trivium.recipe_file import parse_recipe
from trivium.run import SUMMARY, run_recipe
from trivium.summary import table
from trivium.train.log import clock, say

REQUESTS = 30  # held-out requests that every model answers
MOST_TOKENS = 160


def run_demo(out: Path, seed: int) -> dict[str, Any]:
    """Write the world, carry out the recipe, answer held-out requests after each stage; returns the summary."""
    started = time.perf_counter()
    data = make_folder(out / "data")
    world.write(data, seed)
    text = resources.files("trivium.demo").joinpath("recipe.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, out / "recipe.yaml", [f"seed={seed}"])
    summary = run_recipe(recipe, out)
    requests = [json.loads(line) for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    say(f"each model answers {REQUESTS} held-out requests")
    answers = {s.name: _answers(out / s.name, requests[:REQUESTS]) for s in recipe.stages}
    met = {name: _met(requests, found) for name, found in answers.items()}
    summary["requests_met"] = met
    write_json(out / SUMMARY, summary)
    print(table(summary))
    for number in range(2):
        print(f"\nrequest: {requests[number]['messages'][-2]['content']}")
        for name, found in answers.items():
            print(f"  {name + ':':<9} {_shortened(found[number])}")
    print("\nheld-out requests met in all: " + ", ".join(f"{n} {share:.0%}" for n, share in met.items()))
    print(f"{clock(time.perf_counter() - started)} in all; {out / SUMMARY}\n\ntry next:")
    print(f"  trivium chat {out / 'aligned'}\n  trivium inspect {out / 'aligned'}")
    print("  trivium run recipes/smollm2.yaml    # the same two steps on a real model")
    return summary


def _answers(folder: Path, requests: list[dict[str, Any]]) -> list[str]:
    """Greedy answers to the last turn of each request."""
    from trivium.talk import Talker

    talker = Talker.open(str(folder), device="cpu")
    return ["".join(talker.stream(talker.prompt(r["messages"][:-1]), MOST_TOKENS)) for r in requests]


def _met(requests: list[dict[str, Any]], answers: list[str]) -> float:
    """Share of answers in which every attribute of the request is met, judged by program."""
    pairs = zip(requests, answers, strict=False)
    return sum(all(world.check(r["request"], a).values()) for r, a in pairs) / len(answers)


def _shortened(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."
