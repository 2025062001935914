"""Dropout on while it trains, off everywhere else: the model's own, and that of the small modules hung in it.

The model stays in evaluation mode unless its own dropout is asked for (GPT-2 ships 0.1, which nobody asked for).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from trivium.errors import RecipeError
from trivium.model.language_model import LanguageModel
from trivium.peft import base as deltas


def set_dropout(model: LanguageModel, share: float) -> None:
    """The model's own dropout, for training; 0 puts it back to evaluation mode."""
    if share and model.device.type == "cuda" and model.layout == "forest":
        raise RecipeError("dropout: FlexAttention, which packed rows use on CUDA, has none", "leave dropout out")
    model.hf.train(share > 0)
    found = False
    for module in model.hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p, found = share, True
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout, found = share, True
    if share and not found:
        raise RecipeError(f"dropout: {type(model.hf).__name__} has none of its own", "leave dropout out")


@contextlib.contextmanager
def dropout_off(model: LanguageModel) -> Iterator[None]:
    """Evaluation between steps: neither the model's dropout nor the adapter's."""
    training, dropping = model.hf.training, any(d.dropping for d in deltas.deltas(model.hf).values())
    model.hf.eval()
    deltas.dropping(model.hf, False)
    try:
        yield
    finally:
        model.hf.train(training)
        deltas.dropping(model.hf, dropping)
