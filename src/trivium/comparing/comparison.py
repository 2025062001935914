"""Carries a comparison out: the stages before once, then every way with every seed, each run in its own process.

    DIR/parent/            the stages before, an ordinary run
    DIR/lora/seed0.yaml    a recipe of one stage, to be run alone:  trivium run DIR/lora/seed0.yaml --out DIR/lora/seed0
    DIR/lora/seed0/        its run
    DIR/compare.json       all numbers; compare.html shows them

What is finished is not run again and what was interrupted goes on, as in every run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from trivium.checks import check_data, check_texts
from trivium.comparing import process
from trivium.comparing.collect import collected, run_numbers
from trivium.comparing.page import PAGE, write_page
from trivium.comparing.plan import GENERAL, PARENT, Plan, Way, general_texts, make_plan
from trivium.comparing.show import plan_lines
from trivium.errors import Interrupted, ModelError, UserError
from trivium.files import make_folder, read_json, write_json, write_text
from trivium.lock import only_run
from trivium.measures import MEASURES, START
from trivium.recipe import Recipe
from trivium.terminal import say, shown

NUMBERS = "compare.json"

Json = dict[str, Any]


def compare(
    recipe: Recipe, out: Path, methods: Sequence[str] | None = None, seeds: int = 1, stage: str | None = None,
    requests: Path | None = None,
) -> Json:  # fmt: skip
    """Train a stage of the recipe each way; returns what ``compare.json`` holds.

    A way that fails is told with its reason, and the others go on; where all fail, raises the first one's error.
    ``requests`` are what the demo's judge asks.
    """
    plan = make_plan(recipe, out, methods, seeds, stage)
    for one in [*plan.before, plan.stage]:
        check_data(one)
    check_texts(recipe)
    out = make_folder(out).resolve()
    with only_run(out) as left:
        if left:
            say(f"note: {left}")
        plan = replace(plan, out=out, eval_text=plan.eval_text or _general(recipe, out))
        for line in plan_lines(plan):
            say(line)
        _parent(plan)
        return _all(plan, requests)


def _general(recipe: Recipe, out: Path) -> str | None:
    """The file with the text on which forgetting is measured; None where the recipe has none."""
    texts = general_texts(recipe)
    if not texts:
        return None
    write_text(out / GENERAL, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return str(out / GENERAL)


def _parent(plan: Plan) -> None:
    recipe = plan.parent()
    if recipe is not None:
        say(f"\n{PARENT}: {', '.join(s.name for s in plan.before)}")
        file = plan.out / f"{PARENT}.yaml"
        _write(file, recipe)
        process.carry_out(file, plan.out / PARENT)


def _all(plan: Plan, requests: Path | None) -> Json:
    """Every way with every seed; ``compare.json`` and the page are written after each run."""
    runs: dict[str, dict[int, Json]] = {}
    errors: dict[str, UserError] = {}
    wanted = [(way, seed) for seed in plan.seeds for way in plan.ways]
    for number, (way, seed) in enumerate(wanted, 1):
        if way.name in errors and errors[way.name].exit_code == 2:
            continue  # of the recipe, the data or the model: another seed changes nothing
        say(f"\n{way.name}, seed {seed} ({number} of {len(wanted)})")
        try:
            runs.setdefault(way.name, {})[seed] = _one(plan, way, seed, requests)
        except Interrupted as error:
            raise Interrupted(f"{way.name}, seed {seed}: {error.what}", error.remedy) from None
        except UserError as error:
            errors.setdefault(way.name, error)
            say(f"note: {way.name} is left out: {error}")
        found = collected(plan, runs, errors)
        write_json(plan.out / NUMBERS, found)
        write_page(found, plan.out)
    if not any(runs.values()):
        raise next(iter(errors.values()))
    say(f"\npage: {shown(plan.out / PAGE)}")
    return found


def _one(plan: Plan, way: Way, seed: int, requests: Path | None) -> Json:
    folder = plan.folder(way, seed)
    file = folder.with_name(f"{folder.name}.yaml")
    make_folder(folder)
    _write(file, plan.run(way, seed))
    _share_start(plan.out, folder)
    return run_numbers(folder, process.carry_out(file, folder, requests))


def _write(file: Path, recipe: Json) -> None:
    write_text(file, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def _share_start(out: Path, folder: Path) -> None:
    """What an earlier run measured of the model that all start from: a run takes it where it asks the same."""
    if (folder / MEASURES).exists():
        return
    for file in sorted(out.glob(f"*/seed*/{MEASURES}")):
        try:
            found = read_json(file)
            write_json(folder / MEASURES, {**found, "models": {START: found["models"][START]}})
            return
        except (ModelError, KeyError, TypeError):  # it is only to save time
            continue
