"""Objectives: pure functions of per-token numbers, one family a file, and the table that names them.

This file imports no torch, so that a recipe is checked in milliseconds. CONTRIBUTING.md tells how to add one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trivium.errors import nearest

if TYPE_CHECKING:
    from trivium.data.formats import Kind
    from trivium.objectives.base import Objective


class Entry(NamedTuple):
    """A registry line: ``module:function`` that builds the objective, and of pairs the one that is the loss itself;
    the rows it learns from; and the settings it has, with their defaults (None: it may be left out).
    """

    builder: str
    rows: Kind | None  # None: whatever its stage has
    function: str = ""
    settings: Mapping[str, float | str | None] = {}
    relative: bool = False  # to its parent, whose log-probabilities it is given


_PAIRS = "trivium.objectives.pairs:pairwise"
_RELATIVE, _FREE = "trivium.objectives.preference:", "trivium.objectives.reference_free:"
_TRUST: dict[str, float | str | None] = {"beta": 0.1, "ld_alpha": None, "sft_weight": None}
_MOVING: dict[str, float | str | None] = {"reference_sync_steps": None, "reference_mixup": None}
_HELD: dict[str, float | str | None] = {**_TRUST, **_MOVING}
_DIVERGING: dict[str, float | str | None] = {**_HELD, "divergence": None, "divergence_alpha": None}

OBJECTIVES: dict[str, Entry] = {
    "next_token": Entry("trivium.objectives.next_token:next_token", None),
    "dpo": Entry(_PAIRS, "pair", f"{_RELATIVE}dpo_loss", {**_DIVERGING, "label_smoothing": 0.0}, True),
    "robust": Entry(_PAIRS, "pair", f"{_RELATIVE}robust_loss", {**_DIVERGING, "label_smoothing": 0.1}, True),
    "ipo": Entry(_PAIRS, "pair", f"{_RELATIVE}ipo_loss", _DIVERGING, True),
    "hinge": Entry(_PAIRS, "pair", f"{_RELATIVE}hinge_loss", _DIVERGING, True),
    "dpo_norm": Entry(_PAIRS, "pair", f"{_RELATIVE}dpo_norm_loss", _DIVERGING, True),
    "exo": Entry(_PAIRS, "pair", f"{_RELATIVE}exo_loss", {**_DIVERGING, "label_smoothing": 1e-3}, True),
    "apo_zero": Entry(_PAIRS, "pair", f"{_RELATIVE}apo_zero_loss", _HELD, True),
    "apo_down": Entry(_PAIRS, "pair", f"{_RELATIVE}apo_down_loss", _HELD, True),
    "nca": Entry(_PAIRS, "pair", f"{_RELATIVE}nca_loss", _HELD, True),
    "bco": Entry(_PAIRS, "pair", f"{_RELATIVE}bco_loss", _HELD, True),
    "orpo": Entry(_PAIRS, "pair", f"{_FREE}orpo_loss", {"beta": 0.1, "sft_weight": 1.0}),
    "simpo": Entry(_PAIRS, "pair", f"{_FREE}simpo_loss", {"beta": 2.0, "gamma": 1.0, "sft_weight": None}),
    "cpo": Entry(_PAIRS, "pair", f"{_FREE}cpo_loss", {**_TRUST, "label_smoothing": 0.0, "sft_weight": 1.0}),
    "kto": Entry("trivium.objectives.kto:kto", "rating", "trivium.objectives.kto:kto_loss",
                 {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **_MOVING}, True),
    "bradley_terry": Entry("trivium.objectives.reward:bradley_terry", "pair", "", {"center_rewards": None}),
}  # fmt: skip

SETTINGS = tuple(dict.fromkeys(name for entry in OBJECTIVES.values() for name in entry.settings))

# What others call them.
_ALSO = {
    "sigmoid": "dpo", "cdpo": "dpo with label_smoothing", "slic": "hinge", "sigmoid_norm": "dpo_norm",
    "exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "kto_pair": "kto", "sft": "sft_weight beside another loss",
    "robust_dpo": "robust", "rdpo": "robust", "reward": "stage: reward", "tr_dpo": "dpo with reference_sync_steps",
    "ld_dpo": "dpo with ld_alpha", "rpo": "dpo with sft_weight",
}  # fmt: skip


def shares(loss: str | Mapping[str, float]) -> dict[str, float]:
    """The losses that are added, and the weight of each."""
    return {loss: 1.0} if isinstance(loss, str) else dict(loss)


def defaults(loss: str | Mapping[str, float]) -> dict[str, Any]:
    """The settings of a loss that have a value where nobody gives one; of a mixture, those of the first that has it."""
    found: dict[str, Any] = {}
    for name in shares(loss):
        found = {**{k: v for k, v in OBJECTIVES[name].settings.items() if v is not None}, **found}
    return found


def fault(loss: str | Mapping[str, float], stage: str, allowed: Iterable[str], given: Mapping[str, Any]) -> str | None:
    """What is wrong with a stage's ``loss`` and the settings ``given`` for it; None where nothing is."""
    allowed = list(allowed)
    mixed = shares(loss)
    for name, share in mixed.items():
        if not name:
            return f"loss: it names none; a {stage} stage has {', '.join(allowed)}"
        if name not in allowed:
            known = _ALSO.get(name.lower())
            also = f"; it is called {known} here" if known else nearest(name.lower(), allowed)
            return f"loss: a {stage} stage has {', '.join(allowed)}, not {name}{also}"
        if not (isinstance(share, (int, float)) and math.isfinite(share) and share > 0):
            return f"loss: the weight of {name} is {share!r}, not a number above 0"
    if len(mixed) > 1 and any(OBJECTIVES[name].builder != _PAIRS for name in mixed):
        return f"loss: only losses of pairs can be mixed, not {', '.join(mixed)}"
    if not mixed:
        return f"loss: it names none; a {stage} stage has {', '.join(allowed)}"
    for key in (key for key in SETTINGS if given.get(key) is not None):
        if not any(key in OBJECTIVES[name].settings for name in mixed):
            having = [name for name, entry in OBJECTIVES.items() if key in entry.settings]
            where = "" if set(having) & set(allowed) else ", which other stages have"
            return f"{key}: {', '.join(mixed)} has no such setting; it is for {', '.join(having)}{where}"
    return _contradiction(mixed, given)


def _contradiction(mixed: Mapping[str, float], given: Mapping[str, Any]) -> str | None:
    """Values that do not go together."""
    smoothing, divergence = given.get("label_smoothing"), given.get("divergence")
    if "exo" in mixed and smoothing == 0:
        return "label_smoothing: exo needs one above 0 (its paper: 0.001), or its loss is infinite"
    if (divergence == "alpha") != (given.get("divergence_alpha") is not None):
        return "divergence_alpha: it goes with divergence: alpha, and that with it"
    if given.get("reference_mixup") is not None and given.get("reference_sync_steps") is None:
        return "reference_mixup: without reference_sync_steps the reference stays what it is"
    differing = [k for k in ("beta", "label_smoothing") if given.get(k) is None
                 and len({OBJECTIVES[n].settings[k] for n in mixed if k in OBJECTIVES[n].settings}) > 1]  # fmt: skip
    if differing:
        return f"{differing[0]}: {' and '.join(mixed)} have different defaults: give one"
    return None


def objective(settings: Mapping[str, Any]) -> Objective:
    """The objective that a stage's settings name under ``loss``; what they leave out has its default.

    The recipe has checked that it fits the stage.
    """
    loss = settings["loss"]
    module, function = OBJECTIVES[next(iter(shares(loss)))].builder.split(":")
    given = {name: value for name, value in settings.items() if value is not None}
    return getattr(importlib.import_module(module), function)({**defaults(loss), **given})
