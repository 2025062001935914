"""Checkpoints of a training: whole or absent, verified, the newest good one found again.

    kept = Checkpoints(Path("runs/x/chat.training/3fa9"), about={"identity": "3fa9..."}, last=2)
    found = kept.newest()                       # verified; what was rejected, and why, is in kept.rejected
    kept.save(120, tensors, state, texts)       # at once, or beside the training
    kept.wait()

A checkpoint is a folder ``step-00000120`` of safetensors and JSON, its manifest written last. Old ones go when the
new one has been read back: the last ``last`` stay, and the one called the best.

Cost: each file is hashed when it is written and when it is read back; beside the training, a copy of the state.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.errors import CheckpointError, DiskError, ModelError
from trivium.files import (
    MANIFEST,
    damage,
    make_folder,
    read_json,
    read_tensors,
    remove_folder,
    sweep,
    whole_folder,
    write_json,
    write_tensors,
    write_text,
)
from trivium.model.headers import header

if TYPE_CHECKING:
    from torch import Tensor

STATE = "state.json"
TYPES: dict[str, Any] = {
    "steps": int, "step": int, "elapsed": (int, float), "peak": int, "best": dict, "about": dict, "costs": dict,
    "saving": dict, "how": dict, "accepted": list, "date": str,
}  # fmt: skip
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors, by file."""
        return read_tensors(self.folder)


@dataclass
class Costs:
    """What saving has cost: seconds of the training's own time, which its owner enters, and of a thread beside it."""

    saved: int = 0
    bytes: int = 0  # of the last one
    seconds: float = 0.0
    seconds_beside: float = 0.0


@dataclass
class Checkpoints:
    """The checkpoints of one training in ``folder``; ``about`` is in each one's manifest and must be in it again."""

    folder: Path
    about: Mapping[str, Any]
    last: int = 2
    best: int | None = None  # the step of the best one, which stays
    rejected: list[str] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of the last one's tensors, by file

    def __post_init__(self) -> None:
        self._bad: set[int] = set()  # steps whose checkpoint is damaged
        self._thread: threading.Thread | None = None
        self._written = threading.Event()  # set when the thread is through
        self._failed: BaseException | None = None

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole; sweeps what unfinished saves left. None where none was ever finished.

        Raises CheckpointError where there are some and all are damaged.
        """
        if not self.folder.is_dir():
            return None
        sweep(self.folder)
        for step in reversed(steps_in(self.folder)):
            if (found := self.at(step)) is not None:
                self._enter(found.folder)
                return found
        if self.rejected:
            raise CheckpointError(
                f"no checkpoint is whole: {self.rejected[0]}"
                + (f", and {len(self.rejected) - 1} more" if len(self.rejected) > 1 else ""),
                "restore it from a copy, or start over with --fresh, which keeps this folder aside",
            )
        return None

    def at(self, step: int) -> Found | None:
        """The checkpoint of a step, where it is whole; else the reason is added to ``rejected``."""
        folder = self._folder(step)
        reason, state = damage(folder, {**self.about, "step": step}), None
        if reason is None:
            try:
                state = _contents(folder)
            except ModelError as error:  # sealed as it is, and yet none of ours
                reason = error.what
        if state is None:
            self.rejected.append(reason or f"{folder / STATE} is damaged")
            self._bad.add(step)
            return None
        return Found(folder, step, state)

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any],
        texts: Mapping[str, str], beside: bool = False, best: bool = False,
    ) -> None:  # fmt: skip
        """Write the checkpoint of ``step``. ``beside``: on a thread, whose failure the next call or `wait` raises.

        Raises DiskError; what was saved before is then as it was.
        """
        self.wait()
        make_folder(self.folder)

        def write() -> None:
            with whole_folder(self._folder(step), {**self.about, "step": step}) as partial:
                for name, group in tensors.items():
                    write_tensors(partial / f"{name}.safetensors", group)
                for name, text in texts.items():
                    write_text(partial / name, text)
                write_json(partial / STATE, state)
            self._verified(step)
            if best:
                self.best = step
            self._let_go(step)

        if beside:
            self._written.clear()
            self._thread = threading.Thread(target=self._caught, args=(write,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()
        self.costs.saved += 1

    def _caught(self, write: Any) -> None:
        started = time.perf_counter()
        try:
            write()
        except BaseException as error:  # raised where the training can hear it
            self._failed = error
        finally:
            self.costs.seconds_beside += time.perf_counter() - started
            self._written.set()

    @property
    def writing(self) -> bool:
        """Whether a thread is at it."""
        return self._thread is not None and not self._written.is_set()

    def wait(self) -> None:
        """Until nothing is being written any more. Raises what a save beside the training failed of."""
        if self._thread is not None:
            self._written.wait()  # not `join`: before Python 3.13 one that a signal breaks off takes it for ended
            self._thread = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def _verified(self, step: int) -> None:
        """Read back what was written, from the disk itself where the system allows it."""
        folder = self._folder(step)
        if hasattr(os, "posix_fadvise"):
            for file in folder.glob("*.safetensors"):
                with contextlib.suppress(OSError), file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reason = damage(folder, {**self.about, "step": step})
        if reason is not None:
            raise DiskError(
                f"{reason}, just after it was written", "look after this disk; the checkpoints before it are kept"
            )
        self._enter(folder)

    def _enter(self, folder: Path) -> None:
        """The size and the hashes of a checkpoint that is whole."""
        listed = read_json(folder / MANIFEST)["files"]
        self.costs.bytes = sum(entry[0] for entry in listed.values())
        self.hashes = {name: entry[1] for name, entry in listed.items() if name.endswith(".safetensors")}

    def _let_go(self, step: int) -> None:
        """Delete what is neither among the last up to ``step``, which is whole, nor the best."""
        self._bad.discard(step)
        steps = [s for s in steps_in(self.folder) if s <= step]
        kept = [s for s in steps if s not in self._bad][-self.last :]
        for old in set(steps) - {*kept, self.best}:
            remove_folder(self._folder(old))

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"


def _contents(folder: Path) -> dict[str, Any] | None:
    """The state of a checkpoint whose tensors can be read; None where it is none. Raises ModelError."""
    for name in read_json(folder / MANIFEST)["files"]:
        if name.endswith(".safetensors"):
            header(folder / name)
    state = read_json(folder / STATE)
    if not isinstance(state, dict):
        return None
    if any(not isinstance(state[k], kind) for k, kind in TYPES.items() if state.get(k) is not None):
        return None
    costs = [n for key in ("costs", "saving") for n in (state.get(key) or {}).values()]
    return state if all(isinstance(n, (int, float)) for n in costs) else None


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending, whole or not."""
    names: Iterable[str] = (p.name for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(found[1]) for name in names if (found := NAME.fullmatch(name)))


def peek(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be read, unverified; None where there is none."""
    for step in reversed(steps_in(folder)):
        file = folder / f"step-{step:08}" / STATE
        with contextlib.suppress(Exception):
            state = read_json(file) if not file.is_symlink() else None
            if isinstance(state, dict):
                return state
    return None
