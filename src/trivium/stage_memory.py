"""How a stage's passes are arranged so that they fit: tokens a pass and layers recomputed; and whether they fit at all.

What a training holds is reckoned from the sizes of its tensors and from what a short row keeps (`cost_of`). A stage
with a budget (`memory`) keeps to it; without one, layers are recomputed where they would not fit well. What then would
need more than is free is refused before its first step, with what would fit: a system that swaps, or kills what takes
too much, tells nobody why.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from trivium.data.store import Examples
from trivium.errors import OutOfMemory, RecipeError
from trivium.forest import lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.readout import CHUNK_BYTES
from trivium.peft.targets import decoder_layers
from trivium.recipe import Stage
from trivium.stage_proof import shortest
from trivium.terminal import say, size
from trivium.train import budget, recompute
from trivium.train.machine import free_memory, held_memory

# Tensors that a layer's backward pass holds besides what is kept: of the MLP's inner width, and of the model's.
WORKING_INNER, WORKING_WIDTH = 6, 6
BUFFERS = 60 * 10**6  # that the products' library takes once it is used in earnest
READOUT = 2  # chunks of logits: they, and what is made of them
MOMENTS = {"adamw": 2, "muon": 1}  # float32 numbers that an optimizer keeps of a trained one


def arranged(
    stage: Stage, model: LanguageModel, examples: Examples, step_tokens: np.ndarray
) -> tuple[Stage, budget.Cost]:
    """The stage with tokens a pass and a number of layers to recompute, such that it fits; and what it holds.

    ``step_tokens``: tokens of each step. Raises RecipeError where its ``memory`` is too little.
    """
    longest, asked = int(examples.sizes.max()), int(stage.micro_batch_tokens or 1)
    cost = cost_of(stage, model, kept_per_token(model, examples), int(step_tokens.max()))
    if stage.memory is not None:
        stage = _within_memory(stage, cost, longest, asked)
    elif stage.recompute == "auto":
        tokens = max(asked, longest)
        again = recompute.too_much(cost.kept, tokens, free_memory(str(model.device)))
        if again:
            say(f"  recompute: layers, as {tokens:,} tokens at {size(cost.kept)} each would not fit well")
        stage = stage.model_copy(update={"recompute": cost.layers if again else 0})
    else:
        layers = {"none": 0, "layers": cost.layers}.get(str(stage.recompute))
        layers = min(int(stage.recompute or 0), cost.layers) if layers is None else layers
        stage = stage.model_copy(update={"recompute": layers})
    return stage, cost


def check_fits(stage: Stage, cost: budget.Cost, model: LanguageModel, longest: int) -> None:
    """What the stage will hold at its peak is free, or held already; raises OutOfMemory with what would fit."""
    asked = int(stage.micro_batch_tokens or 1)
    need, there, cost = room_for(stage, cost, model, longest)
    if need <= there or not held_memory(str(model.device)):  # where the system tells nothing, free memory is a guess
        return
    plan = budget.fit(there, cost, longest, asked)
    what = f"stages.{stage.name}: it would take {size(need)}, and there are {size(there)}"
    if plan is not None:
        remedy = f"use memory: {budget.amount(there)}: {_in_words(plan, cost)}, {size(plan.bytes)}"
    elif stage.full:
        remedy = "use method: lora, a smaller model or max_length; `trivium plan` tells what would fit"
    else:
        remedy = "use method: qlora, a smaller model or max_length; `trivium plan` tells what would fit"
    raise OutOfMemory(what, remedy)


def room_for(stage: Stage, cost: budget.Cost, model: LanguageModel, longest: int) -> tuple[float, float, budget.Cost]:
    """Bytes that a stage will hold at its peak, bytes that there are for it, and its cost with what is held now.

    On a GPU passes that are too large are halved when they are met, so that only the longest row has to fit.
    """
    device, asked = str(model.device), int(stage.micro_batch_tokens or 1)
    tokens = longest if model.device.type == "cuda" else max(asked, longest)
    held = held_memory(device)
    if model.device.type == "cpu":  # as it is, and not as it usually is
        cost = replace(cost, runtime=max(0, held - cost.weights) + BUFFERS)
    need, there = cost.peak(tokens, int(stage.recompute or 0)), free_memory(device) + held
    return need, there, cost


def kept_per_token(model: LanguageModel, examples: Examples) -> float:
    """Bytes that autograd keeps per token, measured on a short row."""
    row = lay_out(shortest(examples, 1)).to(model.device)
    return recompute.saved_bytes(lambda: model.logprob(row), model.hf.parameters()) / max(1, len(row.tokens))


def cost_of(
    stage: Stage, model: LanguageModel, kept: float, step_tokens: int, runtime: float = budget.RUNTIME
) -> budget.Cost:
    """What training this model holds, from the sizes of its tensors; ``kept`` bytes per token by autograd,
    ``runtime`` what a process on the CPU holds besides."""
    trained = sum(p.numel() for p in model.hf.parameters() if p.requires_grad)
    vocabulary, width = model.hf.get_input_embeddings().weight.shape
    inner = int(getattr(model.config, "intermediate_size", None) or 4 * width)
    bytes_each = torch.finfo(model.dtype).bits // 8
    return budget.Cost(
        weights=weights_of(model),
        gradients=4 * trained,
        moments=4 * trained * MOMENTS[str(stage.optimizer)],
        readout=READOUT * min(CHUNK_BYTES, 4 * vocabulary * max(step_tokens, 1)),
        runtime=runtime if model.device.type == "cpu" else 0,
        kept=kept,
        input=width * bytes_each,
        working=(WORKING_INNER * inner + WORKING_WIDTH * width) * bytes_each,
        layers=len(decoder_layers(model.hf)),
        step_tokens=step_tokens,
    )


def weights_of(model: LanguageModel) -> int:
    """Bytes of all weights and buffers, shared ones counted once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.hf.parameters(), *model.hf.buffers())}  # fmt: skip
    return sum(held.values())


def _within_memory(stage: Stage, cost: budget.Cost, longest: int, asked: int) -> Stage:
    """Passes and recomputation that keep to the stage's ``memory``. Raises RecipeError."""
    plan = budget.fit(budget.in_bytes(str(stage.memory)), cost, longest, asked)
    if plan is None:
        least = size(budget.least(cost, longest, asked))
        raise RecipeError(
            f"stages.{stage.name}.memory: {stage.memory} is too little: the longest row, of {longest:,} tokens, takes "
            f"{least} with all layers recomputed",
            f"give at least {least}, or a smaller max_length" + (", or an adapter" if stage.full else ""),
        )
    say(f"  memory: {_in_words(plan, cost)}: {size(plan.bytes)} of {stage.memory} at the peak")
    return stage.model_copy(update={"micro_batch_tokens": plan.tokens, "recompute": plan.layers})


def _in_words(plan: budget.Plan, cost: budget.Cost) -> str:
    told = f"{plan.layers} of {cost.layers} layers recomputed" if plan.layers else "no layer recomputed"
    return f"{plan.tokens:,} tokens a pass, {told}"
