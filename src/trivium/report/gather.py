"""What a report shows of a run, read from its folder: the summary, each stage's record and curve, the measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.errors import ModelError, beside, said
from trivium.files import MANIFEST, damage, read_json
from trivium.folder import RECORD, record_of
from trivium.measures import MEASURES, START
from trivium.summary import SHOWN, SUMMARY
from trivium.train.log import LOG, read_log

Json = dict[str, Any]


@dataclass(frozen=True)
class StageView:
    """One stage: what the summary says of it, its own record, the rows of ``metrics.jsonl``, its model's answers."""

    name: str
    summary: Json
    record: Json
    curve: list[Json]
    measured: Json

    @property
    def title(self) -> str:
        return f"{self.record['stage']}, {self.record['method']}"

    def points(self, key: str) -> list[tuple[float, float]]:
        """``(step, value)`` of every row of the curve that has ``key``."""
        return [(row["step"], row[key]) for row in self.curve if isinstance(row.get(key), (int, float))]

    @property
    def judged(self) -> Json:
        """A judge's verdicts on the finished model."""
        return _mapping(self.summary.get("judged", {}))


@dataclass(frozen=True)
class RunView:
    """A run: its stages in order, the prompts all its models answered, and the given model's measures, if any."""

    folder: Path
    name: str
    seed: int
    stages: list[StageView]
    prompts: list[str]
    start: Json = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The folder's name, which tells two runs of one recipe from each other."""
        return self.folder.resolve().name


def run_view(folder: Path) -> RunView:
    """Read a run's folder. Raises ModelError where it is none, or is damaged."""
    if not (folder / SUMMARY).is_file():
        remedy = f"give the folder that `trivium run` wrote into{beside(folder)}"
        have = "it has no summary.json" if folder.is_dir() else "there is no such folder"
        raise ModelError(f"{folder}: not a run of trivium, {have}", remedy)
    summary = read_json(folder / SUMMARY)
    try:
        models = _mapping(read_json(folder / MEASURES)) if (folder / MEASURES).is_file() else {}
        measured = _mapping(models.get("models", {}))
        stages = [_stage_view(folder, _mapping(s), measured) for s in summary["stages"]]
        return RunView(
            folder, str(summary["name"]), int(summary["seed"]), stages,
            [str(p) for p in models.get("prompts", [])], _mapping(measured.get(START, {})),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{folder / SUMMARY}: not a summary of trivium ({said(error, 80)})"
        raise ModelError(what, "run the recipe again: finished stages are kept") from None


def _stage_view(folder: Path, stage: Json, measured: Json) -> StageView:
    name = str(stage["name"])
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{name!r} is no stage's name")
    record = record_of(path)
    if record is None or any(key not in record for key in (*SHOWN, "settings", "rows", "versions", "data")):
        raise ModelError(f"{path}: not a finished stage", "run the recipe again: finished stages are kept")
    if (path / MANIFEST).is_file() and (reason := damage(path, only=(RECORD, LOG))) is not None:
        raise ModelError(reason, f"restore it, or delete {path} and run the recipe again")
    if any(key not in stage for key in SHOWN):
        raise ValueError(f"it says too little of {name}")
    mine = _mapping(measured.get(name, {}))
    if "against" in mine:
        _check_duels(folder / MEASURES, mine["against"])
    return StageView(name, stage, record, read_log(path / LOG), mine)


def _check_duels(file: Path, seen: Any) -> None:
    """What is shown of a model against its parent is all there; raises ModelError."""
    try:
        verdicts: list[Any] = seen["won"]["verdicts"] if seen.get("won") else [0.5] * len(seen["duels"])
        whole = isinstance(seen["line"], str) and len(verdicts) == len(seen["duels"]) and {*verdicts} <= {0, 0.5, 1}
        said = [duel[side] for duel in seen["duels"] for side in ("old", "new", "prompt")]
        whole = whole and all(isinstance(one, (str, list)) for one in said)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        what = f"{file}: what it says of a model against its parent is damaged"
        raise ModelError(what, "delete it, and run the recipe again: what is trained is kept")


def _mapping(value: Any) -> Json:
    if not isinstance(value, dict):
        raise TypeError("a mapping was expected")
    return value
