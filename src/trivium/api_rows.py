"""What a notebook hands over, as the rest of trivium takes it: rows in memory or in files, a stage, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.data.hub import local
from trivium.data.rows import Listed, Source
from trivium.errors import ModelError, RecipeError
from trivium.recipe import Recipe
from trivium.recipe_file import recipe_of

Rows = Sequence[Mapping[str, Any]] | str | Path
Prompt = str | Sequence[Mapping[str, Any]]


def one_stage(kind: str, values: dict[str, Any]) -> Recipe:
    """A recipe of one stage, so that everything is checked as in a run. Raises RecipeError."""
    try:
        return recipe_of({"name": "notebook", "model": "given", "stages": [{"name": kind, "stage": kind, **values}]},
                         Path("train"))  # fmt: skip
    except RecipeError as error:
        raise RecipeError(error.what.replace(f"stages.{kind}.", ""), error.remedy) from None


def listed_rows(rows: Any, name: str = "rows") -> Listed:
    if isinstance(rows, Mapping) or not isinstance(rows, Sequence):
        raise ModelError(f"{name}: a {type(rows).__name__} is no list of rows", f"give {name} as a list of mappings")
    return Listed([dict(row) if isinstance(row, Mapping) else row for row in rows], name)


def source_of(rows: Rows) -> Source:
    return local(str(rows)) if isinstance(rows, (str, Path)) else listed_rows(rows)


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
