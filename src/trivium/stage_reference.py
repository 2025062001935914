"""How a preference stage has its parent's log-probabilities: under its small weights, computed once, or moving.

What is computed once is kept in the cache under all that it depends on, so that a training that goes on, or another one
on the same rows and the same parent, finds it there.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor

from trivium.data.cache import cache_folder, let_go, read_today
from trivium.files import sha256_json
from trivium.forest import Forest
from trivium.model.language_model import LanguageModel
from trivium.model.quantized import quantized
from trivium.objectives.base import LogProb
from trivium.peft import base as deltas
from trivium.peft.kinds import FullSettings
from trivium.stage_data import beside, fitted, packed
from trivium.stage_work import StageRun, Work
from trivium.terminal import say, size
from trivium.train.dropout import dropout_off
from trivium.train.passes import surviving
from trivium.train.reference import Moving, NoReference, Remembered, UnderParent, no_reference
from trivium.under_way import versions


def reference_of(run: StageRun, work: Work) -> NoReference:
    """How the parent's log-probabilities are had: not at all, under its small weights, computed once, or moving."""
    model, stage = run.model, run.stage
    if not work.goal.needs_reference:
        return no_reference
    full = isinstance(work.settings, FullSettings)
    if stage.reference_sync_steps is not None:
        return _moving(run)
    again = work.order.epochs > 1
    if stage.reference != "kept" and not full and not again:
        return UnderParent(model.logprob, lambda: as_parent(model, work.parent))
    why = "as its weights are about to change" if full else "as every row is seen again" if again else "as asked"
    say(f"  the parent's log-probabilities are computed once, {why}")
    tokens = int(stage.micro_batch_tokens or 1)

    def forests() -> Iterator[Forest]:
        yield from packed(work.used, tokens, model.device)
        yield from packed(work.held_out, tokens, model.device)
        steps = range(len(work.order) if work.goal.first else 0)
        seen = ([work.data.examples[i] for i in work.order.chosen(n)] for n in steps)
        for examples in (*seen, work.held_out):
            yield from beside(work.goal, examples, tokens, model.device)

    def parents(forest: Forest) -> Tensor:
        def attempt() -> Tensor:
            return _in_order(forest, fitted([forest], work.passes, model.device), model.logprob)

        with as_parent(model, work.parent) if not full else contextlib.nullcontext():
            return surviving(attempt, lambda reason: work.passes.no_room(0, reason))

    return _remembered(run, work, parents, forests)


def _in_order(forest: Forest, parts: Iterable[Forest], logprob: LogProb) -> Tensor:
    """Log-probabilities of a forest's entries ``[K]``, on the CPU, computed in parts that have its examples."""
    found: dict[Hashable, Tensor] = {}
    for part in parts:
        pieces = logprob(part).cpu().split([e.trained_tokens for e in part.examples])
        found.update(zip((e.identity for e in part.examples), pieces, strict=True))
    return torch.cat([found[e.identity] for e in forest.examples])


def _remembered(
    run: StageRun, work: Work, parents: Callable[[Forest], Tensor], forests: Callable[[], Iterator[Forest]]
) -> Remembered:
    """The parent's log-probabilities, computed or found in the cache."""
    if run.under_way is None:
        return Remembered(parents, forests())
    about = {"of": _what_is_kept(run, work)}
    folder = cache_folder("reference") / about["of"][:32]
    found, there = Remembered.kept_in(folder, about, parents, forests, run.others)
    if run.others.first:
        read_today(folder)
        let_go(folder.parent)
    if there:
        say("  they were computed before, for the same rows and the same parent")
    return found


def _what_is_kept(run: StageRun, work: Work) -> str:
    """All that the parent's log-probabilities depend on, to the last bit."""
    assert run.under_way is not None, "there is a run in a folder"
    model, examples = run.model, (work.used, work.held_out)
    rows = [(e.store.key, hashlib.sha256(e.numbers.astype("<i8").tobytes()).hexdigest()) for e in examples]
    steps = [work.order.chosen(n) for n in range(len(work.order))] if work.goal.first else []
    how = [str(model.dtype), str(model.device), quantized(model.hf), work.proof.layout, run.stage.micro_batch_tokens]
    return sha256_json([run.under_way.about["parent"], rows, steps, how, versions()])


def _moving(run: StageRun) -> NoReference:
    """A reference that moves with the model; `checks` has seen that it starts as its parent."""
    model, stage = run.model, run.stage
    weights = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}
    found = Moving(model.logprob, weights, int(stage.reference_sync_steps or 1), stage.reference_mixup or 1.0,
                   lambda: dropout_off(model))  # fmt: skip
    more = sum(p.numel() * p.element_size() for p in weights.values())
    say(f"  the reference moves every {stage.reference_sync_steps} steps: a copy of what is trained, {size(more)}")
    return found


@contextlib.contextmanager
def as_parent(model: LanguageModel, parent: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """The model as its parent was: adapters off, or under the parent's small weights; without any dropout."""
    with dropout_off(model), deltas.off(model.hf) if parent is None else deltas.swapped(model.hf, parent):
        yield


def elsewhere(run: StageRun, work: Work) -> Callable[[], contextlib.AbstractContextManager[None]] | None:
    """The way back to the parent, for a method that does not start as it."""
    started = [delta.starts_as_base for delta in deltas.deltas(run.model.hf).values()]
    return None if work.parent is not None or all(started) else lambda: as_parent(run.model, None)
