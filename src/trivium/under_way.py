"""A stage under way: the folder of its checkpoints, and whether what is there is the beginning of what is asked for.

    runs/x/chat.training/3fa9c1d2e4b5/      checkpoints, the log so far, the parent's numbers, a journal of attempts

The folder's name is a hash of all that can change the training: another recipe has another folder, and going back to
the former one goes on where it was. Where nothing but the data has changed the user is asked: it was hardly meant.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium import __version__
from trivium.errors import DataError
from trivium.files import append_line, folder_bytes, make_folder, read_lines, remove_folder, sweep
from trivium.terminal import say, shown, size
from trivium.train.checkpoint import peek

if TYPE_CHECKING:
    from trivium.recipe import Stage

TRAINING = ".training"
JOURNAL = "journal.jsonl"
NO_LONGER = "no longer promised: every example once per epoch, and the result of an unbroken run"


@dataclass
class UnderWay:
    """``about`` is kept in every checkpoint: the hash of the training, its parent, settings, and data files' hashes.

    ``date`` is the date that the chat template was told when the training began.
    """

    folder: Path
    about: dict[str, Any]
    date: str | None = None
    accepted: list[str] = field(default_factory=list)  # data files that changed with the user's consent

    def attempt(self, **told: Any) -> None:
        """Note in the journal that the training begins or goes on."""
        make_folder(self.folder)
        append_line(self.folder / JOURNAL, json.dumps({"pid": os.getpid(), "host": platform.node(), **told}))

    def attempts(self) -> list[dict[str, Any]]:
        """The journal's lines that can be read."""
        return read_lines(self.folder / JOURNAL)

    @classmethod
    def of(cls, out: Path, name: str, about: Mapping[str, Any]) -> UnderWay:
        """A training's folder, in order again if a process died in it."""
        training = out / f"{name}{TRAINING}"
        sweep(training)
        return cls(training / str(about["training"])[:12], dict(about))

    def done(self, stage: Stage, record: Mapping[str, Any]) -> None:
        """The stage is finished, its ``record`` written: its checkpoints go, but where the best was an earlier one."""
        if self.folder.is_dir():
            best, last = record.get("events", {}).get("best") or {}, record["metrics"].get("after_loss", math.inf)
            if stage.result != "best" and best.get("loss", math.inf) < last:
                say(f"  the held-out loss was lowest after step {best['step']}: {best['loss']:.4f}")
                kept = f"{shown(self.folder)} ({size(folder_bytes(self.folder))})"
                say(f"  its checkpoint is kept in {kept}: result: best takes that model, without training again")
                return
            remove_folder(self.folder)
        training = self.folder.parent
        if training.is_dir() and not any(training.iterdir()):
            training.rmdir()


def under_way(out: Path, name: str, about: Mapping[str, Any], accept_changed_data: bool = False) -> UnderWay:
    """Where the stage's training goes on or begins. Raises DataError where its data has changed meanwhile."""
    mine = UnderWay.of(out, name, about)
    training = mine.folder.parent
    folders = [mine.folder, *(sorted(training.iterdir()) if training.is_dir() else [])]
    found = {folder: state for folder in folders if (state := peek(folder)) is not None and _whole(state)}
    # of a finished training only the best checkpoint is kept: new data or settings are meant, and nothing is lost
    found = {f: s for f, s in found.items() if f == mine.folder or s.get("step") != s.get("steps")}
    for folder, state in found.items():
        before = state.get("about", {})
        if any(before.get(k) != about[k] for k in ("parent", "settings")):
            continue
        mine.date, mine.accepted = state.get("date"), state.get("accepted", [])
        if before.get("training") != about["training"]:
            mine.accepted = [*mine.accepted, *_changed_data(name, state, about["data"], accept_changed_data)]
            if folder != mine.folder:
                remove_folder(mine.folder)
                folder.rename(mine.folder)
        return mine
    elsewhere = [f for f in out.glob(f"*{TRAINING}/{mine.folder.name}") if f != mine.folder and peek(f) is not None]
    for folder in elsewhere:
        say(f"  note: this very training is under way as another stage, in {shown(folder)}; this one starts at step 1")
    for folder, state in found.items():
        apart = _apart(state.get("about", {}), about)
        say(f"  note: {name} was under way at step {state.get('step')} with {apart}: that training is kept in")
        say(f"  {shown(folder)}; this one starts at step 1")
    return mine


def _whole(state: Mapping[str, Any]) -> bool:
    """Whether what is read of a state before it is verified has the types it should have."""
    about, accepted = state.get("about", {}), state.get("accepted", [])
    told = isinstance(about, dict) and all(isinstance(about.get(key, {}), dict) for key in ("settings", "data"))
    return told and isinstance(accepted, list) and isinstance(state.get("date"), (str, type(None)))


def _changed_data(name: str, state: Mapping[str, Any], now: Mapping[str, str], accept: bool) -> list[str]:
    """The files that have changed, with the user's consent. Raises DataError without it."""
    changed = differing(state.get("about", {}).get("data", {}), now)
    if not accept:
        where = f"step {state.get('step')} of {state.get('steps')}"
        raise DataError(
            f"{', '.join(changed)}: changed since {name} was interrupted at {where}",
            f"put it back; or --accept-changed-data goes on with it ({NO_LONGER}); or --fresh starts over",
        )
    say(f"  note: goes on with changed data ({', '.join(changed)}); {NO_LONGER}")
    return changed


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files that are not the same in both, by path; where only the order is another, all."""
    found = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    return found or list(now)


def _apart(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What other settings a training had, in words."""
    if before.get("parent") != now["parent"]:
        return "another parent"
    then, wanted = before.get("settings", {}), now["settings"]
    names = [k for k in {**then, **wanted} if then.get(k) != wanted.get(k)]
    return ", ".join(f"{k} {then.get(k)} (now {wanted.get(k)})" for k in names[:3]) or "other settings"


def versions() -> dict[str, str]:
    """What a result may depend on beside the recipe, to the last bit."""
    import torch
    import transformers

    return {
        "trivium": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
