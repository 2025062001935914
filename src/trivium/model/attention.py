"""Forest attention: token i sees token j if and only if j <= i < subtree_end[j].

One function is registered with `transformers`' attention interface, so every model that uses the interface gets
it unchanged; the forest travels to it as the keyword argument ``forest``. On CUDA the rule is a FlexAttention
block mask (`flex.py`); elsewhere each unbranched segment of the line attends to its ancestors' keys and its own,
one scaled-dot-product call per group of like segments. A segment without ancestors is an ordinary causal
sequence, and those of like length share one call under the causal flag, without any mask.

Shapes:  T tokens,  H query heads,  G key/value heads,  D head width,  B segments in one call,
         L their query length,  M their key length (ancestors and own).

Cost: the arithmetic of separate sequences less the shared parts; split, stack and cat are the only copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trivium.forest import Forest, Segment
from trivium.model import fast
from trivium.model.fast import segments
from trivium.virtual import Virtual

NAME = "trivium_forest"

# Segments share a call as long as filling them to one length costs at most this share of extra tokens.
MAX_FILL = 1.15


def register() -> None:
    """Make ``NAME`` known to `transformers`: the attention function, and a mask function that builds nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, forest_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class Call:
    """Segments that share one attention call, and how many ancestor tokens each has."""

    segments: tuple[int, ...]
    ancestors: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def rooted(self) -> bool:
        return not any(self.depths)


@dataclass(eq=False)
class Plan:
    """How a forest's attention is computed; made once per batch, read by every layer."""

    forest: Forest
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    blocks: dict[int | None, Any] = field(default_factory=dict)  # FlexAttention block masks, by window
    given: tuple[tuple[int, Virtual], ...] = ()  # places from which on keys and values are given, not computed

    @cached_property
    def ranges(self) -> list[segments.Call]:
        """The same as pieces of the line, which need no mask."""
        return segments.calls_of(self.forest)

    def by_range(self, options: Options) -> bool:
        """Whether the rule is all that a layer asks for."""
        windowed = options.window and options.window < self.forest.longest
        return not (windowed or options.dropout or options.softcap is not None or options.sinks is not None)

    @cached_property
    def calls(self) -> list[Call]:
        """The segments in groups: roots with roots, branches with branches, like lengths together."""
        segments = self.forest.segments
        groups: list[list[int]] = []
        for n in sorted(range(len(segments)), key=lambda n: (segments[n].depth > 0, _area(segments[n]))):
            together = [segments[m] for m in [*groups[-1], n]] if groups else []
            widest = max((s.depth + s.length for s in together), default=0) * max(
                (s.length for s in together), default=0
            )
            like = sum(map(_area, together)) * MAX_FILL >= widest * len(together)
            if together and like and (together[0].depth > 0) == (segments[n].depth > 0):
                groups[-1].append(n)
            else:
                groups.append([n])
        return [
            Call(
                tuple(group),
                tuple(tuple(self.forest.path(n)[:-1]) for n in group),
                tuple(segments[n].length for n in group),
                tuple(segments[n].depth for n in group),
            )
            for group in groups
        ]

    def mask(self, number: int, window: int | None) -> Tensor | None:
        """The boolean mask of call ``number``, ``[B, 1, L, M]``; None where the causal flag says it all."""
        call = self.calls[number]
        longest = max(d + n for d, n in zip(call.depths, call.lengths, strict=True))
        window = window if window and window < longest else None
        key = (number, window)
        if key not in self.masks:
            self.masks[key] = None if call.rooted and window is None else self._mask(call, longest, window)
        return self.masks[key]

    def _mask(self, call: Call, longest: int, window: int | None) -> Tensor:
        device = self.forest.tokens.device
        depth = torch.tensor(call.depths, device=device)[:, None] + torch.arange(max(call.lengths), device=device)
        behind = depth[:, None, :, None] - torch.arange(longest, device=device)  # how far back a key lies
        return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def _area(segment: Segment) -> int:
    """Scores that a segment computes: its queries times the keys on its path."""
    return (segment.depth + segment.length) * segment.length


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    forest: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over one line. ``query [1, H, T, D]``, ``key, value [1, G, T, D]`` -> ``[1, T, H, D]``.

    ``s_aux [H]`` are attention sinks (gpt-oss), ``softcap`` bounds the scores (Gemma 2), ``sliding_window`` counts
    in depth along a path. Raises NotImplementedError for what it does not know; the proof before training turns
    that into the padded fallback.
    """
    if forest is None or query.shape[0] != 1 or position_bias is not None:
        raise NotImplementedError("forest attention wants one line, its forest, and no position bias")
    for at, virtual in forest.given:
        keys, values = virtual.keys_values[module.layer_idx]  # type: ignore[index]
        key, value = (put(x, at, own, dim=2) for x, own in ((key, keys), (value, values)))
    options = Options(dropout, scaling, sliding_window, softcap, s_aux)
    if query.is_cuda:
        from trivium.model.flex import flex_forest_attention

        return flex_forest_attention(query, key, value, forest, options), None
    usual = query.shape[-1] == value.shape[-1] and query.shape[1] % key.shape[1] == 0
    if usual and forest.by_range(options) and fast.taken("attention", query, key, value):
        return segments.attend(query, key, value, forest.ranges, options.scaling), None
    return segment_attention(query, key, value, forest, options), None


def put(x: Tensor, at: int, own: Tensor, dim: int) -> Tensor:
    """``x`` with ``own`` (of its shape without the first dimension) at the places of ``dim`` from ``at`` on."""
    before, after = x.narrow(dim, 0, at), x.narrow(dim, at + own.shape[dim - 1], x.shape[dim] - at - own.shape[dim - 1])
    return torch.cat([before, own[None].to(x.dtype), after], dim)


@dataclass(frozen=True, eq=False)
class Options:
    """What a layer asks of its attention."""

    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def segment_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: Options) -> Tensor:
    """The rule, call by call. Shapes as in `forest_attention`."""
    lengths = [s.length for s in plan.forest.segments]
    q, k, v = (x[0].transpose(0, 1).split(lengths) for x in (query, key, value))
    out: list[Tensor] = [query] * len(lengths)
    for number, call in enumerate(plan.calls):

        def joined(parts: tuple[Tensor, ...], call: Call = call) -> list[Tensor]:
            pairs = zip(call.segments, call.ancestors, strict=True)
            return [torch.cat([parts[a] for a in above] + [parts[n]]) if above else parts[n] for n, above in pairs]

        result = _attend(
            _batch([q[n] for n in call.segments]), _batch(joined(k)), _batch(joined(v)),
            plan.mask(number, options.window), options,
        )  # fmt: skip
        for row, (n, length) in enumerate(zip(call.segments, call.lengths, strict=True)):
            out[n] = result[row, :, :length].transpose(0, 1)
    return torch.cat(out)[None]


def _batch(rows: list[Tensor]) -> Tensor:
    """Rows ``[n_b, H, D]`` -> ``[B, H, max n, D]``; the fill lies behind, where the causal rule hides it."""
    stacked = rows[0][None] if len(rows) == 1 else pad_sequence(rows, batch_first=True)
    return stacked.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """``q [B, H, L, D]``, ``k, v [B, G, M, D]``, ``mask [B, 1, L, M]`` (None: causal) -> ``[B, H, L, D]``."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=options.dropout, is_causal=mask is None, scale=options.scaling
        )
    scores = q @ k.transpose(-1, -2) * (options.scaling if options.scaling is not None else q.shape[-1] ** -0.5)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    if options.sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, options.dropout, training=options.dropout > 0) @ v
