"""Bottleneck adapters against their formula, written out."""

from __future__ import annotations

import copy

import pytest
import torch

from trivium.peft import BottleneckSettings
from trivium.peft.base import attach, deltas, state
from trivium.peft.bottleneck import Bottleneck

ACTIVATION = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATION)
def test_the_formula(name):
    adapter = Bottleneck(6, BottleneckSettings(r=3, non_linearity=name))
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape)
    h = torch.randn(2, 5, 6)
    f = ACTIVATION[name]
    expected = h + f(h @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(adapter((), h), expected)


def test_only_the_first_element_of_a_tuple_changes():
    adapter = Bottleneck(6, BottleneckSettings(r=3))
    adapter.reset(torch.Generator())
    adapter.up_bias.data.fill_(1)
    weights, h = object(), torch.zeros(1, 6)
    changed, other = adapter((), (h, weights))
    assert changed.tolist() == [[1.0] * 6]
    assert other is weights


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
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
            return hidden + adapter(f"{name}.mlp", layer.mlp(layer.post_attention_layernorm(hidden)))

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
