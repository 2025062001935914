"""What a stage proves and measures before its first step: the rows it proves on, the first loss, recomputation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trivium.data.store import Examples
from trivium.errors import ModelError, RecipeError
from trivium.evaluate.held_out import evaluate
from trivium.forest import Example, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.proof import TOLERANCE
from trivium.model.readout import CHUNK_BYTES
from trivium.objectives.base import Objective
from trivium.peft.targets import decoder_layers
from trivium.recipe import Stage
from trivium.terminal import say, size
from trivium.train import budget, recompute
from trivium.train.machine import free_memory

PROOF_ROWS = 4

# Tensors that a layer's backward pass holds besides what is kept: of the MLP's inner width, and of the model's.
WORKING_INNER, WORKING_WIDTH = 6, 6
READOUT = 3 * CHUNK_BYTES  # logits, what becomes of them, and the gradient


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


def recomputes(stage: Stage, model: LanguageModel, examples: Examples) -> int:
    """How many layers are recomputed; ``auto`` measures what a row keeps and scales it to a micro-batch."""
    layers = len(decoder_layers(model.hf))
    if stage.recompute != "auto":
        return {"none": 0, "layers": layers}.get(str(stage.recompute)) or min(int(stage.recompute or 0), layers)
    kept = kept_per_token(model, examples)
    tokens = max(int(stage.micro_batch_tokens or 1), int(examples.sizes.max()))
    if not recompute.too_much(kept, tokens, free_memory(str(model.device))):
        return 0
    say(f"  recompute: layers, as {tokens:,} tokens at {size(kept)} each would not fit well")
    return layers


def kept_per_token(model: LanguageModel, examples: Examples) -> float:
    """Bytes that autograd keeps per token, measured on a short row."""
    row = lay_out(_shortest(examples, 1)).to(model.device)
    return recompute.saved_bytes(lambda: model.logprob(row), model.hf.parameters()) / max(1, len(row.tokens))


def within_memory(stage: Stage, model: LanguageModel, examples: Examples) -> Stage:
    """The stage with passes and recomputation such that it keeps to its ``memory``. Raises RecipeError."""
    if stage.memory is None:
        return stage
    limit, longest = budget.in_bytes(stage.memory), int(examples.sizes.max())
    cost = cost_of(model, kept_per_token(model, examples))
    plan = budget.fit(limit, cost, longest, int(stage.micro_batch_tokens or 1))
    if plan is None:
        least = size(budget.least(cost, longest))
        raise RecipeError(
            f"stages.{stage.name}.memory: {stage.memory} is too little: the longest row, of {longest:,} tokens, takes "
            f"{least} with all layers recomputed",
            f"give at least {least}, or a smaller max_length" + (", or an adapter" if stage.full else ""),
        )
    told = f"{plan.layers} of {cost.layers} layers recomputed" if plan.layers else "no layer recomputed"
    say(f"  memory: {plan.tokens:,} tokens a pass, {told}: {size(plan.bytes)} of {stage.memory} at the peak")
    return stage.model_copy(update={"micro_batch_tokens": plan.tokens, "recompute": plan.layers})


def cost_of(model: LanguageModel, kept: float) -> budget.Cost:
    """What training this model holds, from the sizes of its tensors; ``kept`` per token by autograd."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.hf.parameters(), *model.hf.buffers())}  # fmt: skip
    trained = sum(p.numel() for p in model.hf.parameters() if p.requires_grad)
    width = model.hf.get_input_embeddings().weight.shape[-1]
    inner = int(getattr(model.config, "intermediate_size", None) or 4 * width)
    bytes_each = torch.finfo(model.dtype).bits // 8
    return budget.Cost(
        # a trained weight has its gradient and two moments, all in float32
        fixed=sum(held.values()) + 12 * trained + READOUT + (budget.RUNTIME if model.device.type == "cpu" else 0),
        kept=kept,
        input=width * bytes_each,
        working=(WORKING_INNER * inner + WORKING_WIDTH * width) * bytes_each,
        layers=len(decoder_layers(model.hf)),
    )
