"""Promise 8: a row that has lost all there is to learn is reported, and a data set of only such rows trains nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.crash.process import CELLS, DATA, Process

LIMIT = 48
LONG = "red " * 60
CUT: dict[str, dict[str, Any]] = {  # rows whose answer lies behind the limit
    "sft": {"prompt": LONG, "completion": "blue cat"},
    "preference": {"prompt": LONG, "chosen": "blue cat", "rejected": "old dog"},
    "reward": {"prompt": LONG, "chosen": "blue cat", "rejected": "old dog"},
    "kto": {"prompt": LONG, "completion": "blue cat", "label": True},
}
EMPTY: dict[str, dict[str, Any]] = {  # rows without an answer
    "sft": {"prompt": "red", "completion": "  "},
    "preference": {"prompt": "red", "chosen": "", "rejected": "old dog"},
    "reward": {"prompt": "red", "chosen": "", "rejected": "old dog"},
    "kto": {"prompt": "red", "completion": "", "label": False},
}
SAME: dict[str, dict[str, Any]] = {  # answers between which nothing is to be preferred, once they are cut
    "preference": {"prompt": "red", "chosen": LONG + "cat", "rejected": LONG + "dog"},
    "reward": {"prompt": "red", "chosen": LONG + "cat", "rejected": LONG + "dog"},
}
KINDS = {"cut": CUT, "empty": EMPTY, "same": SAME}
NAMES = ("sft-lora", "preference-full", "preference-kto", "reward-lora")
QUICK = ("sft-lora",)


def kind_of(name: str) -> str:
    return "kto" if name == "preference-kto" else str(CELLS[name]["stage"])


CASES = [(name, kind) for name in NAMES for kind in KINDS if kind_of(name) in KINDS[kind]]


def asked(name: str, cell: Any, bad: list[dict[str, Any]], every: int) -> tuple[Path, Path, list[int]]:
    """A recipe, its file in which a bad row stands before every so manieth good one, and the bad ones' lines.

    ``every`` 0: there are no good ones.
    """
    recipe = cell(name, max_length=LIMIT, on_overflow="truncate_right", bad_rows=1.0, max_steps=6, save_every=3)
    file = recipe.parent / DATA[CELLS[name]["stage"]]
    lines: list[str] = []
    places: list[int] = []
    for number, good in enumerate(file.read_text(encoding="utf-8").splitlines()):
        if not every or number % every == 0:
            lines.append(json.dumps(bad[number % len(bad)]))
            places.append(len(lines))
        if every:
            lines.append(good)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return recipe, file, places


@pytest.mark.promise(8)
@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*c, marks=[] if c[0] in QUICK else [pytest.mark.slow]) for c in CASES]
)
def test_only_such_rows_end_before_the_first_step(name, kind, cell, tried):
    recipe, file, places = asked(name, cell, [KINDS[kind][kind_of(name)]], 0)
    ended = Process(recipe).wait()
    assert ended.code == 2, ended.said
    assert f"error: {file}:1: " in ended.said
    assert f"({len(places)} of {len(places)} rows cannot be used)" in ended.said
    assert "Traceback" not in ended.said
    assert "step 1/" not in ended.said
    assert not list((recipe.parent / "out").iterdir())
    tried(runs=1, rows_with_nothing_to_learn=len(places))


@pytest.mark.promise(8)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES])
def test_among_good_ones_each_is_named_and_none_is_a_loss_of_0(name, cell, tried):
    bad = [rows[kind_of(name)] for rows in KINDS.values() if kind_of(name) in rows]
    recipe, file, places = asked(name, cell, bad, 4)
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    stage = recipe.parent / "out" / "x"
    rows = json.loads((stage / "trivium.json").read_text(encoding="utf-8"))["rows"]
    assert rows["set_aside"] == len(places)
    assert rows["read"] == rows["used"] + rows["held_out"] + rows["set_aside"]
    quarantine = (stage / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["origin"] for line in quarantine] == [f"{file}:{n}" for n in places]
    logged = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in logged if "loss" in row]
    assert len(steps) == 6
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["trained_tokens"] > 0 for row in steps)
    tried(runs=1, rows_with_nothing_to_learn=len(places))
