"""``trivium.compare(...)``: what `trivium compare` does, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.comparing.comparison import compare as compared
from trivium.recipe_file import any_recipe


def compare(
    recipe: str | Path | Mapping[str, Any],
    methods: Sequence[str] | None = None,
    seeds: int = 1,
    out: str | Path | None = None,
    *,
    stage: str | None = None,
    overrides: Iterable[str] = (),
) -> dict[str, Any]:
    """Train one stage of a recipe each way on the same rows; returns what ``compare.json`` holds.

    ``methods`` are names of methods and presets; ``"lora@1e-3"`` is one at that learning rate. ``overrides`` are
    ``key=value`` as `--set` takes them. Each run is a process of its own; what was interrupted goes on. Raises a
    UserError where the comparison cannot begin, or every way fails.
    """
    read = any_recipe(recipe, overrides)
    folder = Path(out) if out is not None else Path("runs") / f"{read.name}-compare"
    return compared(read, folder, methods, seeds, stage)
