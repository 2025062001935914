"""Carries out one stage: model, method, data, objective, trainer, in that order; then saves and measures.

Everything before the first step is proof: packed equals separate on this model and backend, the first loss is what
the objective declares. Final metrics are taken on what was saved.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trivium import __version__
from trivium.data.chat import ChatTemplate
from trivium.data.loader import RunOrder
from trivium.data.prepare import Prepared
from trivium.data.store import Examples
from trivium.data.templates import chat_template
from trivium.evaluate.held_out import evaluate
from trivium.evaluate.judge import ALONG_THE_WAY, Judge, shares
from trivium.files import clear_errors, folder_bytes
from trivium.folder import Opened, round_to, save
from trivium.forest import Forest, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.proof import Proof, prove
from trivium.objectives import objective
from trivium.objectives.base import Objective
from trivium.peft import base as deltas
from trivium.peft.settings import FullSettings, Settings, method_name, settings_of
from trivium.peft.targets import decoder_layers
from trivium.recipe import Stage
from trivium.stage_data import InMemory, packed, run_order, stage_examples
from trivium.stage_proof import probe, prove_start, recomputes
from trivium.talk import Talker
from trivium.terminal import say
from trivium.train import recompute
from trivium.train.dropout import dropout_off, set_dropout
from trivium.train.log import TrainingLog
from trivium.train.loop import StepLog, Task, train
from trivium.train.machine import PeakMemory
from trivium.train.optimizer import build_optimizers
from trivium.train.reference import Remembered, UnderParent, no_reference
from trivium.train.schedule import factor
from trivium.train.track import Tracker


@dataclass
class Costs:
    """Seconds of a stage by what they were spent on; ``seconds`` is the training loop alone."""

    seconds: float = 0.0
    setup_seconds: float = 0.0
    reference_seconds: float = 0.0
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass
class StageRun:
    """One stage under way: what it starts from, and where it is written."""

    stage: Stage
    opened: Opened
    folder: Path | None = None  # the partial folder; the caller puts it in its place. None: nothing is written
    adapter_base: Callable[[], str] | None = None  # where the frozen base lies on disk, written there if need be
    data: InMemory | None = None  # rows instead of the stage's files
    judge: Judge | None = None
    tracker: Callable[[], Tracker | None] = lambda: None
    costs: Costs = field(default_factory=Costs)

    @property
    def model(self) -> LanguageModel:
        return self.opened.model


@dataclass
class Work:
    """What a stage trains: its data in order, its objective, and the method's settings."""

    template: ChatTemplate
    data: Prepared
    held_out: Examples
    order: RunOrder
    used: Examples  # the examples that the run will see, each once
    goal: Objective
    settings: Settings
    parent: dict[str, torch.Tensor] | None  # the parent's small weights; None: the bare base is the parent
    base: str | None  # where an adapter's base lies
    proof: Proof


def run_stage(run: StageRun) -> dict[str, Any]:
    """Train the stage and write its folder; returns its part of the record."""
    model, costs = run.model, run.costs
    peak = PeakMemory(str(model.device))
    with costs.clock("setup_seconds"):
        work = _prepared(run)
    with model.laid_out(work.proof.layout), contextlib.ExitStack() as stack:
        held_out = list(packed(work.held_out, int(run.stage.micro_batch_tokens or 1), model.device))
        with costs.clock("reference_seconds"):
            reference = _reference(run, work, held_out)
        with costs.clock("setup_seconds"):
            prove_start(work.goal, model, reference, work.used)
            layers = list(decoder_layers(model.hf).values())
            stack.enter_context(recompute.recomputed(layers, recomputes(run.stage, model, work.used)))
        file = run.folder / "metrics.jsonl" if run.folder else None
        log = TrainingLog(file, run.stage.name, len(work.order), peak, run.tracker())
        stack.callback(log.close)

        def measure(step: int) -> dict[str, float]:
            with costs.clock("eval_seconds"), dropout_off(model), log.paused():
                metrics = evaluate(work.goal, model.logprob, reference, held_out)
                if run.judge is not None:
                    with model.laid_out("single"):  # generation is the model's own
                        metrics |= shares(run.judge(Talker.of(model), ALONG_THE_WAY))
            if metrics:
                log.evaluated(step, metrics)
            return metrics

        before = measure(0)
        _train(run, work, reference, log, measure)
        with costs.clock("save_seconds"):
            round_to(model.hf, model.saved_dtype)
            if run.folder is not None:
                with clear_errors(run.folder):
                    save(model, work.settings, work.base, run.folder)
        after = measure(len(work.order))
    return _report(run, work, {"before": before, "after": after}, peak, log)


def _prepared(run: StageRun) -> Work:
    """Data, method and objective, and the proof that the packed rows are computed right."""
    stage, model = run.stage, run.model
    template = chat_template(model.tokenizer, stage.date)
    data, held_out = stage_examples(stage, model, template, run.data)
    peft = stage.method is not None and stage.method["name"] != "full"
    base = run.adapter_base() if peft and run.adapter_base else None
    settings, parent = _attach(run)
    order = run_order(stage, data)
    used = data.examples.at(order.used())
    proof = prove(model, probe(used))
    say(f"  {proof.line()}")
    goal = objective(stage.model_dump())
    return Work(template, data, held_out, order, used, goal, settings, parent, base, proof)


def _train(
    run: StageRun, work: Work, reference: Any, log: TrainingLog, measure: Callable[[int], dict[str, float]]
) -> None:
    """The loop, with dropout as the stage says, and an evaluation now and then."""
    stage, model, order, costs = run.stage, run.model, work.order, run.costs
    eval_every = stage.eval_every or max(1, math.ceil(len(order) / 3))

    def after_step(step: StepLog) -> None:
        costs.seconds += step.seconds
        costs.tokens += step.tokens
        costs.trained_tokens += step.trained_tokens
        log.step(step)
        if step.step % eval_every == 0 and step.step < len(order):
            measure(step.step)

    task = Task(
        objective=work.goal,
        logprob=model.logprob,
        reference=reference,
        batches=lambda n: (lay_out([work.data.examples[i] for i in g]).to(model.device) for g in order[n]),
        steps=len(order),
        rate=lambda n: factor(n, len(order), str(stage.schedule), stage.warmup_ratio or 0.0),
        optimizers=_optimizers(stage, model),
        max_grad_norm=float(stage.max_grad_norm or 1.0),
    )
    set_dropout(model, stage.dropout or 0.0)
    deltas.dropping(model.hf, True)
    say(f"  {len(order)} steps over {order.epochs:.2f} epochs of {len(work.data.examples):,} examples")
    with torch.random.fork_rng():  # dropout draws from the global generator
        torch.manual_seed(int(stage.seed or 0))
        train(task, after_step)
    deltas.dropping(model.hf, False)
    set_dropout(model, 0.0)


def _reference(run: StageRun, work: Work, held_out: list[Forest]) -> Any:
    """How the parent's log-probabilities are had: not at all, under its small weights, or computed once."""
    model = run.model
    if not work.goal.needs_reference:
        return no_reference
    if isinstance(work.settings, FullSettings):
        say("  the parent's log-probabilities are computed once, as its weights are about to change")
        tokens = int(run.stage.micro_batch_tokens or 1)
        return Remembered(model.logprob, [*packed(work.used, tokens, model.device), *held_out])
    return UnderParent(model.logprob, lambda: _as_parent(model, work.parent))


# --- before the loop


def _attach(run: StageRun) -> tuple[Settings, dict[str, torch.Tensor] | None]:
    """Make the method's weights trainable: (settings, the parent's small weights or None when the base is parent)."""
    stage, opened, model = run.stage, run.opened, run.model
    settings = settings_of(stage.method)
    if deltas.deltas(model.hf):  # the caller has merged any that cannot go on
        say(f"  goes on training the {method_name(settings)} adapter of its parent")
        for delta in deltas.deltas(model.hf).values():
            delta.float().requires_grad_(True)
            delta.dropout = getattr(settings, "dropout", 0.0)
        parent = deltas.state(model.hf)
        attached = deltas.describe(model.hf, settings, [])
    else:
        parent = None
        attached = deltas.attach(model.hf, settings, seed=int(stage.seed or 0))
    opened.settings = settings
    for note in [*opened.notes, *attached.notes]:
        say(f"  note: {note}")
    if isinstance(settings, FullSettings) and _has_experts(model):
        say("  note: a mixture of experts is trained without a load-balancing loss")
    trained, total = attached.trained_parameters, attached.total_parameters
    say(f"  {method_name(settings)}: {trained:,} of {total:,} parameters trained ({trained / total:.2%})")
    return settings, parent


def _has_experts(model: LanguageModel) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(model.config, n, None) or 0) > 1 for n in names)


@contextlib.contextmanager
def _as_parent(model: LanguageModel, parent: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """The model as its parent was: adapters off, or under the parent's small weights; without any dropout."""
    with dropout_off(model), deltas.off(model.hf) if parent is None else deltas.swapped(model.hf, parent):
        yield


def _optimizers(stage: Stage, model: LanguageModel) -> list[torch.optim.Optimizer]:
    inside = {id(p) for layer in decoder_layers(model.hf).values() for p in layer.parameters()}
    hidden = {n for n, p in model.hf.named_parameters() if id(p) in inside}
    return build_optimizers(
        model.hf, hidden, str(stage.optimizer), float(stage.learning_rate or 0), float(stage.weight_decay or 0)
    )


# --- after the loop


def _report(
    run: StageRun, work: Work, measured: dict[str, dict[str, float]], peak: PeakMemory, log: TrainingLog
) -> dict[str, Any]:
    """Everything the folder should tell about itself, but for its lineage."""
    costs, model, data, template = run.costs, run.model, work.data, work.template
    written: dict[str, Any] = {"curve": log.rows}  # a folder has it in metrics.jsonl
    if run.folder is not None:
        if data.ledger.set_aside or data.ledger.over_long:
            with clear_errors(run.folder):
                data.ledger.write_quarantine(run.folder / "quarantine.jsonl")
        written = {"bytes_on_disk": folder_bytes(run.folder, ".safetensors")}
    costs.seconds += costs.reference_seconds
    return {
        "trained_parameters": model.trained_parameters(),
        "total_parameters": model.parameters(),
        "steps": len(work.order),
        "epochs": work.order.epochs,
        "tokens_per_second": costs.tokens / costs.seconds if costs.seconds else 0.0,
        "peak_memory_bytes": peak.read(),
        **asdict(costs),
        **written,
        "metrics": {f"{when}_{k}": v for when, found in measured.items() for k, v in found.items()},
        "rows": {**data.ledger.as_dict(), "evaluated": len(work.held_out)},
        "proof": asdict(work.proof),
        "dtype": {"computation": str(model.dtype), "saved": str(model.saved_dtype)},
        "template": _of_template(template),
        "versions": _versions(),
    }


def _of_template(template: ChatTemplate) -> dict[str, Any]:
    date = {"date": str(template.date or datetime.date.today())} if template.jinja.uses_date else {}
    return {"sha256": template.sha256, "origin": template.origin, "stop_ids": sorted(template.stop_ids), **date}


def _versions() -> dict[str, str]:
    import transformers

    return {
        "trivium": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
