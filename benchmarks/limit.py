"""A job's arithmetic limit: the time of its necessary matrix products alone, replayed with the same shapes.

    python benchmarks/limit.py TASK.json      # {"config", "passes", "trained", "kind", "r"}; prints one JSON line

Counted per pass, with the tokens that are really there (what rows share is once on the line, nothing is padded):

    every linear layer forward; its input's gradient, but for what lies at or below the lowest trained module;
    the gradient of a weight where it is trained: whole for full training, the thin ones of LoRA or a bottleneck;
    the head on the trained entries alone: forward and the hidden state's gradient, and its own where it is trained;
    DPO's reference: one more forward of the frozen layers and the head.

Left out: attention's scores, whatever goes element by element, the optimizer. So no tool can reach it, and what a
tool's share of it lacks is what these and its own detours cost.

Shapes:  T tokens of a pass,  K its trained entries;  a product is (rows, inner, columns): twice their product in flop.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Product = tuple[int, int, int]
POOL = 200_000_000  # numbers: more than any cache holds


def linears(config: dict[str, Any]) -> list[list[tuple[str, int, int]]]:
    """(name, in, out) of the linear modules of every layer of a Llama-like decoder."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    keys, inner = head * (config.get("num_key_value_heads") or heads), config["intermediate_size"]
    layer = [
        ("q", width, head * heads), ("k", width, keys), ("v", width, keys), ("o", head * heads, width),
        ("gate", width, inner), ("up", width, inner), ("down", inner, width),
    ]  # fmt: skip
    return [list(layer) for _ in range(config["num_hidden_layers"])]


def bottleneck(config: dict[str, Any], reduction: int) -> int:
    return max(1, config["hidden_size"] // reduction)


def of_base(tokens: int, n_in: int, n_out: int, onward: bool, trained: bool) -> Iterator[Product]:
    """A whole matrix: forward, the gradient of what it read, its own."""
    yield tokens, n_in, n_out
    if onward:
        yield tokens, n_out, n_in
    if trained:
        yield n_out, tokens, n_in


def of_thin(tokens: int, n_in: int, r: int, n_out: int, onward: bool) -> Iterator[Product]:
    """Two thin matrices in a row, both trained: forward, both gradients, and what flows on between and below."""
    yield tokens, n_in, r
    yield tokens, r, n_out
    yield n_out, tokens, r
    yield tokens, n_out, r
    yield r, tokens, n_in
    if onward:
        yield tokens, r, n_in


def of_layers(config: dict[str, Any], tokens: int, trained: str, r: int) -> Iterator[Product]:
    """All layers, forward and backward. Of the first one nothing flows on below its lowest trained module."""
    width = config["hidden_size"]
    for number, layer in enumerate(linears(config)):
        for name, n_in, n_out in layer:
            lowest = number == 0 and (trained == "bottleneck" or name in ("q", "k", "v"))
            if trained == "full":  # the embedding lies below all: everything flows on
                yield from of_base(tokens, n_in, n_out, True, True)
                continue
            yield from of_base(tokens, n_in, n_out, not lowest, False)
            if trained in ("lora", "qlora"):
                yield from of_thin(tokens, n_in, r, n_out, not lowest)
        if trained == "bottleneck":
            yield from of_thin(tokens, width, r, width, number > 0)


def products(config: dict[str, Any], tokens: int, entries: int, trained: str, r: int, kind: str) -> Iterator[Product]:
    """The necessary products of one pass."""
    width, words = config["hidden_size"], config["vocab_size"]
    if kind == "dpo":
        for layer in linears(config):
            for _, n_in, n_out in layer:
                yield tokens, n_in, n_out
        yield entries, width, words
    yield from of_layers(config, tokens, trained, r)
    yield from of_base(entries, width, words, True, trained == "full")


def flop(found: Iterator[Product]) -> int:
    return sum(2 * a * b * c for a, b, c in found)


class Replay:
    """Multiplies matrices of given shapes. Those that stand for weights are all different, as they are in a model:
    a pass reads every weight from memory; what a product gives goes into memory that is there already."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.turn = 0
        self.pool = torch.randn(1)  # what the second factors are cut from in turn
        self.first = torch.randn(1)
        self.out = torch.empty(1)

    def cut(self, pool: Any, start: int, rows: int, columns: int) -> Any:
        return pool[start : start + rows * columns].view(rows, columns)

    def ready(self, found: list[Product], a_pass: list[Product]) -> None:
        """Room for the largest, made before the clock starts."""
        most = max(b * c for _, b, c in found)
        self.pool = self.torch.randn(max(most, min(POOL, sum(b * c for _, b, c in a_pass)))) * 0.02
        self.first = self.torch.randn(max(a * b for a, b, _ in found))
        self.out = self.torch.zeros(max(a * c for a, _, c in found))

    def seconds(self, found: list[Product]) -> float:
        mm, size = self.torch.mm, len(self.pool)
        started = time.perf_counter()
        for a, b, c in found:
            if self.turn + b * c > size:
                self.turn = 0
            # weights are kept [out, in], so that a forward product reads them transposed, as here
            second = self.cut(self.pool, self.turn, c, b).t()
            self.turn += b * c
            mm(self.cut(self.first, 0, a, b), second, out=self.cut(self.out, 0, a, c))
        return time.perf_counter() - started


def limit(task: dict[str, Any]) -> dict[str, float]:
    """Seconds and GFLOP of a job's passes, and the rate."""
    passes = [(tokens, entries) for step in task["passes"] for tokens, entries in step]
    how = (task["trained"], task["r"], task["kind"])
    needed = [list(products(task["config"], tokens, entries, *how)) for tokens, entries in passes]
    replay = Replay()
    replay.ready([one for found in needed for one in found], needed[0])
    replay.seconds(needed[0])  # the library's own start is not the job's
    seconds = sum(replay.seconds(found) for found in needed)
    total = sum(flop(iter(found)) for found in needed)
    return {"seconds": seconds, "gflop": total / 1e9, "gflops": total / 1e9 / seconds}


if __name__ == "__main__":
    print(json.dumps(limit(json.loads(Path(sys.argv[1]).read_text()))))
