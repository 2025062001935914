"""Carries out one stage: model, method, data, objective, trainer, in that order; then saves and measures.

Everything before the first step is proof: packed equals separate on this model and backend, the first loss is what
the objective declares. Final metrics are taken on what was saved.
"""

from __future__ import annotations

import contextlib
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
from trivium.data.examples import Prepared, prepare
from trivium.data.hub import local
from trivium.data.loader import Batching, RunOrder, pack
from trivium.data.templates import chat_template
from trivium.errors import DataError, ModelError
from trivium.evaluate.held_out import evaluate
from trivium.files import clear_errors, folder_bytes
from trivium.folder import Opened, round_to, save_model
from trivium.forest import Example, Forest, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.proof import TOLERANCE, Proof, prove
from trivium.objectives import objective
from trivium.objectives.base import Objective
from trivium.peft import base as deltas
from trivium.peft import folder as adapter
from trivium.peft.settings import FullSettings, Settings, settings_for
from trivium.peft.targets import decoder_layers
from trivium.recipe import Stage
from trivium.stages import STAGES
from trivium.train import recompute
from trivium.train.dropout import dropout_off, set_dropout
from trivium.train.log import TrainingLog, say, size
from trivium.train.loop import StepLog, Task, train
from trivium.train.machine import PeakMemory, free_memory
from trivium.train.optimizer import build_optimizers
from trivium.train.reference import Remembered, UnderParent, no_reference
from trivium.train.schedule import factor

HELD_OUT_MOST = 200  # rows taken off the data for evaluation, at most
PROOF_ROWS = 4


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
    folder: Path  # the partial folder; the caller puts it in its place
    adapter_base: Callable[[], str]  # where the frozen base lies on disk, written there if need be
    costs: Costs = field(default_factory=Costs)

    @property
    def model(self) -> LanguageModel:
        return self.opened.model


@dataclass
class Work:
    """What a stage trains: its data in order, its objective, and the method's settings."""

    template: ChatTemplate
    data: Prepared
    held_out: list[Example]
    order: RunOrder
    used: list[Example]  # the examples that the run will see, each once
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
        held_out = list(_forests(run, work.held_out))
        with costs.clock("reference_seconds"):
            reference = _reference(run, work, held_out)
        with costs.clock("setup_seconds"):
            _prove_start(work.goal, model, reference, work.used)
            layers = list(decoder_layers(model.hf).values())
            stack.enter_context(recompute.recomputed(layers, _recompute(run.stage, model, work.used)))
        log = TrainingLog(run.folder / "metrics.jsonl", run.stage.name, len(work.order), peak)
        stack.callback(log.close)

        def measure(step: int) -> dict[str, float]:
            with costs.clock("eval_seconds"), dropout_off(model), log.paused():
                metrics = evaluate(work.goal, model.logprob, reference, held_out)
            if metrics:
                log.evaluated(step, metrics)
            return metrics

        before = measure(0)
        _train(run, work, reference, log, measure)
        with costs.clock("save_seconds"), clear_errors(run.folder):
            round_to(model.hf, model.saved_dtype)
            _save(run, work)
        after = measure(len(work.order))
    return _report(run, work, {"before": before, "after": after}, peak)


def _prepared(run: StageRun) -> Work:
    """Data, method and objective, and the proof that the packed rows are computed right."""
    stage, model = run.stage, run.model
    template = chat_template(model.tokenizer)
    data, held_out = _data(stage, model, template)
    base = run.adapter_base() if stage.method and stage.method["name"] != "full" else None
    settings, parent = _attach(run)
    order = _order(stage, data.examples)
    used = _used(order, data.examples)
    proof = prove(model, _probe(used))
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


def _forests(run: StageRun, examples: list[Example]) -> Iterator[Forest]:
    """Examples packed for gradient-free passes."""
    groups = pack(list(range(len(examples))), [e.tokens for e in examples], int(run.stage.micro_batch_tokens or 1))
    yield from (lay_out([examples[i] for i in g]).to(run.model.device) for g in groups)


def _reference(run: StageRun, work: Work, held_out: list[Forest]) -> Any:
    """How the parent's log-probabilities are had: not at all, under its small weights, or computed once."""
    model = run.model
    if not work.goal.needs_reference:
        return no_reference
    if isinstance(work.settings, FullSettings):
        say("  the parent's log-probabilities are computed once, as its weights are about to change")
        return Remembered(model.logprob, [*_forests(run, work.used), *held_out])
    return UnderParent(model.logprob, lambda: _as_parent(model, work.parent))


# --- before the loop


def _data(stage: Stage, model: LanguageModel, template: ChatTemplate) -> tuple[Prepared, list[Example]]:
    """The examples to train on and those held out; the ledger is printed."""
    kind = STAGES[stage.stage].rows
    share = stage.eval_data if isinstance(stage.eval_data, (int, float)) else 0.0
    limit = min(stage.max_length or model.context, model.context)
    if stage.max_length and stage.max_length > model.context:  # a default; what the recipe says is checked before
        say(f"  max_length {model.context}, which is the model's context")

    def ready(paths: str | list[str], holdout: float) -> Prepared:
        places = [local(p) for p in ([paths] if isinstance(paths, str) else paths)]
        return prepare(
            places, kind=kind, tokenizer=model.tokenizer, template=template,
            train_on=stage.train_on or "assistant", max_length=stage.max_length, context=limit, holdout=holdout,
            bad_rows=stage.bad_rows if stage.bad_rows is not None else 0.01,
        )  # fmt: skip

    data = ready(stage.data, float(share))
    for line in data.ledger.lines():
        say(f"  {line}")
    held_out = data.held_out[:HELD_OUT_MOST]
    if isinstance(stage.eval_data, str):
        held_out = ready(stage.eval_data, 0.0).examples
    if not data.examples:
        raise DataError(f"{stage.data}: nothing left to train on", "give more rows, or eval_data: 0")
    return data, held_out


def _attach(run: StageRun) -> tuple[Settings, dict[str, torch.Tensor] | None]:
    """Make the method's weights trainable: (settings, the parent's small weights or None when the base is parent)."""
    stage, opened, model = run.stage, run.opened, run.model
    assert stage.method is not None
    values = {k: v for k, v in stage.method.items() if k != "name"}
    settings = settings_for(stage.method["name"], values)
    if deltas.deltas(model.hf):  # the caller has merged any that cannot go on
        say(f"  goes on training the {stage.method['name']} adapter of its parent")
        for delta in deltas.deltas(model.hf).values():
            delta.float().requires_grad_(True)
            delta.dropout = getattr(settings, "dropout", 0.0)
        parent = deltas.state(model.hf)
        attached = deltas.describe(model.hf, settings, [])
    else:
        parent = None
        attached = deltas.attach(model.hf, settings, seed=int(stage.seed or 0))
    for note in [*opened.notes, *attached.notes]:
        say(f"  note: {note}")
    if isinstance(settings, FullSettings) and _has_experts(model):
        say("  note: a mixture of experts is trained without a load-balancing loss")
    trained, total = attached.trained_parameters, attached.total_parameters
    say(f"  {stage.method['name']}: {trained:,} of {total:,} parameters trained ({trained / total:.2%})")
    return settings, parent


def _has_experts(model: LanguageModel) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(model.config, n, None) or 0) > 1 for n in names)


@contextlib.contextmanager
def _as_parent(model: LanguageModel, parent: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """The model as its parent was: adapters off, or under the parent's small weights; without any dropout."""
    with dropout_off(model), deltas.off(model.hf) if parent is None else deltas.swapped(model.hf, parent):
        yield


def _order(stage: Stage, examples: list[Example]) -> RunOrder:
    batching = Batching(
        seed=int(stage.seed or 0),
        micro_batch_tokens=int(stage.micro_batch_tokens or 1),
        batch_size=stage.batch_size,
        batch_tokens=stage.batch_tokens,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    return RunOrder([e.tokens for e in examples], batching)


def _used(order: RunOrder, examples: list[Example]) -> list[Example]:
    """The examples that the run will see, each once."""
    if order.epochs >= 1:
        return examples
    return [examples[i] for i in sorted({i for n in range(len(order)) for g in order[n] for i in g})]


def _probe(examples: list[Example]) -> list[Example]:
    """Real rows for the proof: the longest, and a few of the shortest, on which the gradients are compared."""
    ranked = sorted(examples, key=lambda e: e.tokens)
    return [*ranked[: PROOF_ROWS - 1], *ranked[PROOF_ROWS - 1 :][-1:]]


def _prove_start(goal: Any, model: LanguageModel, reference: Any, examples: list[Example]) -> None:
    """The objective's declared value before the first step, on the shortest rows; raises ModelError."""
    if goal.at_start is None:
        return
    forest = lay_out(sorted(examples, key=lambda e: e.tokens)[:2]).to(model.device)
    loss = evaluate(goal, model.logprob, reference, [forest])["loss"]
    allowed = 5 * TOLERANCE[model.dtype].mean
    if not abs(loss - goal.at_start) <= allowed:
        raise ModelError(
            f"{goal.name}: the loss before the first step is {loss:.6f}, not {goal.at_start:.6f}: "
            "the reference is not the parent",
            "the parent's folder has changed since it was trained; run the recipe again",
        )
    say(f"  proof: {goal.name} starts at {loss:.6f}, as it must")


def _recompute(stage: Stage, model: LanguageModel, examples: list[Example]) -> bool:
    """Whether layers are recomputed; ``auto`` measures what a row keeps and scales it to a micro-batch."""
    if stage.recompute != "auto":
        return stage.recompute == "layers"
    ranked = sorted(examples, key=lambda e: e.tokens)
    probe = lay_out(ranked[:1]).to(model.device)
    kept = recompute.saved_bytes(lambda: model.logprob(probe), model.hf.parameters()) / max(1, len(probe.tokens))
    tokens = max(int(stage.micro_batch_tokens or 1), ranked[-1].tokens)
    on = recompute.wanted("auto", kept, tokens, free_memory(str(model.device)))
    if on:
        say(f"  recompute: layers, as {tokens:,} tokens at {size(kept)} each would not fit well")
    return on


def _optimizers(stage: Stage, model: LanguageModel) -> list[torch.optim.Optimizer]:
    inside = {id(p) for layer in decoder_layers(model.hf).values() for p in layer.parameters()}
    hidden = {n for n, p in model.hf.named_parameters() if id(p) in inside}
    return build_optimizers(
        model.hf, hidden, str(stage.optimizer), float(stage.learning_rate or 0), float(stage.weight_decay or 0)
    )


# --- after the loop


def _save(run: StageRun, work: Work) -> None:
    model, folder = run.model, run.folder
    if isinstance(work.settings, FullSettings):
        save_model(model, folder, work.template)
    else:
        assert work.base is not None
        adapter.save(model.hf, folder, work.base, work.settings, model.saved_dtype)
        model.tokenizer.save_pretrained(folder)


def _report(run: StageRun, work: Work, measured: dict[str, dict[str, float]], peak: PeakMemory) -> dict[str, Any]:
    """Everything the folder should tell about itself, but for its lineage."""
    costs, model, data, template = run.costs, run.model, work.data, work.template
    if data.ledger.set_aside or data.ledger.over_long:
        with clear_errors(run.folder):
            data.ledger.write_quarantine(run.folder / "quarantine.jsonl")
    metrics = {f"{when}_{k}": v for when, found in measured.items() for k, v in found.items()}
    weights = folder_bytes(run.folder, ".safetensors")
    costs.seconds += costs.reference_seconds
    return {
        "trained_parameters": model.trained_parameters(),
        "total_parameters": model.parameters(),
        "bytes_on_disk": weights,
        "steps": len(work.order),
        "epochs": work.order.epochs,
        "tokens_per_second": costs.tokens / costs.seconds if costs.seconds else 0.0,
        "peak_memory_bytes": peak.read(),
        **asdict(costs),
        "metrics": metrics,
        "rows": {**data.ledger.as_dict(), "evaluated": len(work.held_out)},
        "proof": asdict(work.proof),
        "dtype": {"computation": str(model.dtype), "saved": str(model.saved_dtype)},
        "template": {"sha256": template.sha256, "origin": template.origin, "stop_ids": sorted(template.stop_ids)},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import transformers

    return {
        "trivium": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
