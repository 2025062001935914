"""Carries out one stage: model, method, data, objective, trainer, in that order; then saves and measures.

Everything before the first step is proof: packed equals separate on this model and backend, the first loss is what
the objective declares. Final metrics are taken on what was saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from trivium.data.chat import ChatTemplate
from trivium.data.templates import chat_template
from trivium.files import folder_bytes, write_by, write_text
from trivium.folder import attach, round_to, save
from trivium.model.language_model import LanguageModel
from trivium.model.quantized import quantized
from trivium.objectives import objective
from trivium.peft import base as deltas
from trivium.peft.kinds import FullSettings, Settings, virtual_tokens
from trivium.peft.settings import method_name, settings_of
from trivium.peft.targets import decoder_layers
from trivium.recipe import Stage
from trivium.stage_data import run_order, stage_examples
from trivium.stage_memory import arranged, check_fits
from trivium.stage_proof import check_readable, probe, prove_start
from trivium.stage_reference import elsewhere, reference_of
from trivium.stage_together import plan_of, proven_by_first
from trivium.stage_training import Training
from trivium.stage_work import StageRun, Work
from trivium.terminal import say
from trivium.train import recompute
from trivium.train.log import LOG
from trivium.train.machine import PeakMemory
from trivium.train.passes import Passes
from trivium.under_way import versions


def run_stage(run: StageRun) -> dict[str, Any]:
    """Train the stage and write its folder; returns its part of the record."""
    model, costs = run.model, run.costs
    peak = PeakMemory(str(model.device))
    with costs.clock("setup_seconds"):
        work = prepared(run)
        check_fits(run.stage, work.cost, model, int(work.used.sizes.max()))
    with arranged_as(run, work), contextlib.ExitStack() as stack:
        with costs.clock("reference_seconds"):
            reference = reference_of(run, work)
        with costs.clock("setup_seconds"):
            if run.others.first:
                prove_start(work.goal, model, reference, work.used, elsewhere(run, work))
        training = Training(run, work, reference, peak)
        stack.callback(training.close)
        before = training.carry_out()
        if not run.others.first:
            return {}  # what follows is read from the folder that the first one writes
        with costs.clock("save_seconds"):
            training.choose_result()
            round_to(model.hf, model.saved_dtype)
            if run.folder is not None:
                save(model, work.settings, work.base, run.folder)
        after = training.measure(len(work.order))
    return _report(run, work, {"before": before, "after": after}, training)


@contextlib.contextmanager
def arranged_as(run: StageRun, work: Work) -> Iterator[None]:
    """Within the block the model reads batches as the proof says, and recomputes what it is to recompute."""
    layers = list(decoder_layers(run.model.hf).values())[: int(run.stage.recompute or 0)]
    with run.model.laid_out(work.proof.layout), recompute.recomputed(layers, run.model.adapters):
        yield


def prepared(run: StageRun) -> Work:
    """Data, method and objective, and the proof that the packed rows are computed right."""
    stage, model = run.stage, run.model
    template = chat_template(model.tokenizer, stage.date)
    with run.others.first_alone():
        data, held_out = stage_examples(stage, model, template, run.data, _context(run))
    base = run.adapter_base() if run.adapter_base and not stage.full else None
    settings, parent = _attach(run)
    run.others.alike(model.hf)
    order = run_order(stage, data)
    used = data.examples.at(order.used())
    for examples in (used, held_out):
        check_readable(model, examples)
    weights = [run.weights, asdict(settings), stage.seed] if run.weights else None
    proof, before = proven_by_first(run.others, model, probe(used), weights)
    say(f"  {proof.line()}" + ("; proved before" if before else ""))
    with model.laid_out(proof.layout):
        fitting, cost = arranged(stage, model, used, order.step_tokens())
    run.stage = stage.model_copy(update=run.others.led(lambda: _passes(fitting)))
    order = run_order(run.stage, data)
    run.others.agree("data", lambda: plan_of(order, used))
    goal = objective(stage.model_dump())
    if data.ledger.counts.get("with_margin") and not goal.margins:
        say(f"  note: {goal.name} knows no margins: those of the rows change nothing")
    passes = Passes(stage.name, int(run.stage.micro_batch_tokens or 1), int(used.sizes.min()))
    return Work(template, data, held_out, order, used, goal, settings, parent, base, proof, passes, cost)


# --- before the loop


def _passes(stage: Stage) -> dict[str, Any]:
    """What may have been fitted to the memory there is."""
    return {"micro_batch_tokens": stage.micro_batch_tokens, "recompute": stage.recompute}


def _context(run: StageRun) -> int:
    """What is left of the model's context when the method's virtual tokens, not hung yet, have taken their part."""
    new = 0 if deltas.deltas(run.model.hf) else virtual_tokens(settings_of(run.stage.method))
    return run.model.context - new


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
        attached = attach(model, settings, seed=int(stage.seed or 0))
    opened.settings = settings
    for note in [*opened.notes, *attached.notes]:
        say(f"  note: {note}")
    if isinstance(settings, FullSettings) and _has_experts(model):
        say("  note: a mixture of experts is trained without a load-balancing loss")
    if (how := quantized(model.hf)) is not None:
        say(f"  the frozen layers are held in {how}; their rounded weights are what it starts from")
    trained, total = attached.trained_parameters, attached.total_parameters
    say(f"  {method_name(settings)}: {trained:,} of {total:,} parameters trained ({trained / total:.2%})")
    return settings, parent


def _has_experts(model: LanguageModel) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(model.config, n, None) or 0) > 1 for n in names)


# --- after the loop


def _report(run: StageRun, work: Work, measured: dict[str, dict[str, float]], training: Training) -> dict[str, Any]:
    """Everything the folder should tell about itself, but for its lineage."""
    costs, model, data, template = run.costs, run.model, work.data, work.template
    written: dict[str, Any] = {"curve": training.log.rows}  # a folder has it in metrics.jsonl
    if run.folder is not None:
        quarantine = run.folder / "quarantine.jsonl"
        if data.ledger.set_aside or data.ledger.over_long:
            rows = sum(len(place.row) for place in data.ledger.bad())
            write_by(quarantine, lambda: data.ledger.write_quarantine(quarantine), rows)
        write_text(run.folder / LOG, training.log.text())
        written = {"bytes_on_disk": folder_bytes(run.folder, ".safetensors")}
    costs.seconds += costs.reference_seconds
    return {
        "trained_parameters": model.trained_parameters(),
        "total_parameters": model.parameters(),
        "steps": len(work.order),
        "epochs": work.order.epochs,
        "processes": run.others.count,
        "tokens_per_second": costs.tokens / costs.seconds if costs.seconds else 0.0,
        "peak_memory_bytes": training.peak_bytes(),
        **asdict(costs),
        **written,
        "metrics": {f"{when}_{k}": v for when, found in measured.items() for k, v in found.items()},
        "rows": {**data.ledger.as_dict(), "evaluated": len(work.held_out)},
        "proof": asdict(work.proof),
        "dtype": {"computation": str(model.dtype), "saved": str(model.saved_dtype)},
        "template": _of_template(template),
        "versions": versions(),
        "events": {**training.events(), "both_fell": _both_fell(measured)},
    }


def _both_fell(measured: dict[str, dict[str, float]]) -> bool:
    """Whether chosen and rejected answers have both become less likely: what is learnt goes to other text then."""
    before, after = measured["before"], measured["after"]
    names = ("logprob_chosen", "logprob_rejected")
    fell = all(n in before and after.get(n, 0.0) < before[n] for n in names)
    if fell:
        told = " and ".join(f"{n.removeprefix('logprob_')} {before[n]:.1f} → {after[n]:.1f}" for n in names)
        say(f"  note: chosen and rejected held-out answers both became less likely ({told}): what was learnt goes to")
        say("  other text; sft_weight, a smaller learning rate or fewer epochs hold on to the chosen ones")
    return fell


def _of_template(template: ChatTemplate) -> dict[str, Any]:
    date = {"date": template.told_date} if template.told_date else {}
    return {"sha256": template.sha256, "origin": template.origin, "stop_ids": sorted(template.stop_ids), **date}
