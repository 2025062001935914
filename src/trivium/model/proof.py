"""The proof before training: this model, on this backend, gives the same numbers packed as separate (idea 6).

Log-probabilities of real rows, the longest included (a short probe misses sliding windows and rotary factors that
switch with length), and the gradients of all trained weights on rows of moderate length, are compared with the
unmodified model's own ``logits`` on separate rows. The first layout that agrees is used: forest, rows, single.

The tolerance follows from the dtype: what two orders of summation may differ by in it, with a wide margin, and far
below what a leak between sequences costs (some 0.03 to 0.15 per token).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.errors import ModelError, said
from trivium.forest import Example, Forest, TokenSequence, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.layout import LAYOUTS, row_inputs, sequence_rows


class Tolerance(NamedTuple):
    """Largest accepted differences: of the log-probabilities on average and at most, and of the whole gradient, as the
    norm of the difference over the norm. In low precision single tokens may differ much (a near-tie of experts), so
    there the average carries the proof."""

    mean: float
    most: float
    gradient: float


TOLERANCE = {
    torch.float32: Tolerance(1e-4, 2e-3, 2e-3),
    torch.bfloat16: Tolerance(2e-2, 1.0, 0.15),
    torch.float16: Tolerance(5e-3, 0.3, 0.05),
}
GRADIENT_TOKENS = 256  # gradients are compared on rows of about so many tokens in all
LOGITS = 256  # tokens whose logits are made log-probabilities at a time


@dataclass(frozen=True)
class Proof:
    """What was compared and how far apart it was."""

    layout: str
    logprob_difference: float
    gradient_difference: float
    tokens: int
    refused: tuple[str, ...] = ()  # why the layouts tried before were not used

    def line(self) -> str:
        kind = {
            "forest": "packed and prefix-shared",
            "rows": "falling back to separate padded rows, which",
            "single": "falling back to single rows, which",
        }
        text = (
            f"proof: {kind[self.layout]} = separate on {self.tokens} tokens of real rows "
            f"(log-probabilities within {self.logprob_difference:.1e}, gradients within {self.gradient_difference:.1e})"
        )
        return "; ".join([text, *(f"not {r}" for r in self.refused)])


def prove(model: LanguageModel, examples: list[Example]) -> Proof:
    """Find the layout that equals separate rows on ``examples``; raises ModelError where none does."""
    forest = lay_out(examples).to(model.device)
    short = _short(examples)
    small = lay_out(short).to(model.device)
    with model.laid_out("single"):
        with torch.no_grad():
            expected = _separate(model, forest)
        expected_grads = _gradients(model, _separate(model, small), small)
    limit = TOLERANCE[model.dtype]
    refused: list[str] = []
    for layout in LAYOUTS:
        try:
            with model.laid_out("together" if layout == "rows" else layout):
                with torch.no_grad():
                    differences = (model.logprob(forest) - expected).abs()
                    mean, apart = float(differences.mean()), float(differences.max())
                grads = _gradients(model, model.logprob(small), small)
                grads_apart = _gradients_apart(grads, expected_grads)
        except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            refused.append(f"{layout}: {said(error, 100)}")
            continue
        if mean <= limit.mean and apart <= limit.most and grads_apart <= limit.gradient:
            return Proof(layout, apart, grads_apart, len(forest.tokens), tuple(refused))
        refused.append(f"{layout}: log-probabilities differ by {apart:.2g}, gradients by {grads_apart:.2g}")
    raise ModelError(
        f"{type(model.hf).__name__}: log-probabilities differ from the model's own logits ({'; '.join(refused)})",
        "this model changes its logits or mixes its rows in a way trivium does not know; use another base model",
    )


def _short(examples: list[Example]) -> list[Example]:
    """The shortest examples, and as many as fit; what is long is cut, so that the proof takes less than a step does."""
    chosen: list[Example] = []
    total = 0
    for example in sorted(examples, key=lambda e: e.tokens):
        example = _cut(example)
        total += sum(len(s.inputs) for s in example.sequences)
        if chosen and total > GRADIENT_TOKENS:
            break
        chosen.append(example)
    return chosen


def _cut(example: Example) -> Example:
    """At most `GRADIENT_TOKENS` of each sequence, half of them before the first that is trained; all in one place, so
    that what they share stays shared."""
    if max(len(s.tokens) for s in example.sequences) <= GRADIENT_TOKENS:
        return example
    first = min(int(np.flatnonzero(s.weights[1:])[0]) if s.trained_tokens else 0 for s in example.sequences)
    at = slice(start := max(0, first - GRADIENT_TOKENS // 2), start + GRADIENT_TOKENS)
    return replace(example, sequences=tuple(TokenSequence(s.tokens[at], s.weights[at]) for s in example.sequences))


def _separate(model: LanguageModel, forest: Forest) -> Tensor:
    """Log-probabilities by the unmodified model, ``logits`` of one row after the other; ``[K]``."""
    found, first = [], 0
    with model.computing():
        for places, entries in sequence_rows(forest):
            if not len(entries):
                continue
            row = forest.tokens[torch.from_numpy(places).to(forest.tokens.device)]
            what, behind = row_inputs(model.hf, row[None], model.virtual)
            said = model.hf(**what, use_cache=False).logits
            if model.gives_rewards:
                first += len(entries)
                found.append(said[0].float())
                continue
            logits = said[0, behind:]
            at = torch.from_numpy(entries).to(logits.device)
            target = forest.target[first : first + len(entries)]
            first += len(entries)
            for some, wanted in zip(at.split(LOGITS), target.split(LOGITS), strict=True):  # a copy of a few at a time
                told = logits[some].float()
                found.append(told.gather(1, wanted[:, None])[:, 0] - told.logsumexp(-1))
    return torch.cat(found)


def _gradients(model: LanguageModel, logprob: Tensor, forest: Forest) -> dict[str, Tensor]:
    """Gradients of a fixed mixture of the entries, signs included, with respect to all trained weights."""
    trained = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}
    if not trained or not logprob.requires_grad:  # none acts now
        return {}
    mixture = torch.cos(torch.arange(len(logprob), device=logprob.device)) * forest.weight
    grads = torch.autograd.grad((mixture * logprob).sum(), list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, grads, strict=True) if g is not None}


def _gradients_apart(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of the whole gradient, relative to its norm."""
    if set(grads) != set(expected):
        return float("inf")
    if not expected:
        return 0.0
    # torch's sums keep a NaN, Python's maximum would lose it; not every device has float64
    scale = torch.stack([g.float().norm().cpu().double() for g in expected.values()]).norm()
    apart = torch.stack([(grads[n] - g).float().norm().cpu().double() for n, g in expected.items()]).norm()
    return float(apart / scale) if scale else float(apart)
