"""``trivium demo``: the three steps on the story world, SFT three ways, each model's answers judged by program."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.chain import run_recipe
from trivium.demo import world
from trivium.demo.checker import check
from trivium.demo.own_pairs import MOST_TOKENS, own_pairs
from trivium.files import make_folder, read_json, sha256_json, write_json, write_text
from trivium.recipe_file import parse_recipe
from trivium.report.write import REPORT
from trivium.summary import SUMMARY, aligned, table
from trivium.terminal import clock, say

if TYPE_CHECKING:
    from trivium.evaluate.judge import Judge, Verdict
    from trivium.talk import Talker

PARENT = "sft_lora"  # of the preference stage
MET = "requests met"
ATTRIBUTES = ("name", "place", "toy", "end", "answer", "begun", "spelled", "finished", "unrepeated")


def run_demo(out: Path, seed: int) -> dict[str, Any]:
    """Write the world, carry out the recipe, judge every model's answers by program; returns the summary."""
    started = time.perf_counter()
    data = make_folder(out / "data")
    world.write(data, seed, pairs=0)
    text = resources.files("trivium.demo").joinpath("recipe.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, out / "recipe.yaml", [f"seed={seed}"])
    rows = [json.loads(line) for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    judge = judge_of(rows)
    run_recipe(recipe, out, until=recipe.stages[-2].name, judge=judge)
    _sample_pairs(out, seed)
    summary = run_recipe(recipe, out, judge=judge)
    judged = {stage["name"]: stage["judged"] for stage in summary["stages"]}
    summary["requests_met"] = {name: found[MET]["share"] for name, found in judged.items()}
    write_json(out / SUMMARY, summary)
    print(table(summary))
    print(f"\n{len(rows)} held-out requests, answered by each model and judged by program:\n")
    print(met_table(judged))
    print(f"\n{clock(time.perf_counter() - started)} in all\nreport: {out / REPORT}\n\ntry next:")
    print(f"  trivium chat {out / 'preference'}    # e.g. Tell a story about Mia at the park with a happy end.")
    print("  trivium run recipes/tinystories.yaml    # the same on your own data: it says how")
    print("  trivium run recipes/smollm2.yaml        # the last two steps on a real model")
    return summary


def _sample_pairs(out: Path, seed: int) -> None:
    """``data/pairs.jsonl``, out of the parent's own answers; kept where this parent has been sampled before."""
    parent = read_json(out / PARENT / "trivium.json")["identity"]
    pairs, made = out / "data" / "pairs.jsonl", out / "data" / "pairs-made.json"
    if pairs.is_file() and made.is_file() and read_json(made) == {"parent": parent, "seed": seed}:
        return
    started = time.perf_counter()
    rows = own_pairs(out / PARENT, seed)
    write_text(pairs, "".join(json.dumps(row) + "\n" for row in rows))
    write_json(made, {"parent": parent, "seed": seed})
    spent = clock(time.perf_counter() - started)
    say(f"{len(rows)} preference pairs from {PARENT}'s own answers, judged by program, {spent}")


def judge_of(requests: list[dict[str, Any]]) -> Judge:
    """A judge that counts which requests, and which attributes of them, a model's likeliest answers keep."""

    def judge(talker: Talker, most: int | None) -> dict[str, Verdict]:
        rows = requests[:most]
        answers = talker.answers([row["messages"][:-1] for row in rows], MOST_TOKENS)
        verdicts = [check(row["request"], answer) for row, answer in zip(rows, answers, strict=True)]
        found: dict[str, Verdict] = {MET: (sum(all(v.values()) for v in verdicts), len(verdicts))}
        for name in ATTRIBUTES:
            asked = [v[name] for v in verdicts if name in v]
            found[name] = (sum(asked), len(asked))
        return found

    judge.key = sha256_json(requests)  # type: ignore[attr-defined]  # what was judged so before need not be again
    return judge


def met_table(judged: dict[str, dict[str, Any]]) -> str:
    """A row per model: the share met in all with its 95% interval, then attribute by attribute."""
    names = [name for name in ATTRIBUTES if any(name in found for found in judged.values())]
    rows = [["model", "met in all", "95%", *names]]
    for model, found in judged.items():
        met = found[MET]
        shares = [f"{found[name]['share']:.0%}" if name in found else "-" for name in names]
        rows.append([model, f"{met['share']:.1%}", f"{met['low']:.0%}–{met['high']:.0%}", *shares])
    return aligned(rows, left=1)
