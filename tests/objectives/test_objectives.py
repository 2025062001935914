"""Losses and their gradients against numbers worked by hand, torch and transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.load import wrap
from trivium.model.new import new_model
from trivium.objectives import objective
from trivium.objectives.base import per_sequence
from trivium.objectives.next_token import next_token_loss

VOCABULARY = 64


def tiny(seed: int = 0) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=VOCABULARY, initializer_range=0.2,
    )  # fmt: skip
    return new_model(config, seed).eval()


def wrapped(hf: nn.Module, tokenizer: Any = None) -> LanguageModel:
    return wrap(hf, tokenizer, "float32", torch.float32)


def row(tokens: list[int], first: int) -> TokenSequence:
    return TokenSequence(np.array(tokens), (np.arange(len(tokens)) >= first).astype(np.float32))


def synthetic(count: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    draw = lambda most: rng.integers(3, VOCABULARY, rng.integers(1, most)).tolist()  # noqa: E731
    return [(draw(40), draw(20), draw(20)) for _ in range(count)]


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], within: float) -> None:
    assert any(float(g.abs().max()) > 1e-3 for g in expected.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= within * max(1.0, float(expected[name].abs().max())), (
            name
        )


def taken(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters()}


# --- next token


def test_next_token_is_torchs_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(20, 9, requires_grad=True)
    target, weight = torch.randint(0, 9, (20,)), torch.rand(20)
    logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    found = next_token_loss(logprob, weight)
    each = nn.functional.cross_entropy(logits, target, reduction="none")
    assert torch.allclose(found, (each * weight).sum())
    ours = torch.autograd.grad(found, logits, retain_graph=True)[0]
    assert torch.allclose(ours, torch.autograd.grad((each * weight).sum(), logits)[0], atol=1e-6)


def test_next_token_weighs_by_token_weights():
    forest = lay_out([Example((TokenSequence(np.arange(5), np.array([9, 1, 0, 0.5, 2], np.float32)),))])
    goal = objective({"loss": "next_token"})
    assert goal.weight(forest) == 3.5  # the first token's weight counts nowhere: nothing predicts it
    logprob = torch.tensor([-1.0, -2.0, -3.0])
    assert float(goal.compute(logprob, forest, None).sum) == 1 * 1 + 0.5 * 2 + 2 * 3
    assert (goal.needs_reference, goal.at_start) == (False, None)


def test_supervised_fine_tuning_is_transformers_own_loss():
    """Loss and gradients with answers alone trained: labels of -100 on the prompts, rows padded."""
    hf = tiny()
    twin = copy.deepcopy(hf)
    rows = [(p + c, len(p)) for p, c, _ in synthetic(5)]
    forest = lay_out([Example((row(tokens, first),)) for tokens, first in rows])
    goal, mine = objective({"loss": "next_token"}), wrapped(hf)
    with mine.laid_out("forest"):
        loss = goal.compute(mine.logprob(forest), forest, None).sum / goal.weight(forest)
        loss.backward()
    longest = max(len(t) for t, _ in rows)
    ids = torch.tensor([t + [0] * (longest - len(t)) for t, _ in rows])
    seen = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t, _ in rows])
    labels = torch.tensor([[-100] * first + t[first:] + [-100] * (longest - len(t)) for t, first in rows])
    expected = twin(input_ids=ids, attention_mask=seen, labels=labels).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_gradients(hf, taken(twin), 1e-5)


def test_sums_per_sequence_with_some_empty():
    forest = lay_out([Example((row([1, 2, 3], 1), row([4], 0), row([5, 6], 1)))])
    assert per_sequence(torch.tensor([1.0, 2.0, 4.0]), forest).tolist() == [3.0, 0.0, 4.0]
