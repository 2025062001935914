"""Virtual tokens: what a prompt or a prefix puts before sequences; and adapters by tree, as the batch sees them.

A model that carries adapters says so by one attribute, `ADAPTERS`: an object of the protocol `Adapters`. The model's
room reads it and knows no method; the methods' room fills it and knows no layout.

In a forest virtual tokens are places on the line like any other: the ancestor of every tree that has them (design
idea 1). What stands there is not looked up: a prompt gives its embeddings, a prefix the keys and values of each layer.

Shapes:  T tokens on the line,  P virtual tokens,  D width,  G key/value heads,  H head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trivium.forest import Forest, Segment

if TYPE_CHECKING:
    pass

ADAPTERS = "trivium_adapters"

# Another attribute: the names of modules that the model has new, and that are trained whole beside any adapter.
NEW_HEADS = "trivium_new_heads"


@dataclass(frozen=True, eq=False)
class Virtual:
    """The virtual tokens of one adapter: embeddings ``[P, D]``, or each layer's keys and values ``[G, P, H]``."""

    length: int
    embeddings: Tensor | None = None
    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()


class Span(NamedTuple):
    """Places ``[start, stop)`` of a line, whose trees are under one adapter (None: under none)."""

    adapter: str | None
    start: int
    stop: int


class Adapters(Protocol):
    """What a model carries. ``by_span`` and ``only`` hold for the length of a block."""

    def switch(self, active: Mapping[str, float], averaged: bool = False) -> None:
        """From now on these act, in this order; ``averaged``: their changes are weighted and added."""

    def virtual(self, adapter: str | None) -> Virtual | None:
        """The virtual tokens of one adapter."""

    def acting(self) -> Virtual | None:
        """Those of whatever acts now."""

    def together(self, model: Any, on: bool) -> None:
        """From now on (or no longer) what acts on a module may be computed along with it."""

    def by_span(self, spans: Sequence[Span]) -> AbstractContextManager[None]:
        """Each span of the line under its own adapter."""

    def only(self, adapter: str | None) -> AbstractContextManager[None]:
        """One adapter acts, or none."""

    def as_now(self) -> AbstractContextManager[None]:
        """What acts at the time of this call will act within the block."""


def adapters_of(model: Any) -> Adapters | None:
    """What a model carries, if anything."""
    found: Adapters | None = getattr(model, ADAPTERS, None)
    return found


def same_again(adapters: Adapters | None) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `checkpoint`: what is computed again in the backward pass is under the adapters that it was under before."""
    return nullcontext(), nullcontext() if adapters is None else adapters.as_now()


def with_places(forest: Forest, groups: Iterable[tuple[int, int]]) -> tuple[Forest, list[int]]:
    """The forest with P places before each group of trees, as the root of them all; and where each group begins now.

    ``groups`` are (tokens, P), in order, and cover the line. New places hold token 0.
    """
    device = forest.tokens.device
    tokens, ends, positions, starts = [], [], [], []
    segments: list[Segment] = []
    moved = torch.zeros(len(forest.tokens), dtype=torch.long, device=device)
    numbers: dict[int, int] = {-1: -1}  # of the segments, before and now
    start = added = 0
    for count, length in groups:
        stop = start + count
        own = torch.arange(length, device=device)
        starts.append(start + added)
        root = len(segments) if length else -1
        if length:
            segments.append(Segment(start + added, length, 0, -1))
        added += length
        tokens += [torch.zeros_like(own), forest.tokens[start:stop]]
        positions += [own, forest.position[start:stop] + length]
        ends += [torch.full_like(own, stop + added), forest.subtree_end[start:stop] + added]
        moved[start:stop] = added
        for number, s in enumerate(forest.segments):
            if start <= s.start < stop:
                parent = root if s.parent < 0 else numbers[s.parent]
                numbers[number] = len(segments)
                segments.append(Segment(s.start + added, s.length, s.depth + length, parent))
        start = stop
    changed = replace(
        forest,
        tokens=torch.cat(tokens),
        subtree_end=torch.cat(ends),
        position=torch.cat(positions),
        source=forest.source + moved[forest.source],
        segments=tuple(segments),
    )
    return changed, starts
