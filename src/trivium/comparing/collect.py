"""The numbers of a comparison, from the runs' own folders: of each run, and mean and spread of each way."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.comparing.plan import Plan, Way
from trivium.errors import UserError
from trivium.files import sha256_json
from trivium.report.gather import StageView, run_view

TASKS = 10  # what several tasks cost: so many
COPIED = (
    "trained_parameters", "total_parameters", "bytes_on_disk", "peak_memory_bytes", "seconds", "tokens_per_second",
    "tokens", "trained_tokens",
)  # fmt: skip

Json = dict[str, Any]


def run_numbers(folder: Path, told: Mapping[str, Any]) -> Json:
    """What a finished run of one stage cost and gave; ``told`` is what its process added."""
    run = run_view(folder)
    view = run.stages[-1]
    metrics, bits = view.record["metrics"], view.summary.get("text_bits_per_byte", {})
    found = {key: view.record[key] for key in COPIED}
    found |= {"identity": view.record["identity"], "steps": view.record["steps"], "rows": view.record["rows"]["used"]}
    for name in ("loss", "accuracy"):
        found |= {f"{name}_before": metrics.get(f"before_{name}"), name: metrics.get(f"after_{name}")}
    found |= {"bits_per_byte_before": bits.get("before"), "bits_per_byte": bits.get("after")}
    start = run.start.get("judged", {})
    found["judged"] = {name: one["share"] for name, one in view.judged.items() if "share" in one}
    found["judged_before"] = {f"{name}_before": start[name]["share"] for name in found["judged"] if name in start}
    found["order"] = _order(view)
    found["saved_dtype"] = view.record["dtype"]["saved"]
    return found | {"merge_difference": told.get("merge_difference")}


def _order(view: StageView) -> str:
    """What tells one order of rows from another: the trained tokens of every step."""
    return sha256_json([[row["step"], row.get("trained_tokens")] for row in view.curve if "loss" in row])


def collected(plan: Plan, runs: Mapping[str, Mapping[int, Json]], errors: Mapping[str, UserError]) -> Json:
    """``compare.json``: every way with its runs by seed, their mean and spread, or why it was not trained."""
    ways = [_way(way, runs.get(way.name, {}), errors.get(way.name)) for way in plan.ways]
    base = _base_bytes(ways)
    for way in ways:
        per_task = way["mean"].get("bytes_on_disk")
        if per_task is not None:
            shared = 0 if way["method"]["name"] == "full" else base
            way["mean"]["bytes_of_tasks"] = shared + TASKS * per_task
    return {
        "trivium": 1,
        "name": plan.recipe.name,
        "stage": plan.stage.name,
        "kind": plan.stage.stage,
        "from": plan.stage.from_ or "the given model",
        "seeds": plan.seeds,
        "tasks": TASKS,
        "base_bytes": base,
        "quality": _quality(ways),
        "same_rows": same_rows(ways),
        "ways": ways,
    }


def _way(way: Way, runs: Mapping[int, Json], error: UserError | None) -> Json:
    found: Json = {"name": way.name, "method": way.method, "learning_rate": way.learning_rate}
    told = [{"seed": seed, "folder": f"{way.name}/seed{seed}", **run} for seed, run in runs.items()]
    found |= {"runs": told, "mean": _over(list(runs.values()), statistics.fmean)}
    found["spread"] = _over(list(runs.values()), statistics.stdev) if len(runs) > 1 else {}
    if error is not None:
        found["error"] = {"what": error.what, "remedy": error.remedy, "exit_code": error.exit_code}
    return found


def _over(runs: Sequence[Json], act: Any) -> Json:
    """``act`` on every number that all runs have; verdicts of a judge are numbers by their name."""
    flat = [{**run, **run["judged"], **run["judged_before"]} for run in runs]
    keys = [k for k, v in flat[0].items() if isinstance(v, (int, float)) and k != "rows"] if flat else []
    return {k: act([one[k] for one in flat]) for k in keys if all(one.get(k) is not None for one in flat)}


def _quality(ways: Sequence[Json]) -> Json | None:
    """What the ways are ranked by: a judge's first verdict, else accuracy, else the held-out loss."""
    judged = [name for way in ways for run in way["runs"] for name in run["judged"]][:1]
    for key in (*judged, "accuracy", "loss"):
        if any(key in way["mean"] for way in ways):
            name = {"loss": "held-out loss"}.get(key, key)
            return {"key": key, "name": name, "higher_is_better": key != "loss", "share": key != "loss"}
    return None


def _base_bytes(ways: Sequence[Json]) -> int:
    """The weights of the model that adapters stand on, in the dtype in which it is saved."""
    runs = [(way["method"], run) for way in ways for run in way["runs"]]
    full = [run["bytes_on_disk"] for method, run in runs if method["name"] == "full"]
    if full or not runs:
        return int(full[0]) if full else 0
    size = 4 if runs[0][1]["saved_dtype"].endswith("float32") else 2
    return min(int(run["total_parameters"]) - int(run["trained_parameters"]) for _, run in runs) * size


def same_rows(ways: Sequence[Json]) -> str:
    """One line: whether all ways of a seed were trained on the same rows in the same order, else what differs."""
    by_seed: dict[int, list[tuple[str, Json]]] = {}
    for way in ways:
        for run in way["runs"]:
            by_seed.setdefault(run["seed"], []).append((way["name"], run))
    for seed, runs in by_seed.items():
        first, than = runs[0]
        for name, run in runs[1:]:
            for key, what in (("rows", "rows"), ("steps", "steps"), ("trained_tokens", "trained tokens")):
                if run[key] != than[key]:
                    return f"not the same: {name} had {run[key]:,} {what}, {first} {than[key]:,} (seed {seed})"
            if run["order"] != than["order"]:
                return f"not the same: {name} had the rows in another order than {first} (seed {seed})"
    if not by_seed:
        return "nothing was trained"
    _, run = next(iter(by_seed.values()))[0]
    each = f", for each of {len(by_seed)} seeds" if len(by_seed) > 1 else ""
    return (
        f"the same {run['rows']:,} in the same order for every way; {run['steps']:,} steps, "
        f"{run['trained_tokens']:,} trained tokens{each}"
    )
