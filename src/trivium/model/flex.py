"""Forest attention on CUDA: the rule as a FlexAttention mask, its block mask built once per batch and window.

The line is filled to a fixed length (`layout.filled`) so that few shapes are ever compiled.

Shapes:  T tokens,  H query heads,  G key/value heads,  D head width.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trivium.model.attention import Options, Plan


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def block_mask(plan: Plan, window: int | None) -> Any:
    """The block mask of a plan; one per window, shared by all layers that have it."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in plan.blocks:
        end, depth = plan.forest.subtree_end, plan.forest.position

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (j <= i) & (i < end[j])
            return seen if window is None else seen & (depth[i] - depth[j] < window)

        length = len(end)
        compiled = end.is_cuda  # building the full T x T mask first is what makes long lines run out of memory
        plan.blocks[window] = create_block_mask(sees, None, None, length, length, end.device, _compile=compiled)
    return plan.blocks[window]


def flex_forest_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: Options) -> Tensor:
    """``query [1, H, T, D]``, ``key, value [1, G, T, D]`` -> ``[1, T, H, D]``."""
    if options.dropout:
        raise NotImplementedError("FlexAttention has no dropout")
    window = options.window if options.window and options.window < plan.forest.longest else None
    softcap, sinks = options.softcap, options.sinks

    def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    from torch.nn.attention.flex_attention import AuxRequest

    out = _flex(query.is_cuda)(
        query, key, value,
        score_mod=cap if softcap is not None else None,
        block_mask=block_mask(plan, window),
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if sinks is not None else None,
    )  # fmt: skip
    if sinks is not None:
        # a sink is one more logit without a value: it only scales the weights of the rest
        out, aux = out
        out = out * torch.sigmoid(aux.lse - sinks.reshape(1, -1, 1).to(aux.lse.dtype))[..., None].to(out.dtype)
    return out.transpose(1, 2)
