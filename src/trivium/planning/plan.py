"""`trivium plan`: what each stage of a recipe will train, hold, write and take, before any of it is done.

Every stage is prepared as for a run (rows, method, proof), from the model that the recipe starts from: a parent that is
yet to be trained has the same shapes. Then a few of its steps are tried out (`trial`). All of it happens in a folder
that is thrown away; the plan alone is kept, in ``plan.json``, and the run's report compares it with what came.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trivium.chain import checked, open_stage
from trivium.checks import check_fit
from trivium.files import make_folder, write_json
from trivium.folder import record_of
from trivium.planning.kept import PLAN
from trivium.planning.memory import parts, ways
from trivium.planning.trial import evaluations, try_out
from trivium.recipe import Recipe, Stage
from trivium.stage_memory import room_for
from trivium.stage_runner import prepared
from trivium.stage_saving import LEAST_SECONDS, copied
from trivium.stage_work import StageRun, Work
from trivium.start import Link, data_hashes, start_of
from trivium.summary import stage_identity
from trivium.terminal import say
from trivium.train.machine import PeakMemory


def plan_recipe(recipe: Recipe, out: Path, until: str | None = None) -> dict[str, Any]:
    """The plan of every stage up to ``until``, also written into ``out``. Raises what a run would."""
    ordered, _ = checked(recipe, until)
    found: dict[str, Any] = {"name": recipe.name, "stages": []}
    links: dict[str, Link] = {}
    start: Link | None = None
    with tempfile.TemporaryDirectory() as kept:
        scratch = Path(kept)
        for stage in ordered:
            say(f"{stage.name}: {stage.stage} from {stage.from_ or 'the model'}")
            if start is None:
                start = start_of(recipe, stage, scratch)
            identity = stage_identity(links[stage.from_] if stage.from_ else start, data_hashes(stage), stage)
            links[stage.name] = Link(str(out / stage.name), identity, [])
            record = record_of(out / stage.name) if (out / stage.name).is_dir() else None
            head = {"name": stage.name, "stage": stage.stage, "method": (stage.method or {})["name"],
                    "identity": identity}  # fmt: skip
            if record is not None and record["identity"] == identity:
                say("  done before, and not run again")
                found["stages"].append(head | {"done": True})
                continue
            found["stages"].append(head | _planned(recipe, stage, start, scratch, ordered))
    write_json(make_folder(out) / PLAN, found)
    return found


def _planned(recipe: Recipe, stage: Stage, start: Link, scratch: Path, ordered: list[Stage]) -> dict[str, Any]:
    """One stage: what it trains, holds, writes and takes."""
    began = time.perf_counter()
    run = _opened(recipe, stage, start, scratch, ordered)
    opening = time.perf_counter() - began
    peak = PeakMemory(str(run.model.device))
    work = prepared(run)
    setup = time.perf_counter() - began
    longest, model = int(work.used.sizes.max()), run.model
    need, there, cost = room_for(run.stage, work.cost, model, longest)
    sizes = work.order.step_tokens()
    tokens, recomputed = int(run.stage.micro_batch_tokens or 1), int(run.stage.recompute or 0)
    found: dict[str, Any] = {
        "trained_parameters": model.trained_parameters(),
        "total_parameters": model.parameters(),
        "rows": work.data.ledger.as_dict(),
        "steps": len(sizes),
        "epochs": work.order.epochs,
        "tokens": int(sizes.sum()),
        "pass": {"tokens": max(tokens, longest), "longest_row": longest, "recomputed_layers": recomputed},
        "device": str(model.device),
        "fits": need <= there,
    }
    if need > there:
        told = [asdict(way) for way in ways(run.stage, model.hf, cost, there, longest, model.dtype.itemsize)]
        return found | {
            "memory": _memory(parts(cost, max(tokens, longest), recomputed), need, there), "would_fit": told,
        }  # fmt: skip
    tried = try_out(run, work, peak)
    seconds = {
        "setup": setup - opening,
        "training": tried.training(sizes),
        "evaluation": tried.held_out * work.held_out.sizes.sum() * evaluations(len(sizes), run.stage.eval_every),
        "reference": tried.reference * (work.used.sizes.sum() + work.held_out.sizes.sum()),
    }
    beside = _copy(run.stage, tried.state, len(sizes), seconds["training"])
    by_part = parts(cost, max(tokens, longest), recomputed, tried.peak) | {"a checkpoint": beside}
    return found | {
        "memory": _memory(by_part, tried.peak + beside, there),
        "disk": _disk(run, work, tried.state),
        "seconds": {name: float(value) for name, value in seconds.items()},
        "tried": {"tokens": tried.tokens, "seconds": tried.seconds, "reckoned_bytes": need},
    }


def _opened(recipe: Recipe, stage: Stage, start: Link, scratch: Path, ordered: list[Stage]) -> StageRun:
    """The stage as if it began with the recipe's model, writing nothing."""
    model, later = recipe.model, stage.from_ is not None
    tokens = isinstance(model, dict) and bool(model.get("add_tokens")) and later
    if tokens:  # its parent's model has them by then
        assert isinstance(model, dict)
        without = {k: v for k, v in model.items() if k != "add_tokens"}
        recipe = recipe.model_copy(update={"model": without})
    run, _ = open_stage(recipe, stage, start, scratch, scratch / stage.name)
    if tokens:
        from trivium.model.tokens import add_chat_tokens

        add_chat_tokens(run.model, int(stage.seed or 0))
    check_fit(run.model, recipe, ordered)
    return replace(run, folder=None, adapter_base=None)


def _memory(by_part: dict[str, float], peak: float, there: float) -> dict[str, Any]:
    return {"peak": float(peak), "available": float(there), **{k: float(v) for k, v in by_part.items()}}


def _copy(stage: Stage, state: int, steps: int, seconds: float) -> int:
    """Bytes of a checkpoint that is written beside the training, where one is due before its end."""
    if stage.save_every or stage.save_minutes:
        due = (stage.save_every or steps) < steps or 60 * (stage.save_minutes or seconds) < seconds
    else:
        due = seconds > LEAST_SECONDS
    on_cpu = str(stage.device).split(":")[0] == "cpu"  # a card's peak is told of the card alone
    return state if due and on_cpu and copied(stage, state) else 0


def _disk(run: StageRun, work: Work, state: int) -> dict[str, int]:
    """Bytes of the result, and of the checkpoints that are kept meanwhile."""
    model, last = run.model, int(run.stage.keep_checkpoints or 1)
    result = (model.parameters() if run.stage.full else model.trained_parameters()) * model.saved_dtype.itemsize
    return {"result": result, "checkpoints": (last + 1) * state}
