"""Bottleneck adapters against their formula, written out."""

from __future__ import annotations

import copy

import pytest
import torch

from trivium.errors import ModelError, RecipeError
from trivium.peft import BottleneckSettings
from trivium.peft.base import attach, deltas, state
from trivium.peft.bottleneck import Bottleneck
from trivium.peft.kinds import CompacterSettings

ACTIVATION = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATION)
def test_the_formula(name):
    adapter = Bottleneck(6, 6, 3, BottleneckSettings(non_linearity=name))
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape)
    h = torch.randn(2, 5, 6)
    f = ACTIVATION[name]
    expected = h + f(h @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(adapter(adapter, h, h), expected)


def test_beside_the_block_by_its_formula():
    adapter = Bottleneck(4, 6, 3, BottleneckSettings(placement="parallel", scale=4.0, non_linearity="tanh"))
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape)
    x, h = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    narrow = torch.tanh(x @ adapter.down.T + adapter.down_bias)
    expected = h + 4 * (narrow @ adapter.up.T + adapter.up_bias)
    torch.testing.assert_close(adapter(adapter, x, h), expected)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_a_layer_with_adapters_written_out(tiny, logits, placement):
    """Llama's layer in full: each block's output passes its adapter before it is added to the residual stream."""
    model = tiny("llama")
    plain = copy.deepcopy(model)
    attach(model, BottleneckSettings(r=3, placement=placement, non_linearity="relu"), seed=0)
    for delta in deltas(model).values():
        for parameter in delta.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape)
    small = state(model)

    def adapter(name: str, h: torch.Tensor) -> torch.Tensor:
        if f"{name}.down" not in small:
            return h
        down, up = small[f"{name}.down"], small[f"{name}.up"]
        return h + torch.relu(h @ down.T + small[f"{name}.down_bias"]) @ up.T + small[f"{name}.up_bias"]

    for index, layer in enumerate(plain.model.layers):

        def forward(hidden, layer=layer, name=f"model.layers.{index}", **kwargs):
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
            hidden = hidden + adapter(f"{name}.self_attn", attended)
            normed = layer.post_attention_layernorm(hidden)
            if placement == "parallel":
                return hidden + layer.mlp(normed) + adapter(f"{name}.mlp", normed) - normed
            return hidden + adapter(f"{name}.mlp", layer.mlp(normed))

        layer.forward = forward
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_trained_norm_is_the_norm_with_other_weights(tiny, logits, kind):
    model = tiny(kind)
    plain = copy.deepcopy(model)
    attach(model, BottleneckSettings(r=3, layer_norms=True), seed=0)
    gains = {name: delta for name, delta in deltas(model).items() if hasattr(delta, "gain")}
    assert len(gains) == 4
    with torch.no_grad():
        for name, delta in gains.items():
            norm = plain.get_submodule(name)
            delta.gain.uniform_(0.5, 2)
            norm.weight.mul_(delta.gain)
            if kind == "gpt2":
                delta.shift.uniform_(-1, 1)
                norm.bias.mul_(delta.gain).add_(delta.shift)
            assert (delta.shift is None) == (kind == "llama")
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_adapterdrop_leaves_out_the_lowest_layers(tiny):
    names = attach(tiny("llama"), BottleneckSettings(r=3, skip_layers=1), seed=0).targets
    assert names == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    with pytest.raises(RecipeError, match="skip_layers is 2, and the model has 2 layers"):
        attach(tiny("llama"), BottleneckSettings(skip_layers=2), seed=0)


def test_nothing_runs_beside_a_part_of_an_mlp(tiny):
    with pytest.raises(ModelError, match="nothing can run beside it"):
        attach(tiny("opt"), BottleneckSettings(placement="parallel"), seed=0)


def test_compacter_is_its_kronecker_products(tiny):
    """Equations 4 and 5 with the products written out."""
    model = tiny("llama")
    attach(model, CompacterSettings(r=8, phm_dim=4, phm_rank=2), seed=0)
    delta = deltas(model)["model.layers.1.mlp"]
    for parameter in delta.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    rule = delta.rule.A

    def matrix(part):
        return sum(torch.kron(rule[i], part.s[i] @ part.t[i]) for i in range(4))  # [in, out]

    h = torch.randn(2, 5, 64)
    narrow = ACTIVATION["gelu"](h @ matrix(delta.down) + delta.down.bias)
    expected = h + narrow @ matrix(delta.up) + delta.up.bias
    torch.testing.assert_close(delta(delta, h, h), expected, rtol=1e-4, atol=1e-5)
    assert len({id(one.rule.A) for one in deltas(model).values()}) == 1
    with pytest.raises(RecipeError, match="phm_dim is 3, which does not divide the widths 64 and 8"):
        attach(tiny("llama"), CompacterSettings(r=8, phm_dim=3), seed=0)
