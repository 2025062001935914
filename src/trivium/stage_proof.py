"""What a stage proves and measures before its first step: the rows it proves on, the first loss, recomputation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from trivium.data.store import Examples
from trivium.errors import ModelError
from trivium.evaluate.held_out import evaluate
from trivium.forest import Example, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.proof import TOLERANCE
from trivium.objectives.base import Objective
from trivium.recipe import Stage
from trivium.terminal import say, size
from trivium.train import recompute
from trivium.train.machine import free_memory

PROOF_ROWS = 4


def probe(examples: Examples) -> list[Example]:
    """Real rows for the proof: the longest, and a few of the shortest, on which the gradients are compared."""
    ranked = np.argsort(examples.sizes, kind="stable")
    return list(examples.at([*ranked[: PROOF_ROWS - 1], *ranked[PROOF_ROWS - 1 :][-1:]]))


def _shortest(examples: Examples, count: int) -> list[Example]:
    return list(examples.at(np.argsort(examples.sizes, kind="stable")[:count]))


def prove_start(
    goal: Objective, model: LanguageModel, reference: Any, examples: Examples, parent: Callable[[], Any] | None = None
) -> None:
    """The objective's declared value before the first step, on the shortest rows; raises ModelError.

    Where a method does not start as its parent, ``parent`` puts the model back to it for the proof.
    """
    if goal.at_start is None:
        return
    plain = [replace(e, weight=1.0, margin=0.0) for e in _shortest(examples, 2)]
    forest = lay_out(plain).to(model.device)
    with parent() if parent else contextlib.nullcontext():
        loss = evaluate(goal, model.logprob, reference, [forest])[goal.at_start_of]
    allowed = 5 * TOLERANCE[model.dtype].mean
    if not math.isfinite(loss):
        what = f"{goal.name}: the loss before the first step is {loss}: its settings are beyond what numbers can hold"
        raise ModelError(what, "use settings nearer to the usual ones, such as beta: 0.1")
    if not abs(loss - goal.at_start) <= allowed:
        raise ModelError(
            f"{goal.name}: the loss before the first step is {loss:.6f}, not {goal.at_start:.6f}: "
            "the reference is not the parent",
            "the parent's folder has changed since it was trained; run the recipe again",
        )
    where = ", as it must" if parent is None else " with the method off, as it must; the method itself starts elsewhere"
    say(f"  proof: {goal.name} starts at {loss:.6f}{where}")


def recomputes(stage: Stage, model: LanguageModel, examples: Examples) -> bool:
    """Whether layers are recomputed; ``auto`` measures what a row keeps and scales it to a micro-batch."""
    if stage.recompute != "auto":
        return stage.recompute == "layers"
    row = lay_out(_shortest(examples, 1)).to(model.device)
    kept = recompute.saved_bytes(lambda: model.logprob(row), model.hf.parameters()) / max(1, len(row.tokens))
    tokens = max(int(stage.micro_batch_tokens or 1), int(examples.sizes.max()))
    on = recompute.wanted("auto", kept, tokens, free_memory(str(model.device)))
    if on:
        say(f"  recompute: layers, as {tokens:,} tokens at {size(kept)} each would not fit well")
    return on
