"""A quantised layer against bitsandbytes itself, and what it keeps in memory."""

from __future__ import annotations

import copy

import bitsandbytes
import bitsandbytes.functional as functions
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trivium.errors import ModelError
from trivium.model import quantized
from trivium.model.quantized import Quantized, quantize, unpack
from trivium.train.recompute import saved_bytes


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(192, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_own(linear, dtype):
    linear.to(dtype)
    packed, state = functions.quantize_4bit(linear.weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    layer = Quantized(linear, "nf4")
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer.unpacked(), functions.dequantize_4bit(packed, state))
    assert layer.unpacked().dtype == dtype
    theirs = bitsandbytes.nn.Linear4bit(192, 128, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")
    x = torch.randn(5, 192, dtype=dtype)
    torch.testing.assert_close(layer(x), theirs(x), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_int8_is_bitsandbytes_own(linear):
    layer = Quantized(linear, "int8")
    rows, scales, _ = functions.int8_vectorwise_quant(linear.weight.half())
    assert torch.equal(layer.unpacked(), functions.int8_vectorwise_dequant(rows, scales))
    assert (layer.unpacked() - linear.weight).abs().max() <= linear.weight.abs().max() / 127 + 1e-3


def test_bits_per_weight():
    """4 bits, and 0.127 for the scales: 8 bits for 64 weights, 32 for 64 * 256 (and a constant map)."""
    layer = Quantized(nn.Linear(4096, 1024, bias=False), "nf4")
    parts = {name: tensor.nbytes for name, tensor in layer.named_buffers() if not name.startswith(("code", "offset"))}
    weights = 4096 * 1024
    assert layer.weight.nbytes * 8 / weights == 4
    assert sum(parts.values()) * 8 / weights == pytest.approx(0.127, abs=1e-3)
    eight = Quantized(nn.Linear(4096, 1024, bias=False), "int8")
    assert eight.weight.nbytes * 8 / weights == 8


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_gradient_is_that_of_the_weight_it_stands_for(linear, how):
    layer = Quantized(linear, how)
    plain = copy.deepcopy(layer).plain()
    x, y = (torch.randn(3, 7, 192, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    layer(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert layer.weight.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(x), rtol=3e-2, atol=3e-2)


def test_nothing_is_kept_for_the_backward_pass(linear):
    layer = Quantized(linear, "nf4")
    x = torch.randn(7, 192, requires_grad=True)
    assert saved_bytes(lambda: layer(x * 2), layer.parameters()) < linear.weight.nbytes / 8


def test_a_layer_of_gpt2(linear):
    conv = Conv1D(128, 192)
    layer = Quantized(conv, "int8")
    x = torch.randn(2, 192)
    torch.testing.assert_close(layer(x), conv(x), rtol=5e-2, atol=5e-3)
    assert (layer.in_features, layer.out_features) == (192, 128)


def test_packed_and_unpacked(linear):
    model = nn.ModuleDict({"a": copy.deepcopy(linear), "b": copy.deepcopy(linear)})
    quantize(model, ["a"], "nf4")
    assert quantized.quantized(model) == "nf4"
    assert quantized.count(model) == 2 * (192 * 128 + 128)
    x = torch.randn(2, 192)
    before = model["a"](x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin["a"](x), before)
    unpack(model)
    assert quantized.quantized(model) is None
    assert type(model["a"]) is nn.Linear
    torch.testing.assert_close(model["a"](x), before)
    assert torch.equal(model["b"].weight, linear.weight)


def test_without_bitsandbytes_it_says_what_to_install(linear, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match="needs bitsandbytes") as caught:
        Quantized(linear, "nf4")
    assert 'pip install "trivium[qlora]"' in caught.value.remedy
