"""Tiny models of random weights with a tokenizer of bytes and words: one that talks, one that gives rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from trivium.data.tokenizer import train_tokenizer
from trivium.model.language_model import LanguageModel
from trivium.model.load import wrap
from trivium.model.new import new_model
from trivium.model.reward import as_reward_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="session")
def words() -> Any:
    return train_tokenizer(["A turtle and a hare. The hare ran. What did it say? It said no."], 300)


@pytest.fixture(scope="session")
def random_model(words) -> Callable[..., LanguageModel]:
    """``random_model(seed, context)``: the same seed is the same model."""

    def build(seed: int = 0, context: int = 64, spread: float = 0.3) -> LanguageModel:
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(words)}
        config = AutoConfig.for_model(
            "llama", **SIZES, **ids, max_position_embeddings=context, initializer_range=spread
        )
        return wrap(new_model(config, seed=seed).eval(), words, "float32", torch.float32)

    return build


@pytest.fixture(scope="session")
def reward(random_model) -> LanguageModel:
    """A reward model; read only."""
    return as_reward_model(random_model(), seed=0)
