"""What a recipe would take on a device that is not here: reckoned from sizes alone, no weight loaded, nothing tried.

    trivium plan recipe.yaml --memory 24GB --tflops 150

Memory is reckoned as for a run in bfloat16; time from the products that a step must compute, at `SHARE` of the rate
given, which is an assumption: no measurement on such a device is behind it.

Operations of a token (two for a multiplication and an addition): 2 N forward, N the weights of the layers' products,
2 N for the gradient of what they read, 2 N for that of their weights where these are trained; N more where layers are
recomputed. The head (V x D) takes two products for a trained token where it is frozen, four where it is trained
(`model/readout.py`); attention 12 D for each token that a token sees, half of its row on average.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.chain import checked
from trivium.data.templates import chat_template
from trivium.folder import base_of, is_adapter, load_tokenizer, reading_of
from trivium.model.language_model import LanguageModel
from trivium.model.load import quiet, shape_of, wrap
from trivium.model.readout import CHUNK_BYTES
from trivium.objectives import objective
from trivium.peft.base import plan_for, small_weights
from trivium.peft.kinds import quantization, virtual_tokens
from trivium.peft.settings import settings_of
from trivium.planning.memory import NF4, linear_weights, parts, ways
from trivium.recipe import Recipe, Stage
from trivium.stage_data import run_order, stage_examples
from trivium.stage_memory import MOMENTS, READOUT, WORKING_INNER, WORKING_WIDTH
from trivium.stages import PASS_TOKENS
from trivium.start import start_of
from trivium.train import budget

SHARE = 0.4  # of a device's rate that training reaches, assumed
HALF, FLOAT = 2, 4  # bytes of a number that is frozen or computed with, and of one that is trained
CONTEXT = 6 * 10**8  # bytes that a CUDA context and its libraries take


def plan_elsewhere(recipe: Recipe, until: str | None, there: int, rate: float | None, scratch: Path) -> dict[str, Any]:
    """The plan of every stage on a device with ``there`` bytes, and ``rate`` operations a second (None: time is not
    told). Raises what a run would before it opens a model."""
    ordered, _ = checked(recipe, until)
    written = {stage.name: stage for stage in recipe.stages}
    model = _shape(recipe, ordered[0], scratch)
    found = []
    for stage in ordered:
        if written[stage.name].micro_batch_tokens is None:
            stage = stage.model_copy(update={"micro_batch_tokens": PASS_TOKENS["cuda"]})
        found.append(_planned(stage, model, there, rate))
    return {"name": recipe.name, "elsewhere": {"memory": there, "rate": rate, "share": SHARE}, "stages": found}


def _shape(recipe: Recipe, stage: Stage, scratch: Path) -> LanguageModel:
    """The model that the recipe starts from, without its weights."""
    given = recipe.model
    if isinstance(given, dict) and "architecture" in given:
        from transformers import AutoModelForCausalLM

        from trivium.model.new import new_config

        start_of(recipe, stage, scratch)  # which trains the tokenizer, where there is none
        tokenizer = load_tokenizer(scratch / "tokenizer")
        sizes = {k: v for k, v in given.items() if k != "tokenizer"}
        with quiet(), torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(new_config(sizes, tokenizer))
        return wrap(hf, tokenizer, "bfloat16", torch.float32)
    source = given if isinstance(given, str) else str(given["path"])
    folder = Path(source).expanduser()
    base = base_of(folder) if folder.is_dir() and is_adapter(folder) else source
    return wrap(shape_of(base), reading_of(source)[0], "bfloat16", torch.bfloat16)


def _planned(stage: Stage, model: LanguageModel, there: int, rate: float | None) -> dict[str, Any]:
    settings, hf = settings_of(stage.method), model.hf
    context = model.context - virtual_tokens(settings)
    data, _ = stage_examples(stage, model, chat_template(model.tokenizer, stage.date), None, context)
    order = run_order(stage, data)
    sizes, longest = order.step_tokens(), int(data.examples.sizes.max())
    plan = plan_for(hf, settings)
    whole = sum(p.numel() for p in hf.parameters())
    hung = sum(t.numel() for t in small_weights(plan.deltas).values()) if plan is not None else 0
    trained = whole if stage.full else hung
    cost = cost_elsewhere(stage, model, trained, whole if stage.full else whole + hung, int(sizes.max()))
    tokens = max(int(stage.micro_batch_tokens or 1), longest)
    recomputed = 0 if stage.recompute in ("auto", "none", None) else cost.layers
    if stage.recompute == "auto" and cost.peak(tokens, 0) > there:
        recomputed = cost.layers
    elif isinstance(stage.recompute, int):
        recomputed = min(stage.recompute, cost.layers)
    need = cost.peak(tokens, recomputed)
    found: dict[str, Any] = {
        "name": stage.name, "stage": stage.stage, "method": (stage.method or {})["name"],
        "trained_parameters": trained, "total_parameters": whole + (0 if stage.full else hung),
        "rows": data.ledger.as_dict(), "steps": len(sizes), "epochs": order.epochs, "tokens": int(sizes.sum()),
        "pass": {"tokens": tokens, "longest_row": longest, "recomputed_layers": recomputed},
        "device": "the device asked about", "fits": need <= there,
        "memory": {"peak": need, "available": float(there), **parts(cost, tokens, recomputed)},
        "disk": {
            "result": trained * model.saved_dtype.itemsize,
            "checkpoints": (int(stage.keep_checkpoints or 1) + 1) * 3 * FLOAT * trained,
        },
    }  # fmt: skip
    if need > there:
        return found | {"would_fit": [asdict(way) for way in ways(stage, hf, cost, float(there), longest, HALF)]}
    if rate is None:
        return found
    examples = data.examples
    share = float(examples.trained.sum() / max(1, examples.sizes.sum()))
    seen = float(np.square(examples.sizes).sum() / examples.sizes.sum()) / 2
    again = recomputed / cost.layers
    reference = objective(stage.model_dump()).needs_reference
    operations = flop(model, stage.full, share, seen, again, reference) * int(sizes.sum())
    return found | {"seconds": {"training": operations / (SHARE * rate)}}


def cost_elsewhere(stage: Stage, model: LanguageModel, trained: int, whole: int, step_tokens: int) -> budget.Cost:
    """What training holds in bfloat16 on a GPU, from sizes alone."""
    hf, config = model.hf, model.config
    width, inner = _widths(model)
    layers = int(config.num_hidden_layers)
    weights = FLOAT * whole if stage.full else HALF * whole + (FLOAT - HALF) * trained
    if quantization(settings_of(stage.method)) is not None:
        weights -= int(linear_weights(hf) * (HALF - NF4))
    return budget.Cost(
        weights=weights,
        gradients=FLOAT * trained,
        moments=FLOAT * trained * MOMENTS[str(stage.optimizer)],
        readout=READOUT * CHUNK_BYTES,
        runtime=CONTEXT,
        # per layer: two norms keep their input in float32; q, k, v, their turns, the output; the unit's four
        kept=layers * (HALF * (10 * width + 4 * inner) + 2 * FLOAT * width),
        input=HALF * width,
        working=HALF * (WORKING_INNER * inner + WORKING_WIDTH * width),
        layers=layers,
        step_tokens=step_tokens,
    )


def flop(model: LanguageModel, full: bool, trained: float, seen: float, again: float, reference: bool) -> float:
    """Operations of a step for each of its tokens.

    ``trained``: share of the tokens that are; ``seen``: tokens that one sees on average; ``again``: share of the layers
    that are recomputed; ``reference``: whether a parent's pass is made beside it. A trained head is taken to read in
    several chunks, which is four products; a small vocabulary's reads in one, which is three.
    """
    products = linear_weights(model.hf)
    width, _ = _widths(model)
    vocabulary = int(model.hf.get_input_embeddings().weight.shape[0])
    attention = 4 * width * seen * int(model.config.num_hidden_layers)  # of a forward pass
    forward = 2 * products + attention
    backward = (4 if full else 2) * products + 2 * attention
    head = (8 if full else 4) * vocabulary * width * trained
    return forward * (1 + again + reference) + backward + head + reference * 2 * vocabulary * width * trained


def _widths(model: LanguageModel) -> tuple[int, int]:
    width = int(model.hf.get_input_embeddings().weight.shape[-1])
    return width, int(getattr(model.config, "intermediate_size", None) or 4 * width)
