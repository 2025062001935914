"""What the parts of `gpu.py` are made of: rows that are the same for every tool, models of random weights, what a step
has to compute; and the parts that train nothing: equality and the rate.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

LLAMA = {"architecture": "llama", "max_position_embeddings": 8192}
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
    "equality": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
                 "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "tie_word_embeddings": False},
}  # fmt: skip
TINY = {
    name: {**sizes, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
    for name, sizes in SHAPES.items()
}  # fmt: skip
RANK, BETA, SEED = 16, 0.1, 0
WARM = 2  # steps before the measured ones
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}  # of a gradient, relative; log-probabilities are told


class Skipped(Exception):
    """A part that cannot be run here, with the reason."""


@dataclass(frozen=True)
class Bench:
    """What the whole call is given."""

    device: str
    tiny: bool
    line: int  # tokens of a line
    lines: int  # of a step
    seconds: float  # of measured steps, for each part
    most_steps: int

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def shapes(self) -> dict[str, dict[str, Any]]:
        return TINY if self.tiny else SHAPES


@dataclass(frozen=True)
class Case:
    """One training that is measured."""

    model: str
    kind: str  # sft, dpo
    tool: str = "trivium"
    recompute: bool = False
    compiled: bool = False
    nf4: bool = False
    unpadded: bool = False  # TRL's padding_free: rows behind one another on one line

    @property
    def name(self) -> str:
        told = {"recompute": self.recompute, "compiled": self.compiled, "nf4": self.nf4, "unpadded": self.unpadded}
        return " ".join([self.model, self.kind, self.tool, *(word for word, on in told.items() if on)])


# --- rows, the same for every tool


def documents(bench: Bench, step: int, line: int) -> list[np.ndarray]:
    """Token ids of the documents of one line; each takes one place less than it has tokens."""
    rng = np.random.default_rng([SEED, 1, step, line])
    count = max(2, bench.line // 512)
    cuts = rng.dirichlet(np.full(count, 8.0))
    sizes = np.maximum(2, (cuts * bench.line).astype(int))
    sizes[-1] = bench.line - sizes[:-1].sum()
    return [rng.integers(3, bench.shapes["1B"]["vocab_size"], n + 1) for n in sizes]


def pairs(bench: Bench, step: int, line: int) -> list[dict[str, np.ndarray]]:
    """Prompt, chosen, rejected: a pair takes some 1,024 places of a line, half of them its prompt."""
    rng = np.random.default_rng([SEED, 2, step, line])
    each = min(1024, bench.line // 2)
    sizes = {"prompt": each // 2, "chosen": each // 4, "rejected": each // 4}
    vocabulary = bench.shapes["1B"]["vocab_size"]
    return [{k: rng.integers(3, vocabulary, n) for k, n in sizes.items()} for _ in range(bench.line // each)]


def examples_of(bench: Bench, kind: str, step: int, line: int) -> list[Any]:
    """The same rows as trivium's examples."""
    from trivium.forest import Example, TokenSequence

    def sequence(ids: np.ndarray, behind: int) -> TokenSequence:
        return TokenSequence(ids, (np.arange(len(ids)) >= behind).astype(np.float32))

    if kind == "sft":
        return [
            Example((sequence(ids, 1),), f"{step}:{line}:{n}") for n, ids in enumerate(documents(bench, step, line))
        ]
    found = []
    for n, row in enumerate(pairs(bench, step, line)):
        answers = (np.concatenate([row["prompt"], row[k]]) for k in ("chosen", "rejected"))
        two = tuple(sequence(ids, len(row["prompt"])) for ids in answers)
        found.append(Example(two, f"{step}:{line}:{n}", scores=(1.0, 0.0)))
    return found


# --- models


class Stands:
    """In place of a tokenizer, for a config."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def made(bench: Bench, name: str, dtype: str, attention: str = "sdpa") -> Any:
    """A `transformers` model of random weights, made where it is used; the same for the same device."""
    from transformers import AutoModelForCausalLM

    from trivium.model.new import new_config

    sizes = {**LLAMA, **bench.shapes[name]}
    config = new_config(sizes, Stands(sizes["vocab_size"]))
    torch.manual_seed(SEED)
    with torch.device(bench.device):
        hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    return hf.eval()


def with_lora(hf: Any, dtype: str, nf4: bool = False) -> Any:
    """The model as trivium has it, a new LoRA on every linear layer."""
    from trivium.folder import attach
    from trivium.model.load import wrap
    from trivium.peft.settings import settings_of

    if nf4 and importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    model = wrap(hf, None, dtype, getattr(torch, dtype))
    method = {"name": "lora", "r": RANK, **({"quantize": "nf4"} if nf4 else {})}
    attach(model, settings_of(method), SEED)
    return model


# --- equality


def equality(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row for each batch and way of computing it."""
    from trivium.forest import lay_out
    from trivium.model.proof import _gradients, _gradients_apart, _separate

    torch.backends.cuda.matmul.allow_tf32 = False
    rounded = {n: t.bfloat16() for n, t in made(bench, "equality", "float32").state_dict().items()}

    def model_in(dtype: str) -> Any:
        hf = made(bench, "equality", dtype)
        hf.load_state_dict({n: t.to(getattr(torch, dtype)) for n, t in rounded.items()})
        model = with_lora(hf, dtype)
        generator = torch.Generator().manual_seed(1)  # what B is at the start would leave A without a gradient
        for name, p in model.hf.named_parameters():
            if name.endswith("lora_B"):
                p.data.copy_(0.02 * torch.randn(p.shape, generator=generator))
        return model

    small = replace(bench, line=min(bench.line, 1536))  # not a multiple of what lines are filled to
    batches = {
        "packed": lay_out(examples_of(small, "sft", 0, 0)),
        "shared prefix": lay_out(examples_of(small, "dpo", 0, 0)),
    }
    exact, half = model_in("float32"), model_in("bfloat16")
    for name, forest in batches.items():
        forest = forest.to(bench.device)
        with exact.laid_out("single"):
            expected = _separate(exact, forest)
            gradients = _gradients(exact, expected, forest)
        ways = [("line", exact, "forest"), ("line", half, "forest"), ("unmodified, rows", half, "single")]
        for way, model, layout in ways:
            dtype = str(model.dtype).removeprefix("torch.")
            told = {"part": "equality", "name": f"{name}, {way}, {dtype}", "tokens": len(forest.tokens)}
            try:
                with model.laid_out(layout):
                    found = model.logprob(forest) if layout == "forest" else _separate(model, forest)
                    apart = (found.detach() - expected.detach()).abs()
                    gradient = _gradients_apart(_gradients(model, found, forest), gradients)
            except Exception as error:  # the other ways are told all the same
                yield {**told, "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
                continue
            yield {
                **told, "logprob_most": float(apart.max()), "logprob_mean": float(apart.mean()), "gradient": gradient,
                "holds": gradient <= ALLOWED[dtype],
            }  # fmt: skip


# --- the rate


def rate(bench: Bench) -> Iterator[dict[str, Any]]:
    """Products of the 8B's sizes, and a large square one."""
    sizes = bench.shapes["8B"]
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    square = 128 if bench.tiny else 8192
    for m, k, n in ((square, square, square), (bench.line, width, inner), (bench.line, inner, width)):
        a, b = (torch.randn(*shape, device=bench.device).to(getattr(torch, bench.dtype)) for shape in ((m, k), (k, n)))
        seconds = []
        for turn in range(5):
            sync(bench)
            began = time.perf_counter()
            for _ in range(10):
                a @ b
            sync(bench)
            if turn:
                seconds.append((time.perf_counter() - began) / 10)
        flops = 2 * m * k * n / statistics.median(seconds)
        yield {"part": "rate", "name": f"{m} x {k} x {n}, {bench.dtype}", "flops": flops}


def sync(bench: Bench) -> None:
    if bench.device == "cuda":
        torch.cuda.synchronize()


# --- arithmetic


def step_flop(sizes: dict[str, Any], kind: str, tokens: int, visible: int, trained: int) -> float:
    """Floating-point operations that a step of LoRA training needs.

    ``visible``: keys that its tokens see, in all; ``trained``: its entries of the loss.
    """
    width, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    queries, keys = sizes["num_attention_heads"] * sizes["head_dim"], sizes["num_key_value_heads"] * sizes["head_dim"]
    linear = [(width, queries), (width, keys), (width, keys), (queries, width), (width, inner), (width, inner),
              (inner, width)]  # fmt: skip
    weights = layers * sum(a * b for a, b in linear)
    thin = layers * sum(RANK * (a + b) for a, b in linear)
    scores, head = 4 * layers * queries * visible, 2 * sizes["vocab_size"] * width * trained
    forward = 2 * (weights + thin) * tokens + scores + head
    backward = 2 * (weights + 2 * thin) * tokens + 2 * scores + head
    reference = 2 * weights * tokens + scores + head if kind == "dpo" else 0
    return float(forward + backward + reference)


def rows_tokens(bench: Bench, kind: str, step: int) -> list[tuple[int, int]]:
    """(places, trained ones) of each row's sequences, each by itself."""
    found = [s for n in range(bench.lines) for e in examples_of(bench, kind, step, n) for s in e.sequences]
    return [(len(s.inputs), s.trained_tokens) for s in found]
