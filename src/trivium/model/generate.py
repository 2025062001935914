"""Answers, token by token, with the folder's own template and stop tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivium.errors import ModelError
from trivium.model.language_model import LanguageModel


@dataclass
class Talker:
    """A model that answers. ``stop_ids`` end an answer and are not part of it."""

    model: LanguageModel
    template: Any
    stop_ids: frozenset[int]

    @classmethod
    def open(cls, source: str, device: str | None = None) -> Talker:
        """From a model or adapter folder, GGUF file or hub id; in the fastest dtype of the device."""
        from trivium.data.templates import chat_template
        from trivium.folder import open_folder
        from trivium.train.machine import pick_device, pick_dtype

        device = pick_device(device)
        opened = open_folder(source, pick_dtype("auto", device), device)
        template = chat_template(opened.model.tokenizer)
        return cls(opened.model, template, template.stop_ids)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation and the beginning of the answer."""
        return list(self.template.encode_prompt(messages))

    def raw_prompt(self, text: str) -> list[int]:
        """The tokens of a text to be continued, begun as documents are."""
        ids = list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self.model.tokenizer.bos_token_id
        return [bos, *ids] if bos is not None else ids

    def stream(self, ids: list[int], most: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The answer's text as it comes; whole characters only."""
        shown, generated = "", []
        for token in generate(self.model, ids, most, self.stop_ids, temperature, seed):
            generated.append(token)
            text = self.model.tokenizer.decode(generated, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # else the rest of the character is still to come
                yield text[len(shown) :]
                shown = text


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
