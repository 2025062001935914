"""From a forest to the hidden states its loss entries need, in one of three ways.

    forest   the whole line in one pass, shared beginnings once (what `attention.py` makes possible)
    rows     one right-padded row per sequence, rows of like length together: for models in which something besides
             attention mixes positions (linear attention, convolutions), or that ignore the forest
    single   one row at a time: for models in which rows of different lengths influence each other

All three give the same numbers; the proof before training picks the first that does. It proves ``rows`` with all rows
``together`` in one padded batch, as training may put any of them side by side.

Shapes:  T tokens on the line,  K entries,  S sequences,  B rows,  L their length,  D width.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.errors import ModelError
from trivium.forest import Forest
from trivium.model.attention import Plan, put
from trivium.virtual import Adapters, Span, Virtual, with_places

LAYOUTS = ("forest", "rows", "single")

Rows = list[tuple[np.ndarray, np.ndarray]]


def hidden_states(body: Any, forest: Forest, layout: str, fill_to: int | None, adapters: Adapters | None) -> Tensor:
    """``hidden[source]``, ``[K, D]``: the state behind each entry. ``body`` is the model without its head.

    ``adapters`` are what the model carries: their virtual tokens are put before what they act on, and where trees of
    the forest name adapters, each is computed under its own.
    """
    if forest.adapters and adapters is None:
        raise ModelError("the trees of a batch name adapters, and the model has none", "load the adapters first")
    if layout == "forest":
        return _line_states(body, forest, fill_to, adapters)
    budget = {"rows": len(forest.tokens), "together": sys.maxsize, "single": 0}[layout]
    return _row_states(body, forest, budget, adapters)


def _line_states(body: Any, forest: Forest, fill_to: int | None, adapters: Adapters | None) -> Tensor:
    """The states of the whole line in one pass."""
    named = forest.adapters or ((None, len(forest.tokens)),)
    virtual = [virtual_of(forest, adapters, name) for name, _ in named]
    sizes = [v.length if v else 0 for v in virtual]
    at = [0, *accumulate(tokens for _, tokens in named[:-1])]
    if any(sizes):
        forest, at = with_places(forest, zip((tokens for _, tokens in named), sizes, strict=True))
    line = filled(forest, fill_to) if fill_to else forest
    what: dict[str, Tensor] = {"input_ids": line.tokens[None]}
    with _by_tree(forest, adapters, at, len(line.tokens)):
        embeddings = [(a, v.embeddings) for a, v in zip(at, virtual, strict=True) if v and v.embeddings is not None]
        if embeddings:
            what = {"inputs_embeds": body.get_input_embeddings()(line.tokens[None])}
            for a, own in embeddings:
                what["inputs_embeds"] = put(what["inputs_embeds"], a, own, dim=1)
        given = tuple((a, v) for a, v in zip(at, virtual, strict=True) if v and v.keys_values)
        out = body(**what, position_ids=line.position[None], use_cache=False, forest=Plan(line, given=given))
    states: Tensor = out.last_hidden_state[0].index_select(0, forest.source)
    return states


def virtual_of(forest: Forest, adapters: Adapters | None, name: str | None) -> Virtual | None:
    """The virtual tokens before the trees of one adapter, or of whatever acts where trees name none."""
    if adapters is None:
        return None
    return adapters.virtual(name) if forest.adapters else adapters.acting()


def _by_tree(
    forest: Forest, adapters: Adapters | None, starts: list[int], length: int
) -> contextlib.AbstractContextManager[None]:
    """Each span of the line under its own adapter; the last one takes what the line is filled with."""
    if not forest.adapters or adapters is None:
        return contextlib.nullcontext()
    bounds = pairwise([*starts, length])
    return adapters.by_span([Span(name, a, b) for (name, _), (a, b) in zip(forest.adapters, bounds, strict=True)])


def filled(forest: Forest, multiple: int) -> Forest:
    """The line filled up to a multiple of ``multiple`` tokens with a tail in which each token sees only itself."""
    length = len(forest.tokens)
    tail = -length % multiple
    if not tail:
        return forest
    ends = torch.arange(length + 1, length + tail + 1, device=forest.tokens.device)
    changed = {
        "tokens": F.pad(forest.tokens, (0, tail)),
        "position": F.pad(forest.position, (0, tail)),
        "subtree_end": torch.cat([forest.subtree_end, ends]),
    }
    return Forest(**{**{f: getattr(forest, f) for f in forest.__dataclass_fields__}, **changed})


def sequence_rows(forest: Forest) -> Rows:
    """Each sequence by itself: (its places on the line, the places in its row that have an entry)."""
    source = forest.source.cpu().numpy()
    sequence = forest.sequence.cpu().numpy()
    starts = np.array([s.start for s in forest.segments])
    bounds = np.searchsorted(sequence, np.arange(forest.sequences + 1))
    depth = forest.position.cpu().numpy()
    rows = []
    for first, last in pairwise(bounds.tolist()):
        if first == last:
            rows.append((np.empty(0, np.int64), np.empty(0, np.int64)))
            continue
        leaf = source[last - 1]
        path = [forest.segments[n] for n in forest.path(int(np.searchsorted(starts, leaf, "right")) - 1)]
        places = np.concatenate([np.arange(s.start, s.start + s.length) for s in path])
        rows.append((places[places <= leaf], depth[source[first:last]]))
    return rows


def _row_states(body: Any, forest: Forest, budget: int, adapters: Adapters | None) -> Tensor:
    """The states of padded rows, as many rows at once as make ``budget`` tokens, or one."""
    rows = sequence_rows(forest)
    states: dict[int, Tensor] = {}
    for name, numbers in by_adapter(forest, rows):
        with adapters.only(name) if forest.adapters and adapters else contextlib.nullcontext():
            virtual = virtual_of(forest, adapters, name)
            for group in _groups(rows, sorted(numbers, key=lambda n: len(rows[n][0])), budget):
                ids = [forest.tokens[torch.from_numpy(rows[n][0]).to(forest.tokens.device)] for n in group]
                padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
                what, behind = row_inputs(body, padded, virtual)
                out = body(**what, use_cache=False).last_hidden_state[:, behind:]
                for row, n in enumerate(group):
                    states[n] = out[row, torch.from_numpy(rows[n][1]).to(out.device)]
    return torch.cat([states[n] for n in sorted(states)])


def _groups(rows: Rows, order: list[int], budget: int) -> Iterator[list[int]]:
    """Rows of like length together, filled up to ``budget`` tokens."""
    group: list[int] = []
    for at, n in enumerate(order):
        group.append(n)
        if at + 1 == len(order) or len(rows[order[at + 1]][0]) * (len(group) + 1) > budget:
            yield group
            group = []


def by_adapter(forest: Forest, rows: Rows) -> Iterator[tuple[str | None, list[int]]]:
    """The rows with tokens, by the adapter that their trees name."""
    there = [n for n in range(len(rows)) if len(rows[n][0])]
    start = 0
    for name, tokens in forest.adapters or ((None, len(forest.tokens)),):
        yield name, [n for n in there if start <= rows[n][0][0] < start + tokens]
        start += tokens


def row_inputs(body: Any, ids: Tensor, virtual: Virtual | None) -> tuple[dict[str, Any], int]:
    """What a `transformers` model is called with for rows ``[B, L]``, and how many places of its output come first."""
    if virtual is None:
        return {"input_ids": ids}, 0
    if virtual.embeddings is not None:
        looked_up = body.get_input_embeddings()(ids)
        own = virtual.embeddings.to(looked_up.dtype).expand(len(ids), -1, -1)
        return {"inputs_embeds": torch.cat([own, looked_up], 1)}, virtual.length
    return {"input_ids": ids, "past_key_values": fixed_cache(virtual, len(ids))}, 0


def fixed_cache(virtual: Virtual, batch: int) -> Any:
    """A prefix as keys and values of what came before. It keeps nothing: a layer that is recomputed finds the same."""
    from transformers import Cache, DynamicLayer

    class Before(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            assert self.keys is not None
            assert self.values is not None
            keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
            return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    layers: list[Any] = []
    for keys, values in virtual.keys_values:
        layer = Before()
        layer.keys, layer.values = (x.expand(batch, -1, -1, -1) for x in (keys, values))
        layer.is_initialized = True
        layers.append(layer)
    return Cache(layers=layers)
