"""A stage's data: its examples, those held out, the order in which they are seen, and how they are packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trivium.data.chat import ChatTemplate
from trivium.data.loader import Batching, RunOrder, pack_shared
from trivium.data.overlap import overlap
from trivium.data.prepare import Prepared, prepare
from trivium.data.rows import Listed, Mix
from trivium.data.store import Examples
from trivium.errors import DataError
from trivium.forest import Example, Forest, lay_out
from trivium.model.language_model import LanguageModel
from trivium.objectives.base import Objective
from trivium.recipe import Stage
from trivium.sources import held_out_from, held_out_share, trained_on
from trivium.stages import STAGES, rows_of
from trivium.terminal import say
from trivium.train.passes import Passes
from trivium.train.processes import dealt

LEAST_BALANCE, MOST_BALANCE = 0.75, 1.5  # of good answers against bad ones, in KTO; a little outside says nothing
BLOCK = 1024  # rows that are read and packed at a time
HELD_OUT_MOST = 200  # rows taken off the data for evaluation, at most


@dataclass(frozen=True)
class InMemory:
    """Rows that stand in for the files a stage names; ``held_out`` for its ``eval_data``, where that is not a share."""

    rows: Listed
    held_out: Listed | None = None


def stage_examples(
    stage: Stage,
    model: LanguageModel,
    template: ChatTemplate,
    given: InMemory | None = None,
    context: int | None = None,
) -> tuple[Prepared, Examples]:
    """The examples to train on and those held out; the ledger is printed. Raises DataError where none is left.

    ``context`` is what rows may have of the model's, in tokens; left out, all of it.
    """
    context = model.context if context is None else context
    written = stage.max_length is not None and stage.max_length <= context
    if stage.max_length and not written:  # a default; what the recipe says is checked before
        say(f"  max_length {context}, which is the model's context")

    def ready(sources: Sequence[Mix | Listed], holdout: float) -> Prepared:
        return prepare(
            sources, kind=rows_of(stage), tokenizer=model.tokenizer, template=template,
            train_on=stage.train_on or "assistant", max_length=stage.max_length if written else None,
            context=context, on_overflow=stage.on_overflow, pairs=stage.scored or "best_worst",
            ends=STAGES[stage.stage].reads == "reward",
            duplicates=stage.duplicates or "keep", holdout=holdout,
            bad_rows=stage.bad_rows if stage.bad_rows is not None else 0.01,
        )  # fmt: skip

    data = ready([given.rows] if given else trained_on(stage), held_out_share(stage))
    for line in data.ledger.lines():
        say(f"  {line}")
    if rows_of(stage) == "rating":
        _check_both_kinds(data)
        _tell_balance(stage, data)
    own = held_out_from(stage)
    if given and given.held_out is not None:
        held_out = ready([given.held_out], 0.0).examples
    else:
        held_out = ready(own, 0.0).examples if own is not None else data.held_out[:HELD_OUT_MOST]
    for line in overlap(data.examples, held_out).lines():
        say(f"  {line}")
    return data, held_out


def _check_both_kinds(data: Prepared) -> None:
    """There are good answers and bad ones; raises DataError."""
    for have, lack in (("good", "bad"), ("bad", "good")):
        if not data.ledger.counts.get(lack):
            what = f"{data.ledger.source}: all {data.ledger.counts.get(have, 0):,} answers are rated {have}"
            remedy = "add answers of the other kind; to learn from good ones alone, use an sft stage"
            raise DataError(f"{what}, and kto learns from good and bad ones", remedy)


def _tell_balance(stage: Stage, data: Prepared) -> None:
    """A note where one kind of answer weighs much more than the other (Ethayarajh et al. 2024, sec. 4.2)."""
    good, bad = (data.ledger.counts[kind] for kind in ("good", "bad"))
    weighs = (stage.desirable_weight or 1.0) * good / ((stage.undesirable_weight or 1.0) * bad)
    if not LEAST_BALANCE <= weighs <= MOST_BALANCE:
        more = "desirable" if weighs < 1 else "undesirable"
        factor = 1 / weighs if weighs < 1 else weighs
        say(f"  note: good answers weigh {weighs:.2g} times what bad ones do in all; for 1: {more}_weight {factor:.2g}")


def run_order(stage: Stage, data: Prepared) -> RunOrder:
    """Which examples each step takes."""
    batching = Batching(
        seed=int(stage.seed or 0),
        micro_batch_tokens=int(stage.micro_batch_tokens or 1),
        batch_size=stage.batch_size,
        batch_tokens=stage.batch_tokens,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    return RunOrder(data.examples.sizes, batching, data.sources)


def packed(examples: Sequence[Example], tokens: int, device: object, processes: int = 1) -> Iterator[Forest]:
    """Examples packed for passes of at most ``tokens`` tokens, in which what they have in common takes its place once.

    Rows are read `BLOCK` at a time, and those of a block are packed together: a data set need not fit in memory. For
    several processes they are dealt out first: a pass that holds a whole step would leave all others idle.
    """
    for start in range(0, len(examples), BLOCK):
        some = examples[start : start + BLOCK]
        sizes = some.sizes if isinstance(some, Examples) else [e.tokens for e in some]
        rows = list(some)
        for hand in dealt(sizes, processes):
            own = [rows[i] for i in hand]
            groups = pack_shared(own, [sizes[i] for i in hand], tokens)
            yield from (lay_out([own[i] for i in g]).to(str(device)) for g in groups)


def fitted(forests: Sequence[Forest], passes: Passes, device: object) -> Iterator[Forest]:
    """These forests; where memory has run out, smaller ones of the same examples."""
    for forest in forests:
        yield from packed(forest.examples, passes.tokens, device) if passes.halvings else (forest,)


def beside(
    goal: Objective, examples: Sequence[Example], tokens: int, device: object, processes: int = 1
) -> Iterator[Forest]:
    """What an objective's first pass over some examples reads; nothing where it makes none."""
    if goal.first is not None:
        yield from packed(goal.first.examples(list(examples)), tokens, device, processes)
