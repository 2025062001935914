"""A frozen linear layer whose weight is held in 4 or 8 bit, over `bitsandbytes.functional` (QLoRA's base).

    nf4     4-bit NormalFloat with double quantisation (Dettmers et al. 2023, "QLoRA", section 3): blocks of 64 weights
            share a scale, blocks of 256 scales share another; 4.127 bits per weight
    int8    rows scaled to their largest weight (Dettmers et al. 2022, "LLM.int8()", section 2): 8 bits and 32 per row

The weight is unpacked for each product and thrown away, forward and backward: what is kept for the backward pass is
the module alone. Cost: the unpacking, some 4% of a product with 1,024 tokens on a CPU.

Shapes:  N tokens (all leading dimensions),  in, out: the layer's.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.errors import ModelError

BLOCK = 64  # weights that share a scale


def functional() -> Any:
    """`bitsandbytes.functional`. Raises ModelError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that could be had besides
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ModelError("a quantised base needs bitsandbytes", 'pip install "trivium[qlora]"') from None


class Quantized(nn.Linear):
    """A frozen linear layer with a packed weight; to others it is the `nn.Linear` that it stands for."""

    def __init__(self, linear: nn.Module, how: str) -> None:
        from transformers.pytorch_utils import Conv1D  # here, as it takes seconds to import

        nn.Module.__init__(self)
        functions = functional()
        weight = linear.get_parameter("weight").detach()
        weight = weight.t().contiguous() if isinstance(linear, Conv1D) else weight
        self.out_features, self.in_features = weight.shape
        self.how, self.dtype = how, weight.dtype
        if how == "nf4":
            packed, state = functions.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
            parts = {"absmax": state.absmax, "code": state.code, "offset": state.offset,
                     "absmax2": state.state2.absmax, "code2": state.state2.code}  # fmt: skip
            self.block2 = state.state2.blocksize
        else:
            packed, scales, _ = functions.int8_vectorwise_quant(weight.to(torch.float16))
            parts = {"absmax": scales}
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias  # type: ignore[assignment]
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    def unpacked(self) -> Tensor:
        """The weight that it computes with, ``[out, in]``, in the dtype that it had."""
        functions = functional()
        parts = dict(self.named_buffers(recurse=False))
        if self.how == "int8":
            rows: Tensor = functions.int8_vectorwise_dequant(self.weight, parts["absmax"])
            return rows.to(self.dtype)
        scales = functions.QuantState(
            absmax=parts["absmax2"], code=parts["code2"], blocksize=self.block2, dtype=torch.float32
        )
        state = functions.QuantState(
            absmax=parts["absmax"], shape=torch.Size((self.out_features, self.in_features)), code=parts["code"],
            blocksize=BLOCK, quant_type="nf4", dtype=self.dtype, offset=parts["offset"], state2=scales,
        )  # fmt: skip
        found: Tensor = functions.dequantize_4bit(self.weight, state)
        return found

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        out: Tensor = _Product.apply(input, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def plain(self) -> nn.Linear:
        """The layer that computes the same with an ordinary weight."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(self.unpacked(), requires_grad=False)
        made.bias = self.bias
        return made


class _Product(torch.autograd.Function):
    """``x W^T`` with a weight that exists only while it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        weight = layer.unpacked()
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return (grad @ ctx.layer.unpacked().to(grad.dtype)).to(ctx.dtype), None


def quantize(model: nn.Module, names: Iterable[str], how: str) -> None:
    """Hold these linear modules of a frozen model in 4 or 8 bit, one after the other. Raises ModelError."""
    functional()
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, Quantized):
            model.set_submodule(name, Quantized(module, how))


def count(model: nn.Module) -> int:
    """Parameters of a model, tied ones counted once, packed ones as those that they stand for."""
    packed = sum(m.in_features * m.out_features - m.weight.numel() for m in model.modules() if isinstance(m, Quantized))
    return sum(p.numel() for p in model.parameters()) + packed


def quantized(model: nn.Module) -> str | None:
    """How the layers of a model are held: ``nf4``, ``int8``, or None: as they are."""
    return next((module.how for module in model.modules() if isinstance(module, Quantized)), None)


def unpack(model: nn.Module) -> None:
    """Give every quantised layer the ordinary weight that it has computed with."""
    for name in [name for name, module in model.named_modules() if isinstance(module, Quantized)]:
        layer = model.get_submodule(name)
        assert isinstance(layer, Quantized)
        plain = layer.plain()
        for own, child in layer.named_children():  # an adapter's hub moves along, and its hooks
            plain.add_module(own, child)
        plain._forward_hooks, plain._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
        plain._forward_hooks_with_kwargs = layer._forward_hooks_with_kwargs
        plain._forward_pre_hooks_with_kwargs = layer._forward_pre_hooks_with_kwargs
        plain._forward_hooks_always_called = layer._forward_hooks_always_called
        model.set_submodule(name, plain)
