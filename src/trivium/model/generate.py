"""Generation, token by token, with the model's own cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trivium.errors import ModelError
from trivium.model.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel, ids: list[int], most: int, stop_ids: frozenset[int], temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """Tokens after ``ids``, until a stop token, ``most`` tokens, or the end of the model's context."""
    if not ids:
        raise ModelError("nothing to continue: the prompt is empty", "give a prompt")
    if len(ids) >= model.context:
        raise ModelError(
            f"the prompt has {len(ids)} tokens, the model's context is {model.context}", "shorten the prompt"
        )
    generator = torch.Generator().manual_seed(seed)
    following, cache = torch.tensor([ids], device=model.device), None
    for _ in range(min(most, model.context - len(ids))):
        with model.computing():
            out = model.hf(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        token = _pick(out.logits[0, -1].float().cpu(), temperature, generator)
        if token in stop_ids:
            return
        yield token
        following = torch.tensor([[token]], device=model.device)


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # the likeliest at 0: a temperature near 0 would otherwise divide into infinities
    scaled = (logits - logits.max()) / temperature
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
