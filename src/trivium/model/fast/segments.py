"""Forest attention on the CPU without a copy of a key and without a mask.

A segment's queries see the keys of its own under the causal flag, and those of each ancestor in full. All that hangs
under a segment lies behind it in one piece, so that a segment is two calls at most: its own, and one in which the
queries of all its descendants see its keys. What a query has from several calls is merged by log-sum-exp (Dao et al.
2022, "FlashAttention", section 3.1):

    softmax([a, b]) [v; w] = (e^lse(a) out(a) + e^lse(b) out(b)) / (e^lse(a) + e^lse(b))

and the backward pass of one call, given the merged output and log-sum-exp, is exactly its part of the whole.

Shapes:  T tokens,  H query heads,  G key/value heads,  D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trivium.forest import Forest

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Call = tuple[int, int, int, int]  # queries from, up to; keys from, up to. The same ones: under the causal flag


def calls_of(forest: Forest) -> list[Call]:
    """What is to be computed, each segment's own keys before those of its ancestors are merged in."""
    starts = [s.start for s in forest.segments]
    ends = forest.subtree_end[torch.tensor(starts, dtype=torch.long)].tolist()
    stops = [s.start + s.length for s in forest.segments]
    own = [(start, stop, start, stop) for start, stop in zip(starts, stops, strict=True)]
    above = [(stop, end, start, stop) for start, stop, end in zip(starts, stops, ends, strict=True) if end > stop]
    return own + above


def attend(query: Tensor, key: Tensor, value: Tensor, calls: list[Call], scale: float | None) -> Tensor:
    """``query [1, H, T, D]``, ``key, value [1, G, T, D]`` -> ``[1, T, H, D]``, by the calls of a forest."""
    out: Tensor = _Attention.apply(query, key, value, calls, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: list[Call], scale: float | None) -> Tensor:
        line = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])
        out, lse = line.transpose(1, 2), q.new_empty(1, q.shape[2], q.shape[1]).transpose(1, 2)
        for a, b, c, d in calls:
            own = (a, b) == (c, d)
            part, part_lse = _forward(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], 0.0, own, scale=scale)
            if own:
                out[:, :, a:b], lse[:, :, a:b] = part, part_lse
            else:
                _merge(out[:, :, a:b], lse[:, :, a:b], part, part_lse)
        ctx.calls, ctx.scale = calls, scale
        ctx.save_for_backward(q, k, v, line, lse)
        return line

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, line, lse = ctx.saved_tensors
        out, grad = line.transpose(1, 2), grad.transpose(1, 2)
        # laid out as the line is, so that what was a view of a product's output is one again
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        for a, b, c, d in ctx.calls:
            own = (a, b) == (c, d)
            parts = _backward(
                grad[:, :, a:b], q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], out[:, :, a:b], lse[:, :, a:b], 0.0, own,
                scale=ctx.scale,
            )  # fmt: skip
            for whole, part, start, stop in zip((dq, dk, dv), parts, (a, c, c), (b, d, d), strict=True):
                # each token's own segment comes first
                at = whole[:, :, start:stop]
                at.copy_(part) if own else at.add_(part)
        return dq, dk, dv, None, None


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge another call's result into ``out [1, H, L, D]`` and ``lse [1, H, L]``, in place."""
    share = torch.sigmoid(part_lse - lse)  # of the other one
    lse.copy_(torch.logaddexp(lse, part_lse))
    out.lerp_(part, share[..., None])
