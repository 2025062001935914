"""Tiny random models of several families: 2 layers, width 64, vocabulary 128."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trivium.model.layout import row_inputs
from trivium.virtual import adapters_of

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
KINDS = {
    "llama": ("llama", COMMON),
    "qwen3": ("qwen3", COMMON),
    "gemma3": ("gemma3_text", {**COMMON, "sliding_window": 16}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128}),
    "opt": ("opt", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "mixtral": ("mixtral", {**COMMON, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**COMMON, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**COMMON, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "qwen2_moe": ("qwen2_moe", {**COMMON, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
}


@functools.lru_cache
def _built(kind: str) -> nn.Module:
    family, values = KINDS[kind]
    torch.manual_seed(1)
    # A wide random start: with the usual 0.02 a tiny model's logits hardly depend on its layers.
    config = AutoConfig.for_model(family, initializer_range=0.1, **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    """``tiny("llama")``: a fresh copy, always with the same weights, in evaluation mode."""
    return lambda kind: copy.deepcopy(_built(kind))


@pytest.fixture
def on_meta() -> Callable[..., nn.Module]:
    """``on_meta("llama", hidden_size=12288, ...)``: any size, without its weights."""

    def build(family: str, **values: object) -> nn.Module:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))

    return build


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(3))


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """``[B, L, V]``, the virtual tokens of a prompt or prefix before every row."""
    adapters = adapters_of(model)
    what, behind = row_inputs(model, tokens, adapters.acting() if adapters else None)
    return model(**what, use_cache=False).logits[:, behind:]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token prediction."""
    return F.cross_entropy(logits_of(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.fixture
def loss(tokens: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: loss_of(model, tokens)


@pytest.fixture
def logits(tokens: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(model, tokens)

    return run


@pytest.fixture
def train(tokens: torch.Tensor) -> Callable[[nn.Module, int], None]:
    """A few steps of next-token prediction on whatever is trained."""

    def run(model: nn.Module, steps: int = 2) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()

    return run
