"""A stage's data: its examples, those held out, the order in which they are seen, and how they are packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trivium.data.chat import ChatTemplate
from trivium.data.examples import Prepared, prepare
from trivium.data.hub import local
from trivium.data.loader import Batching, RunOrder, pack
from trivium.data.rows import Listed
from trivium.errors import DataError
from trivium.forest import Example, Forest, lay_out
from trivium.model.language_model import LanguageModel
from trivium.recipe import Stage
from trivium.stages import STAGES
from trivium.train.log import say

HELD_OUT_MOST = 200  # rows taken off the data for evaluation, at most


@dataclass(frozen=True)
class InMemory:
    """Rows that stand in for the files a stage names; ``held_out`` for its ``eval_data``, where that is not a share."""

    rows: Listed
    held_out: Listed | None = None


def stage_examples(
    stage: Stage, model: LanguageModel, template: ChatTemplate, given: InMemory | None = None
) -> tuple[Prepared, list[Example]]:
    """The examples to train on and those held out; the ledger is printed. Raises DataError where none is left."""
    share = stage.eval_data if isinstance(stage.eval_data, (int, float)) else 0.0
    if stage.max_length and stage.max_length > model.context:  # a default; what the recipe says is checked before
        say(f"  max_length {model.context}, which is the model's context")

    def ready(sources: Sequence[Path | Listed], holdout: float) -> Prepared:
        return prepare(
            sources, kind=STAGES[stage.stage].rows, tokenizer=model.tokenizer, template=template,
            train_on=stage.train_on or "assistant", max_length=stage.max_length,
            context=min(stage.max_length or model.context, model.context), holdout=holdout,
            bad_rows=stage.bad_rows if stage.bad_rows is not None else 0.01,
        )  # fmt: skip

    data = ready([given.rows] if given else [local(p) for p in _listed(stage.data)], float(share))
    for line in data.ledger.lines():
        say(f"  {line}")
    held_out = data.held_out[:HELD_OUT_MOST]
    if given and given.held_out is not None:
        held_out = ready([given.held_out], 0.0).examples
    elif isinstance(stage.eval_data, str):
        held_out = ready([local(stage.eval_data)], 0.0).examples
    if not data.examples:
        raise DataError(f"{stage.data}: nothing left to train on", "give more rows, or eval_data: 0")
    return data, held_out


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def run_order(stage: Stage, examples: list[Example]) -> RunOrder:
    """Which examples each step takes."""
    batching = Batching(
        seed=int(stage.seed or 0),
        micro_batch_tokens=int(stage.micro_batch_tokens or 1),
        batch_size=stage.batch_size,
        batch_tokens=stage.batch_tokens,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    return RunOrder([e.tokens for e in examples], batching)


def used_examples(order: RunOrder, examples: list[Example]) -> list[Example]:
    """The examples that the run will see, each once."""
    if order.epochs >= 1:
        return examples
    return [examples[i] for i in sorted({i for n in range(len(order)) for g in order[n] for i in g})]


def packed(examples: list[Example], tokens: int, device: object) -> Iterator[Forest]:
    """Examples packed for gradient-free passes of at most ``tokens`` tokens."""
    groups = pack(list(range(len(examples))), [e.tokens for e in examples], tokens)
    yield from (lay_out([examples[i] for i in g]).to(str(device)) for g in groups)
