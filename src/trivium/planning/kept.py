"""The plan in a run's folder, and beside it what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.errors import ModelError
from trivium.files import read_json
from trivium.terminal import clock, size

PLAN = "plan.json"
TIMES = ("training", "evaluation", "reference")  # those that a stage's own record speaks of


def planned_of(out: Path, identity: str) -> dict[str, Any]:
    """``{"planned": {"seconds", "peak"}}`` of the stage of this identity; ``{}`` where nothing was planned."""
    try:
        found = read_json(out / PLAN) if (out / PLAN).is_file() else None
    except ModelError:  # it is only shown
        return {}
    stages = found.get("stages") if isinstance(found, dict) else None
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and stage.get("identity") == identity:
            seconds, memory = stage.get("seconds"), stage.get("memory")
            if isinstance(seconds, dict) and isinstance(memory, dict):
                return {"planned": {"seconds": sum(seconds.get(k, 0.0) for k in TIMES), "peak": memory.get("peak", 0)}}
    return {}


def beside(stage: dict[str, Any]) -> list[str]:
    """What was planned of a stage of a summary and what came, in words; nothing where nothing was planned."""
    plan = stage.get("planned")
    if not plan:
        return []
    came, held = stage["seconds"] + stage["eval_seconds"], stage["peak_memory_bytes"]
    return [
        f"planned {clock(plan['seconds'])}, taken {clock(came)} ({_off(plan['seconds'], came)})",
        f"planned {size(plan['peak'])}, held {size(held)} ({_off(plan['peak'], held)})",
    ]


def _off(planned: float, came: float) -> str:
    """How far the plan was off."""
    return f"{planned / came - 1:+.0%}" if came else "-"
