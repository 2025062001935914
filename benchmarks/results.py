"""What the runs of a job have given: medians and ranges, and whether the losses agree."""

from __future__ import annotations

import datetime
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import ROOT
from jobs import SETTINGS, Job
from rows import Prepared

# The largest share by which a loss may differ from trivium's in any step; the table tells what differs more. QLoRA's
# base is rounded by two libraries' code, and AdapterHub draws other first weights.
TOLERANCE = {"lora": 0.02, "qlora": 0.05, "full": 0.02, "bottleneck": 0.05}
OTHER_ORDER = 0.15  # where other rows meet in a step: of the means of all steps
SPREAD = ("seconds", "process_seconds", "first_step_seconds", "peak_bytes")


@dataclass(frozen=True)
class Entrant:
    """Who runs: trivium under one of the job's names, or a peer in a setting."""

    tool: str
    how: str = ""

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.how}" if self.how else self.tool


@dataclass
class Found:
    """What runs of an entrant have given, or why there is nothing."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def told_of(job: Job, ready: Prepared, found: dict[Entrant, Found], limits: list[dict[str, Any]]) -> dict[str, Any]:
    """What JOB.json holds."""
    ours = found[Entrant(next(iter(job.ours)))].runs
    losses = ours[0]["losses"] if ours else []
    return {
        "job": job.name, "kind": job.kind, "trained": job.trained, "aim": job.aim, "shown": seconds_of(job),
        "date": datetime.date.today().isoformat(), "processor": processor(), "model": Path(ready.model).name,
        "steps": len(ready.rates), "rows_in_step": rows_in_step(ready), "tokens": ready.tokens,
        "tokens_laid_out": sum(t for t, _ in ready.counts), "trained_tokens": sum(k for _, k in ready.counts),
        "sha256": ready.sha256, "tolerance": TOLERANCE[job.trained], "limit": middle(limits),
        "tools": [tool_of(job, one, kept, losses) for one, kept in found.items()],
    }  # fmt: skip


def tool_of(job: Job, one: Entrant, kept: Found, losses: list[float]) -> dict[str, Any]:
    """What one entrant's runs come to, against the losses of the job's first."""
    ours = one.tool in job.ours
    told: dict[str, Any] = {"tool": one.tool, "setting": one.how, "ours": ours}
    if kept.error or not kept.runs:
        return {**told, "error": hidden(kept.error) or "did not run"}
    for name in SPREAD:
        values = [run[name] for run in kept.runs]
        told[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    setting = None if ours else SETTINGS[one.how]
    other_order = setting is not None and setting.grouped
    tolerance = OTHER_ORDER if other_order else TOLERANCE[job.trained]
    first = next(iter(job.ours.values()))["method"]
    apart_by = apart(losses, kept.runs[0]["losses"], other_order)
    return {
        **told, "same_work": not ours or job.ours[one.tool]["method"] == first,
        "setting_keys": vars(setting) if setting else {},
        "recipe": job.ours.get(one.tool, {}), "other_order": other_order, "loss_difference": apart_by,
        "agrees": not losses or apart_by <= tolerance,
        **{k: kept.runs[0][k] for k in ("losses", "versions", "trained_parameters")},
        "runs": kept.runs,
    }  # fmt: skip


def rows_in_step(ready: Prepared) -> int:
    """Rows of a peer's step: for preferences, pairs."""
    return len(ready.steps[0])


def seconds_of(job: Job) -> str:
    return "first_step_seconds" if job.shown == "first step" else "seconds"


def middle(limits: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(limits, key=lambda one: one["seconds"])[(len(limits) - 1) // 2] if limits else {}


def apart(ours: list[float], theirs: list[float], on_average: bool) -> float:
    """The largest difference of two courses of losses, as a share; of other orders of rows that of their means."""
    if len(ours) != len(theirs) or not ours:
        return 1.0
    if on_average:
        ours, theirs = [statistics.mean(ours)], [statistics.mean(theirs)]
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(ours, theirs, strict=True))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def hidden(text: str) -> str:
    """A message without the places of this machine."""
    for place in (tempfile.gettempdir(), str(ROOT), str(Path.home())):
        text = text.replace(place, "...")
    return text[:300]
