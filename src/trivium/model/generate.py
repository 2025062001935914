"""Generation, token by token, with the model's own cache: one prompt, or many side by side.

Prompts of different lengths are filled on the left, masked, and counted from their own first token. Whether this
model then gives the same numbers as for a prompt alone is tried on the most filled row of each batch; where it does
not, the prompts are answered one by one. Rows that have ended leave the batch.

Shapes:  B prompts in a batch,  L the longest prompt,  V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trivium.errors import ModelError
from trivium.model.language_model import LanguageModel
from trivium.model.layout import row_inputs
from trivium.model.proof import TOLERANCE
from trivium.virtual import Virtual

CACHE_BYTES = 2**29  # what the keys and values of a batch may take, at most
KEEP = 0.75  # rows that have ended leave the batch when no more than this share of it goes on


def generate(
    model: LanguageModel, ids: list[int], most: int, stop_ids: frozenset[int], temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """Tokens after ``ids``, until a stop token, ``most`` tokens, or the end of the model's context."""
    _check(model, ids)
    for ((_, token),) in _together(model, [(0, ids)], 1, most, stop_ids, temperature, seed):
        yield token


def generate_many(
    model: LanguageModel,
    prompts: list[list[int]],
    most: int,
    stop_ids: frozenset[int],
    temperature: float = 0.0,
    seed: int = 0,
    samples: int = 1,
) -> list[list[int]]:
    """The same for many prompts, ``most`` for each. Answer ``n`` draws with the seed ``seed + n``.

    ``samples`` answers to each prompt, which is read once: those to prompt ``p`` are ``p * samples`` and following.
    """
    for ids in prompts:  # before any is answered
        _check(model, ids)
    found: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    rows = sorted(enumerate(prompts), key=lambda row: len(row[1]))
    while rows:
        group, rows = _that_fit(model, rows, most, samples)
        for step in _together(model, group, samples, most, stop_ids, temperature, seed):
            for number, token in step:
                found[number].append(token)
    return found


Row = tuple[int, list[int]]  # a prompt's number and its tokens


def _that_fit(model: LanguageModel, rows: list[Row], most: int, samples: int) -> tuple[list[Row], list[Row]]:
    """As many of the rows (sorted by length) as the cache may hold, at least one; and the others."""
    config, count, virtual = model.config, 0, model.virtual
    a_token = samples * 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    # Fill lies between a prefix and the prompt, and a sliding window would count it as distance.
    alike = bool(virtual and virtual.keys_values and getattr(config, "sliding_window", None))
    while count < len(rows) and (count + 1) * (len(rows[count][1]) + most) * a_token <= CACHE_BYTES:
        if alike and len(rows[count][1]) != len(rows[0][1]):
            break
        count += 1
    return rows[: max(1, count)], rows[max(1, count) :]


@torch.no_grad()
def _together(
    model: LanguageModel,
    rows: list[Row],
    samples: int,
    most: int,
    stop_ids: frozenset[int],
    temperature: float,
    seed: int,
) -> Iterator[list[tuple[int, int]]]:
    """Step by step, the next token of every answer that goes on: (its number, the token)."""
    logits, mask, cache = _read(model, rows)
    if len(rows) > 1 and not _as_alone(model, rows[0][1], logits[0]):
        alone = (_together(model, [row], samples, most, stop_ids, temperature, seed) for row in rows)
        yield from chain.from_iterable(alone)
        return
    if samples > 1:
        logits, mask, cache = _repeated(model, rows, samples, logits, mask, cache)
    left = {number * samples + n: min(most, model.context - len(ids)) for number, ids in rows for n in range(samples)}
    batch = list(left)
    random = {number: torch.Generator().manual_seed(seed + number) for number in batch}
    picked = dict.fromkeys(batch, 0)
    while True:
        for number, row in zip(batch, logits.float().cpu(), strict=True):
            if left[number]:
                picked[number] = _pick(row, temperature, random[number])
                left[number] = 0 if picked[number] in stop_ids else left[number]
        going = [number for number in batch if left[number]]
        if going:
            yield [(number, picked[number]) for number in going]
        for number in going:
            left[number] -= 1
        going = [number for number in going if left[number]]
        if not going:
            return
        if len(going) <= KEEP * len(batch) and _can_shrink(cache):
            chosen = torch.tensor([batch.index(number) for number in going], device=model.device)
            cache.batch_select_indices(chosen)
            mask, batch = mask[chosen], going
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
        following = torch.tensor([[picked[number]] for number in batch], device=model.device)
        logits, cache = _forward(model, {"input_ids": following}, mask, cache)


def _repeated(
    model: LanguageModel, rows: list[Row], samples: int, logits: Tensor, mask: Tensor, cache: Any
) -> tuple[Tensor, Tensor, Any]:
    """What `_read` gave, each row ``samples`` times; read again where a cache cannot be repeated."""
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", [None])):
        return _read(model, [row for row in rows for _ in range(samples)])
    cache.batch_repeat_interleave(samples)
    return logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0), cache


def _can_shrink(cache: Any) -> bool:
    """Whether rows can leave the cache; where its layers keep other things than keys and values they stay, unread."""
    return all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None]))


def _check(model: LanguageModel, ids: list[int]) -> None:
    if not ids:
        raise ModelError("nothing to continue: the prompt is empty", "give a prompt")
    if len(ids) >= model.context:
        raise ModelError(
            f"the prompt has {len(ids)} tokens, the model's context is {model.context}", "shorten the prompt"
        )
    model.check_tokens(ids)


def _read(model: LanguageModel, rows: list[Row]) -> tuple[Tensor, Tensor, Any]:
    """The prompts in one pass: logits behind each ``[B, V]``, which places are theirs ``[B, L]``, the cache."""
    longest = max(len(ids) for _, ids in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for at, (_, ids) in enumerate(rows):
        tokens[at, longest - len(ids) :] = torch.tensor(ids)
        mask[at, longest - len(ids) :] = 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    virtual, what, cache = model.virtual, {"input_ids": tokens}, None
    if virtual is not None:  # they come first, before the fill, which is masked
        mask = torch.cat([mask.new_ones(len(rows), virtual.length), mask], 1)
        if virtual.embeddings is not None:
            what, _ = row_inputs(model.hf, tokens, virtual)
        else:
            cache = _begun_with(virtual, model, len(rows))
    logits, cache = _forward(model, what, mask, cache)
    return logits, mask, cache


def _begun_with(virtual: Virtual, model: LanguageModel, batch: int) -> Any:
    """A cache that begins with a prefix."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for number, pair in enumerate(virtual.keys_values):
        keys, values = (x.to(model.dtype).expand(batch, -1, -1, -1) for x in pair)
        cache.update(keys, values, number)
    return cache


def _forward(model: LanguageModel, what: dict[str, Tensor], mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits behind the last of what is read, ``[B, V]``; ``mask`` covers it and all before."""
    filled = {}
    if not mask.all():  # a batch without fill is left to the model's own ways
        count = next(iter(what.values())).shape[1]
        filled = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -count:]}
    with model.computing():
        out = model.hf(**what, past_key_values=cache, use_cache=True, logits_to_keep=1, **filled)
    return out.logits[:, -1], out.past_key_values


def _as_alone(model: LanguageModel, ids: list[int], logits: Tensor) -> bool:
    """Whether the shortest prompt, filled the most, got in the batch what it gets alone."""
    alone, _, _ = _read(model, [(0, ids)])
    apart = (logits.float().log_softmax(-1) - alone[0].float().log_softmax(-1)).abs()
    return float(apart.mean()) <= 10 * TOLERANCE[model.dtype].mean


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # the likeliest at 0: a temperature near 0 would otherwise divide into infinities
    scaled = (logits - logits.max()) / temperature
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
