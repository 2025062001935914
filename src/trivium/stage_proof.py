"""What a stage proves before its first step: the rows it proves on, and the first loss."""

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
from trivium.terminal import say

PROOF_ROWS = 4


def probe(examples: Examples) -> list[Example]:
    """Real rows for the proof: the longest, and a few of the shortest, on which the gradients are compared."""
    ranked = np.argsort(examples.sizes, kind="stable")
    return list(examples.at([*ranked[: PROOF_ROWS - 1], *ranked[PROOF_ROWS - 1 :][-1:]]))


def shortest(examples: Examples, count: int) -> list[Example]:
    return list(examples.at(np.argsort(examples.sizes, kind="stable")[:count]))


def check_readable(model: LanguageModel, examples: Examples) -> None:
    """Raises ModelError for a row with a token that the tokenizer has, and the model no embedding for.

    Tokens are looked at only where there is such a token.
    """
    there = len(model.hf.get_input_embeddings().weight)
    if max(model.tokenizer.get_vocab().values(), default=0) < there:
        return
    for numbers, tokens, _, lengths in examples.flat():
        if len(beyond := np.flatnonzero(tokens >= there)):
            number = int(np.searchsorted(np.cumsum(lengths), beyond[0], "right"))
            origin = examples.store.example(int(numbers[number])).origin
            model.check_tokens(tokens[beyond[:1]], where=f"{origin}: ")


def prove_start(
    goal: Objective, model: LanguageModel, reference: Any, examples: Examples, parent: Callable[[], Any] | None = None
) -> None:
    """The objective's declared value before the first step, on the shortest rows; raises ModelError.

    Where a method does not start as its parent, ``parent`` puts the model back to it for the proof.
    """
    if goal.at_start is None:
        return
    plain = [replace(e, weight=1.0, margin=0.0) for e in shortest(examples, 2)]
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
