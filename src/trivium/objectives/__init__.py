"""Objectives: pure functions of per-token log-probabilities, one family a file, and the table that names them.

To add one: write the function with its paper's equation in a file of its family, and a line in `objective`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trivium.objectives.base import Objective


def objective(name: str, beta: float | None = None) -> Objective:
    """The objective called ``name``; the recipe has checked that it exists and fits its stage."""
    from trivium.objectives.next_token import next_token
    from trivium.objectives.preference import dpo

    table = {
        "next_token": lambda: next_token(),
        "dpo": lambda: dpo(beta if beta is not None else 0.1),
    }
    return table[name]()
