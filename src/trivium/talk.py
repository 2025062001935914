"""A model that answers, with its folder's own chat template and stop tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.data.templates import chat_template
from trivium.errors import ModelError
from trivium.folder import open_folder, trained_template
from trivium.model.generate import generate, generate_many
from trivium.model.language_model import LanguageModel
from trivium.terminal import say
from trivium.train.machine import pick_device, pick_dtype


@dataclass
class Talker:
    """A model that answers. ``stop_ids`` end an answer and are not part of it."""

    model: LanguageModel
    template: Any
    stop_ids: frozenset[int]

    @classmethod
    def open(
        cls, source: str, device: str | None = None, dtype: str | None = None, overrides: dict[str, Any] | None = None
    ) -> Talker:
        """From a model or adapter folder, GGUF file or hub id; left out, the fastest device and its fastest dtype."""
        device = pick_device(device)
        opened = open_folder(source, pick_dtype(dtype, device), device, overrides)
        talker = cls.of(opened.model)
        if trained_template(source) not in (None, talker.template.sha256):
            say(f"note: {source}: its chat template is not the one it was trained with")
        return talker

    @classmethod
    def of(cls, model: LanguageModel) -> Talker:
        """A model in hand, with its tokenizer's own template. Raises ModelError for a reward model."""
        if model.gives_rewards:
            raise ModelError("a reward model gives numbers, not text", "trivium score reads rows with it")
        template = chat_template(model.tokenizer)
        return cls(model, template, template.stop_ids)

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

    def answers(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        most: int,
        temperature: float = 0.0,
        seed: int = 0,
        samples: int = 1,
    ) -> list[str]:
        """The answer to each conversation, many side by side; ``samples`` of each, one after the other."""
        prompts = [self.prompt(list(messages)) for messages in conversations]
        return self.answers_to(prompts, most, temperature, seed, samples)

    def answers_to(
        self, prompts: list[list[int]], most: int, temperature: float = 0.0, seed: int = 0, samples: int = 1
    ) -> list[str]:
        """The text after each prompt of tokens, many side by side."""
        return self.texts(self.ids_after(prompts, most, temperature, seed, samples))

    def ids_after(
        self, prompts: list[list[int]], most: int, temperature: float = 0.0, seed: int = 0, samples: int = 1
    ) -> list[list[int]]:
        """The tokens of the answer to each prompt, without its stop token."""
        return generate_many(self.model, prompts, most, self.stop_ids, temperature, seed, samples)

    def texts(self, answers: list[list[int]]) -> list[str]:
        """The text of answers, without control tokens."""
        return [self.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
