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

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.forest import Forest
from trivium.model.attention import Plan

LAYOUTS = ("forest", "rows", "single")


def hidden_states(body: Any, forest: Forest, layout: str, fill_to: int | None = None) -> Tensor:
    """``hidden[source]``, ``[K, D]``: the state behind each entry. ``body`` is the model without its head."""
    if layout == "forest":
        filled_forest = filled(forest, fill_to) if fill_to else forest
        out = body(
            input_ids=filled_forest.tokens[None],
            position_ids=filled_forest.position[None],
            use_cache=False,
            forest=Plan(filled_forest),
        )
        return out.last_hidden_state[0].index_select(0, forest.source)
    budget = {"rows": len(forest.tokens), "together": sys.maxsize, "single": 0}[layout]
    return _row_states(body, forest, budget)


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


def sequence_rows(forest: Forest) -> list[tuple[np.ndarray, np.ndarray]]:
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


def _row_states(body: Any, forest: Forest, budget: int) -> Tensor:
    """The states of padded rows, as many rows at once as make ``budget`` tokens, or one."""
    rows = sequence_rows(forest)
    order = sorted((n for n in range(len(rows)) if len(rows[n][0])), key=lambda n: len(rows[n][0]))
    states: dict[int, Tensor] = {}
    group: list[int] = []
    for at, n in enumerate(order):
        group.append(n)
        last = at + 1 == len(order)
        if last or len(rows[order[at + 1]][0]) * (len(group) + 1) > budget:
            ids = [forest.tokens[torch.from_numpy(rows[m][0]).to(forest.tokens.device)] for m in group]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            out = body(input_ids=padded, use_cache=False).last_hidden_state
            for row, m in enumerate(group):
                states[m] = out[row, torch.from_numpy(rows[m][1]).to(out.device)]
            group = []
    return torch.cat([states[n] for n in sorted(states)])
