"""The faster ways give the numbers of what they stand for: alone against finite differences and the model's own
modules, and in whole models with each of them on and off."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.test_attention import HEADS, dense, grown
from tests.model.test_families import FAMILIES, VOCABULARY, config_of, pair
from torch import nn

from trivium.forest import Example, TokenSequence, lay_out
from trivium.model import fast
from trivium.model.attention import Options
from trivium.model.fast import gated, norm, rotary, segments
from trivium.peft import LoRASettings
from trivium.peft.base import attach
from trivium.train.recompute import saved_bytes


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_gradient_of_a_norm(offset):
    x, weight = random(2, 5, 6), random(6, seed=1)
    assert torch.autograd.gradcheck(lambda x, w: norm.RMSNorm.apply(x, w, 1e-5, offset), (x, weight))
    plain = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (weight + offset)
    assert torch.allclose(norm.RMSNorm.apply(x, weight, 1e-5, offset), plain)


@pytest.mark.parametrize("activation", gated.ACTIVATIONS, ids=["silu", "gelu tanh", "gelu"])
def test_the_gradient_of_a_gated_unit(activation):
    assert torch.autograd.gradcheck(
        lambda gate, up: gated.Gated.apply(gate, up, activation), (random(4, 5), random(4, 5, seed=1))
    )


def test_the_gradient_of_a_rotary_embedding():
    angles = random(1, 1, 5, 8).detach()  # the halves of a real one are alike; here they are not, which is harder
    cos, sin = angles.cos(), angles.sin()
    assert torch.autograd.gradcheck(lambda x: rotary.Rotary.apply(x, cos, sin), (random(1, 3, 5, 8, seed=1),))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), heads=st.sampled_from(sorted(HEADS)), scale=st.sampled_from([None, 0.7]))
def test_attention_by_ranges_follows_each_path(seed, heads, scale):
    forest = grown(seed)
    queries, keys = HEADS[heads]
    length = len(forest.tokens)
    q, k, v = (
        torch.randn(1, n, length, 8, generator=torch.Generator().manual_seed(seed + i)).requires_grad_()
        for i, n in enumerate((queries, keys, keys))
    )
    found = segments.attend(q, k, v, segments.calls_of(forest), scale)
    expected = dense(q, k, v, forest, Options(scaling=scale))
    assert torch.allclose(found, expected, atol=2e-6)
    told = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    grads, wanted = (torch.autograd.grad((told * out).sum(), (q, k, v)) for out in (found, expected))
    for ours, theirs in zip(grads, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_segment_is_two_calls_at_most():
    prompt, system = np.arange(40), np.arange(60, 90)
    rows = [np.concatenate([system, prompt, np.full(5, n)]) for n in (1, 2, 3)] + [np.concatenate([system, [7, 8]])]
    forest = lay_out([Example(tuple(TokenSequence(r, np.ones(len(r), np.float32)) for r in rows))])
    calls = segments.calls_of(forest)
    assert len(forest.segments) == 6
    assert len(calls) == 6 + 2, "both inner segments are seen by all that hangs under them at once"


# --- in models


@pytest.fixture
def examples():
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, VOCABULARY, n) for n in (30, 9, 21)]
    rows.append(np.concatenate([rows[0][:20], rng.integers(0, VOCABULARY, 8)]))
    return [Example((TokenSequence(r, rng.choice([0.0, 1.0], len(r)).astype(np.float32)),)) for r in rows]


def values_and_gradients(model, examples):
    forest = lay_out(examples)
    with model.laid_out("forest"):
        found = model.logprob(forest)
        trained = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}
        mixture = torch.cos(torch.arange(len(found)))
        grads = torch.autograd.grad((mixture * found).sum(), list(trained.values()), allow_unused=True)
    return found.detach(), {n: g for n, g in zip(trained, grads, strict=True) if g is not None}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", fast.ALL)
def test_each_way_on_and_off(name, family, method, examples):
    if name == "linear" and method == "full":
        pytest.skip("only a LoRA has that way")
    model, _ = pair(config_of(family))
    if method == "lora":
        attach(model.hf, LoRASettings(r=4), seed=0)
        for n, p in model.hf.named_parameters():
            if n.endswith("lora_B"):
                nn.init.normal_(p, std=0.1)
    expected, gradients = values_and_gradients(model, examples)
    with fast.without(name):
        found, others = values_and_gradients(model, examples)
    assert torch.allclose(found, expected, atol=1e-5)
    assert others.keys() == gradients.keys()
    scale = max(float(g.abs().max()) for g in gradients.values())
    for n, gradient in gradients.items():
        assert float((others[n] - gradient).abs().max()) < 1e-4 * scale, n


def kinds_changed(family: str) -> list[str]:
    model, _ = pair(config_of(family))
    with model.laid_out("forest"):
        return sorted(type(m).__name__ for m in model.hf.modules() if "forward" in vars(m))


def test_which_modules_are_taken_for_what_they_are():
    assert kinds_changed("llama") == ["LlamaMLP"] * 2 + ["LlamaRMSNorm"] * 5
    assert kinds_changed("gemma2") == ["Gemma2MLP"] * 2 + ["Gemma2RMSNorm"] * 9, "its norms have an offset of 1"
    assert kinds_changed("gpt2") == [], "it has other norms and other MLPs"


def test_a_class_that_only_looks_like_a_norm_keeps_its_own_forward():
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight

    model = nn.Sequential(LlamaRMSNorm())
    paths = fast.Paths(model)
    paths.install()
    assert "forward" not in vars(model[0])
    paths.remove()


def test_nothing_stays_behind():
    model, _ = pair(config_of("llama"))
    attach(model.hf, LoRASettings(r=2), seed=0)
    file = sys.modules["transformers.models.llama.modeling_llama"]
    own = file.apply_rotary_pos_emb
    with model.laid_out("forest"):
        assert file.apply_rotary_pos_emb is not own
        with model.laid_out("single"):  # the unmodified model, to compare with
            assert file.apply_rotary_pos_emb is own
            assert not any("forward" in vars(m) for m in model.hf.modules())
        assert file.apply_rotary_pos_emb is not own
    assert file.apply_rotary_pos_emb is own
    assert not any("forward" in vars(m) for m in model.hf.modules())


def test_it_is_not_taken_in_another_dtype(examples):
    model, _ = pair(config_of("llama"))
    assert fast.taken("norm", torch.zeros(1))
    assert not fast.taken("norm", torch.zeros(1, dtype=torch.bfloat16))
    model.dtype = torch.bfloat16
    with torch.no_grad(), model.laid_out("forest"):
        found = model.logprob(lay_out(examples))
        with fast.without():
            assert torch.equal(model.logprob(lay_out(examples)), found)


def test_the_widest_tensor_of_a_layer_is_not_kept(examples):
    model, _ = pair(config_of("llama"))
    attach(model.hf, LoRASettings(r=2), seed=0)
    forest = lay_out(examples)

    def run() -> torch.Tensor:
        return model.logprob(forest)

    with model.laid_out("forest"):
        lean = saved_bytes(run, model.hf.parameters())
        with gated.kept_as_it_is():
            more = saved_bytes(run, model.hf.parameters())
    inner = len(forest.tokens) * model.config.intermediate_size * 4
    assert more - lean >= 2 * inner, "of each of two layers"
