"""Objectives: pure functions of per-token log-probabilities, one family a file, and the table that names them.

This file imports no torch, so that a recipe is checked in milliseconds. CONTRIBUTING.md tells how to add one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from trivium.objectives.base import Objective


class Entry(NamedTuple):
    """A registry line: ``module:function`` that builds it from a stage's settings, and the rows it learns from."""

    builder: str
    rows: tuple[str, ...]


OBJECTIVES: dict[str, Entry] = {
    "next_token": Entry("trivium.objectives.next_token:next_token", ("text", "conversation")),
    "dpo": Entry("trivium.objectives.preference:dpo", ("pair",)),
}


def objective(settings: Mapping[str, Any]) -> Objective:
    """The objective that a stage's settings name under ``loss``; the recipe has checked that it fits the stage."""
    module, function = OBJECTIVES[settings["loss"]].builder.split(":")
    return getattr(importlib.import_module(module), function)(settings)
