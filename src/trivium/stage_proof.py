"""What a stage proves and measures before its first step: the rows it proves on, the first loss, recomputation."""

from __future__ import annotations

from typing import Any

from trivium.errors import ModelError
from trivium.evaluate.held_out import evaluate
from trivium.forest import Example, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.proof import TOLERANCE
from trivium.objectives.base import Objective
from trivium.recipe import Stage
from trivium.train import recompute
from trivium.train.log import say, size
from trivium.train.machine import free_memory

PROOF_ROWS = 4


def probe(examples: list[Example]) -> list[Example]:
    """Real rows for the proof: the longest, and a few of the shortest, on which the gradients are compared."""
    ranked = sorted(examples, key=lambda e: e.tokens)
    return [*ranked[: PROOF_ROWS - 1], *ranked[PROOF_ROWS - 1 :][-1:]]


def prove_start(goal: Objective, model: LanguageModel, reference: Any, examples: list[Example]) -> None:
    """The objective's declared value before the first step, on the shortest rows; raises ModelError."""
    if goal.at_start is None:
        return
    forest = lay_out(sorted(examples, key=lambda e: e.tokens)[:2]).to(model.device)
    loss = evaluate(goal, model.logprob, reference, [forest])[goal.at_start_of]
    allowed = 5 * TOLERANCE[model.dtype].mean
    if not abs(loss - goal.at_start) <= allowed:
        raise ModelError(
            f"{goal.name}: the loss before the first step is {loss:.6f}, not {goal.at_start:.6f}: "
            "the reference is not the parent",
            "the parent's folder has changed since it was trained; run the recipe again",
        )
    say(f"  proof: {goal.name} starts at {loss:.6f}, as it must")


def recomputes(stage: Stage, model: LanguageModel, examples: list[Example]) -> bool:
    """Whether layers are recomputed; ``auto`` measures what a row keeps and scales it to a micro-batch."""
    if stage.recompute != "auto":
        return stage.recompute == "layers"
    ranked = sorted(examples, key=lambda e: e.tokens)
    row = lay_out(ranked[:1]).to(model.device)
    kept = recompute.saved_bytes(lambda: model.logprob(row), model.hf.parameters()) / max(1, len(row.tokens))
    tokens = max(int(stage.micro_batch_tokens or 1), ranked[-1].tokens)
    on = recompute.wanted("auto", kept, tokens, free_memory(str(model.device)))
    if on:
        say(f"  recompute: layers, as {tokens:,} tokens at {size(kept)} each would not fit well")
    return on
