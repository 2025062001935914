"""Hidden states and the output embedding into one log-probability per entry, never holding the full logits.

Shapes:  K entries,  D width,  V vocabulary,  C entries in a chunk.

A log-probability is one number per entry, so its gradient with respect to the hidden state is one vector per entry,
d logprob / d h = (onehot(target) - softmax(logits)) W, known in the forward pass. With a frozen head it is stored
([K, D], small) and the backward pass costs nothing; with a trained head the logits of each chunk are computed again,
where there are several.

Cost: 2 V D K multiply-adds per product; two products with a frozen head, four with a trained one (three in one chunk).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.virtual import NEW_HEADS, Adapters, adapters_of, same_again

# A chunk's float32 logits take about this many bytes.
CHUNK_BYTES = 32 * 2**20


class Readout(nn.Module):
    """Owns the head: weight and bias, the scale and the soft cap on the logits.

    ``head`` is any module from ``[C, D]`` to logits ``[C, V]``. A plain linear layer takes the fast path; anything
    else (an adapter hangs on it) is recomputed chunk by chunk through its own forward.
    """

    def __init__(
        self,
        head: nn.Module,
        scale: float = 1.0,
        softcap: float | None = None,
        adapters: Callable[[], Adapters | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.head = head
        self.adapters = adapters
        self.scale = scale
        self.softcap = softcap

    @property
    def plain(self) -> bool:
        return type(self.head) is nn.Linear and not self.head._forward_hooks and not list(self.head.children())

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """``hidden [K, D]``, ``target [K]`` -> log-probabilities ``[K]`` in float32."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            if not self.plain:
                return self._through_head(hidden.to(dtype), target)
            weight, bias = self.head.weight, self.head.bias
            return _LogProb.apply(hidden.to(dtype), weight, bias, target, self.scale, self.softcap)

    def _through_head(self, hidden: Tensor, target: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        def chunk(h: Tensor, t: Tensor) -> Tensor:
            logits = _capped(self.head(h).float() * self.scale, self.softcap)
            return logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1)

        weight = getattr(self.head, "weight", None)
        size = _chunk_size(len(weight) if isinstance(weight, Tensor) else 2**15)
        pairs = zip(hidden.split(size), target.split(size), strict=True)
        again = partial(same_again, self.adapters())
        return torch.cat([checkpoint(chunk, h, t, use_reentrant=False, context_fn=again) for h, t in pairs])


class RewardReadout(nn.Module):
    """The readout of a reward model: ``hidden [K, D]`` -> rewards ``[K]`` in float32; what an entry targets is nothing
    to it."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            weight = self.score.get_parameter("weight")
            found: Tensor = self.score(hidden.to(weight.dtype))
        return found[:, 0].float()


def readout_of(model: Any) -> Readout | RewardReadout:
    """The readout of a `transformers` causal model, with the logit scaling that its configuration declares; or of a
    reward model.

    Granite divides the logits by ``logits_scaling``, Cohere multiplies by ``logit_scale``, Gemma and others cap them
    at ``final_logit_softcapping``. What a configuration does not declare, the proof before training finds.
    """
    if getattr(model, NEW_HEADS, ()):
        return RewardReadout(model.score)
    config = model.config.get_text_config()
    scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0) * (getattr(config, "logit_scale", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Readout(model.get_output_embeddings(), scale, softcap, partial(adapters_of, model))


def _chunk_size(vocabulary: int) -> int:
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _LogProb(torch.autograd.Function):
    """log softmax(cap(scale * (h W^T + b)))[target], chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        ctx.scale, ctx.cap = scale, cap
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        chunks = _chunks(len(target), len(weight))
        keeps_miss = trains_head and len(chunks) == 1  # one chunk is kept as it is, and not computed again
        keep = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not trains_head else None
        logprob = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        used, used_bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        ctx.miss = None  # gone as soon as the backward pass begins, and so no part of what a layer is said to keep
        for at in chunks:
            logits = _logits(hidden[at], used, used_bias, scale, cap)
            logprob[at], miss = _miss(logits, target[at], cap if keep is not None or keeps_miss else None)
            if keep is not None:
                keep[at] = (miss.to(hidden.dtype) @ used).mul_(-scale)
            elif keeps_miss:
                ctx.miss = miss
        ctx.save_for_backward(keep if keep is not None else hidden, weight, bias, target)
        return logprob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if not need_weight and not need_bias:
            return grad[:, None].to(hidden.dtype) * hidden, None, None, None, None, None
        used, used_bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        for at in _chunks(len(target), len(weight)):
            miss, ctx.miss = ctx.miss, None
            if miss is None:
                _, miss = _miss(_logits(hidden[at], used, used_bias, ctx.scale, ctx.cap), target[at], ctx.cap)
            outer = grad[at, None] * -ctx.scale
            if grad_bias is not None:
                grad_bias.addmv_(miss.t(), outer[:, 0])
            if grad_weight is not None:
                grad_weight.addmm_(miss.t(), hidden[at].float() * outer)
            if grad_hidden is not None:
                grad_hidden[at] = (miss.to(hidden.dtype) @ used).mul_(outer)
        cast = [g if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
        return grad_hidden, cast[0], cast[1], None, None, None


def _chunks(entries: int, vocabulary: int) -> list[slice]:
    size = _chunk_size(vocabulary)
    return [slice(start, min(start + size, entries)) for start in range(0, entries, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """``[C, D]`` -> ``[C, V]`` in float32, scaled and capped."""
    logits = F.linear(hidden, weight, bias).float()
    return _capped(logits if scale == 1.0 else logits.mul_(scale), cap)


def _miss(logits: Tensor, target: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """The log-probabilities ``[C]``, and by how much the shares miss the target, softmax(logits) - onehot(target)
    ``[C, V]``: what the negative log-probability's gradient is before the cap. It takes the place of ``logits``.

    Written out, log-sum-exp and softmax are eight passes over the logits and twice their memory; this is three.
    """
    slope = None if cap is None else (logits / cap).square_().neg_().add_(1)
    picked, largest = logits.gather(1, target[:, None])[:, 0], logits.amax(1)
    shares = torch.softmax(logits, 1, out=logits)
    logprob = picked - (largest - shares.amax(1).log())  # the largest share is 1 / V at least: its logarithm is exact
    miss = shares.scatter_add_(1, target[:, None], torch.full_like(picked, -1)[:, None])
    return logprob, miss if slope is None else miss.mul_(slope)
