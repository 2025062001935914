"""What is compared: a recipe's stage, the ways to train it, each with its learning rate, and what they start from.

    plan = make_plan(recipe, Path("runs/x-compare"), ["full", "lora", "lora@1e-3"], seeds=3)
    plan.parent()                   # the recipe of the stages before it; None where it starts from the given model
    plan.run(plan.ways[0], seed)    # the recipe of one run, of one stage

A way is a method or preset by name, on request with a learning rate of its own; its name is that of its folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.errors import RecipeError, nearest
from trivium.peft.settings import PRESETS, as_written, method_of_preset, rate_of
from trivium.recipe import Recipe, Stage
from trivium.stages import INHERITED, STAGES, resolve, rows_of
from trivium.start import given_method

METHODS = ("full", "lora", "houlsby", "ia3", "bitfit")  # where none are named: one of each kind
PARENT = "parent"  # the folder of the run before
GENERAL = "general.jsonl"  # the text on which forgetting is measured, where the recipe names none

Json = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to train the stage; ``method`` as a recipe says it."""

    name: str
    method: Json
    learning_rate: float


@dataclass(frozen=True)
class Plan:
    """A comparison in the folder ``out``; ``eval_text`` is the text of which forgetting is told, where there is one."""

    recipe: Recipe
    stage: Stage
    before: list[Stage]  # the stages that it comes from, the first at the start
    ways: list[Way]
    seeds: list[int]
    out: Path
    eval_text: str | None

    def parent(self) -> Json | None:
        """The recipe of the stages before, or None."""
        return self._recipe(PARENT, self.recipe.seed, self.recipe.model, [_written(s) for s in self.before])

    def run(self, way: Way, seed: int) -> Json:
        """The recipe of one run: what the stage would have taken from those before it is written down."""
        taken = {k: v for s in self.before for k in INHERITED if (v := getattr(s, k)) is not None}
        own = _written(self.stage) | {"method": way.method, "learning_rate": way.learning_rate}
        stage = {k: v for k, v in (taken | own).items() if k not in ("from", "seed")}
        if stage.get("optimizer") == "muon" and way.method["name"] != "full":
            stage["optimizer"] = "adamw"  # muon is for full training
        model = str(self.out / PARENT / self.before[-1].name) if self.before else self.recipe.model
        found = self._recipe(f"{way.name}-seed{seed}".replace("@", "-"), seed, model, [stage])
        assert found is not None
        return found

    def folder(self, way: Way, seed: int) -> Path:
        """The run's folder; its recipe lies beside it, with the ending ``.yaml``."""
        return self.out / way.name / f"seed{seed}"

    def _recipe(self, name: str, seed: int, model: Any, stages: list[Json]) -> Json | None:
        if not stages:
            return None
        about = {"name": f"{self.recipe.name}-{name}", "seed": seed, "model": model, "track": self.recipe.track}
        text = {"eval_text": self.eval_text} if self.eval_text else {}
        return about | text | {"prompts": self.recipe.prompts or [], "stages": stages}


def make_plan(
    recipe: Recipe, out: Path, methods: Sequence[str] | None = None, seeds: int = 1, stage: str | None = None
) -> Plan:
    """Which stage is trained which ways. Raises RecipeError; writes nothing."""
    if seeds < 1:
        raise RecipeError(f"seeds: {seeds} is no number of seeds", "give 1 or more")
    chosen = _chosen(recipe, stage)
    before = _before(recipe, chosen)
    own = next((s.method for s in (chosen, *reversed(before)) if s.method), None)
    own = as_written(own or (given_method(recipe) or {}).get("method") or "full")
    rate = STAGES[chosen.stage].defaults["learning_rate"]
    if chosen.learning_rate is not None:  # the recipe's is one for its own method
        rate = chosen.learning_rate / rate_of(own)
    ways = [_way(str(name).strip(), own, rate) for name in methods or METHODS]
    twice = [w.name for n, w in enumerate(ways) if w.name in {v.name for v in ways[:n]}]
    if twice:
        raise RecipeError(f"methods: {twice[0]} is named twice", "name each once; lora@1e-3 is lora at another rate")
    first = chosen.seed if chosen.seed is not None else recipe.seed
    return Plan(recipe, chosen, before, ways, [first + n for n in range(seeds)], out, recipe.eval_text)


def _chosen(recipe: Recipe, name: str | None) -> Stage:
    """The stage by its name, else the first one that fine-tunes."""
    names = [s.name for s in recipe.stages]
    new = isinstance(recipe.model, dict) and "architecture" in recipe.model
    if name is not None:
        if name not in names:
            raise RecipeError(f"--stage {name}: no such stage{nearest(name, names)}", f"stages: {', '.join(names)}")
        found = recipe.stages[names.index(name)]
    else:
        tuned = [s for s in recipe.stages if s.from_ or not new]
        ranked = sorted(tuned, key=lambda s: ("conversation", "pair", "rating", "text").index(rows_of(s)))
        if not ranked:
            raise RecipeError(f"{recipe.name}: no stage that fine-tunes a model", "add one: sft, preference, ...")
        found = ranked[0]
    if found.from_ is None and new:
        what = f"stage {found.name} starts from random weights, which an adapter cannot stand on"
        raise RecipeError(what, "choose a stage that starts from another one, or give the recipe a trained model")
    return found


def _before(recipe: Recipe, stage: Stage) -> list[Stage]:
    by_name = {s.name: s for s in recipe.stages}
    found: list[Stage] = []
    while stage.from_ is not None:
        stage = by_name[stage.from_]
        found.insert(0, stage)
    return found


def _way(asked: str, own: Json, rate: float) -> Way:
    name, at, given = asked.partition("@")
    method = own if name == _known_as(own) else method_of_preset(name)
    found = rate * rate_of(method)
    if at:
        try:
            found = float(given)
        except ValueError:
            found = math.nan
        if not (0 < found < math.inf):
            raise RecipeError(f"methods: {asked}: '{given}' is no learning rate", f"e.g. {name}@1e-3")
    return Way(f"{name}@{found:g}" if at else name, method, float(f"{found:.6g}"))


def _known_as(method: Json) -> str:
    """The preset or method that a recipe's method is a case of."""
    return next((name for name, said in PRESETS.items() if said.items() <= method.items()), str(method["name"]))


def _written(stage: Stage) -> Json:
    return stage.model_dump(by_alias=True, exclude_none=True)


def settings_said(name: str, method: Json) -> str:
    """A way's settings in words, what it is a case of first."""
    if method["name"] == "full":
        return "every weight"
    rest = [f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in method.items() if k != "name"]
    base = [] if name.partition("@")[0] == method["name"] else [str(method["name"])]
    return ", ".join([*base, *rest]) or "its defaults"


def general_texts(recipe: Recipe) -> tuple[str, ...]:
    """Held-out text of the recipe's first pretraining stage; empty where it has none. Raises DataError."""
    from trivium.measures import exam_of

    reads = [s for s in recipe.stages if rows_of(s) == "text"]
    if not reads:
        return ()
    full, _ = resolve(reads[0], recipe, None, "")
    return exam_of(recipe.model_copy(update={"prompts": [], "eval_text": None}), [full]).texts
