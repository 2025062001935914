"""Metrics where people have them: TensorBoard, Weights & Biases or Trackio, each through its own package.

Every tracker is handed the rows of ``metrics.jsonl``, as ``train/loss`` or ``eval/loss`` by step; a training that goes
on is shown from its beginning, so that no step is missing or there twice. None of them can change a result, and none
is imported unless ``track`` names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.errors import RecipeError

NONE = "none"
FOLDER = "tensorboard"  # of a run's folder, where TensorBoard's files go


@dataclass(frozen=True)
class Tracker:
    """``log(values, step)`` and ``close()`` of whatever package it is."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of ``metrics.jsonl``."""
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
        evaluated = {k for k in numbers if k.startswith("eval_")}
        names = {k: f"eval/{k.removeprefix('eval_')}" if k in evaluated else f"train/{k}" for k in numbers}
        self.log({names[k]: v for k, v in numbers.items()}, int(row["step"]))


def _tensorboard(run: str, stage: str, out: Path, settings: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    folder = out / FOLDER / stage
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not end
    writer: Any = SummaryWriter(str(folder), flush_secs=10)  # on a thread of its own
    writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in sorted(settings.items())))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(run: str, stage: str, out: Path, settings: dict[str, Any]) -> Tracker:
    wandb: Any = importlib.import_module("wandb")
    opened = wandb.init(project=run, name=stage, dir=str(out), config=settings, reinit="finish_previous")
    return Tracker(lambda values, step: opened.log(values, step=step), opened.finish)


def _trackio(run: str, stage: str, out: Path, settings: dict[str, Any]) -> Tracker:
    trackio: Any = importlib.import_module("trackio")
    opened = trackio.init(project=run, name=stage, config=settings)
    return Tracker(lambda values, step: opened.log(values, step=step), opened.finish)


TRACKERS: dict[str, Callable[[str, str, Path, dict[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def check_tracker(name: str) -> None:
    """Raises RecipeError where the package that ``track`` names is not installed."""
    if name != NONE and importlib.util.find_spec(name) is None:
        raise RecipeError(f"track: {name} is not installed", f'pip install "trivium[{name}]", or track: none')


def open_tracker(name: str, run: str, stage: str, out: Path, settings: dict[str, Any]) -> Tracker | None:
    """A tracker for one stage of a run, or None; ``settings`` are shown beside its curves."""
    os.environ.setdefault("WANDB_SILENT", "true")  # our own lines say what goes on
    return None if name == NONE else TRACKERS[name](run, stage, out, settings)
