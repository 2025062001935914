"""The demo's world for a comparison: its recipe in a folder, and the requests by which its answers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trivium.demo import world
from trivium.files import make_folder, write_text
from trivium.recipe import Recipe
from trivium.recipe_file import parse_recipe

STAGE = "sft_full"


def demo_world(out: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """Write the world's data and ``recipe.yaml`` into ``out``; returns the recipe and the file of requests."""
    file = out / "recipe.yaml"
    text = resources.files("trivium.demo").joinpath("recipe.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, file, list(overrides))
    data = make_folder(out / "data")
    world.write(data, recipe.seed, pairs=0)
    write_text(file, text)
    return recipe, data / "held_out.jsonl"
