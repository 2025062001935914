"""Disks that fail, fill up, or lose what was not made durable: functions to put in the place of `files.operation`."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.crash.process import Process

from trivium import files

Act = Callable[[], Any]


class Counting:
    """Counts operations, and does something else at the ``at``-th (from 1)."""

    def __init__(self, at: int = 0, only: str = "") -> None:
        self.at, self.only, self.done = at, only, 0
        self.seen: list[tuple[str, Path]] = []

    def __call__(self, name: str, path: Path, act: Act) -> Any:
        if not self.only or self.only == name:
            self.seen.append((name, path))
            self.done += 1
            if self.done == self.at:
                return self.fault(name, path, act)
        return act()

    def fault(self, name: str, path: Path, act: Act) -> Any:
        raise NotImplementedError


class Full(Counting):
    """No room at this operation, and at every later one that would take some. A write gets half of it done first."""

    def __call__(self, name: str, path: Path, act: Act) -> Any:
        self.seen.append((name, path))
        self.done += 1
        if self.done >= self.at and name != "remove":
            if name == "write":
                act()
                cut(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return act()


class Dies(Counting):
    """The process is killed just before this operation, or (a write) in the middle of it."""

    def fault(self, name: str, path: Path, act: Act) -> Any:
        if name == "write":
            act()
            cut(path)
        os.kill(os.getpid(), signal.SIGKILL)


class Asked(Counting):
    """Somebody asks for an end just before this operation, ``times`` in a row."""

    def __init__(self, at: int, number: int, times: int) -> None:
        super().__init__(at)
        self.number, self.times = number, times

    def fault(self, name: str, path: Path, act: Act) -> Any:
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)
        return act()


class PowerCut(Counting):
    """The machine loses its power at this operation: what was not made durable is gone.

    A file that was written and not fsynced since is empty; a rename whose folder was not fsynced since is undone, and
    what was deleted is gone, which is the worse case of the two.
    """

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.unsure: set[Path] = set()  # written, not yet durable
        self.renamed: list[tuple[Path, Path, bytes | None]] = []  # (from, to, what was there before)

    def __call__(self, name: str, path: Path, act: Act) -> Any:
        self.seen.append((name, path))
        self.done += 1
        if self.done == self.at:
            self.cut()
        before = files_below(path)
        if name == "rename":
            return self.rename(path, act)
        act()
        if name == "write":
            self.unsure |= files_below(path) - (before if path.is_dir() else set())
        elif name == "fsync":
            self.unsure.discard(path)
            self.renamed = [one for one in self.renamed if one[1].parent != path]
        return None

    def rename(self, path: Path, act: Act) -> None:
        held = path.read_bytes() if path.is_file() else None
        names = set(path.parent.iterdir())
        act()
        gone = names - set(path.parent.iterdir())
        assert len(gone) == 1, f"a rename moves one thing: {gone}"
        source = gone.pop()
        self.renamed.append((source, path, held))
        self.unsure = {moved(p, source, path) for p in self.unsure}

    def cut(self) -> None:
        for file in self.unsure:
            if file.is_file():
                file.write_bytes(b"")
        for source, path, held in reversed(self.renamed):
            if path.exists() and not source.exists():
                path.rename(source)
                if held is not None:
                    path.write_bytes(held)
        os.kill(os.getpid(), signal.SIGKILL)


def moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


def files_below(path: Path) -> set[Path]:
    return {p for p in path.rglob("*") if p.is_file()} if path.is_dir() else {path} if path.is_file() else set()


def cut(path: Path) -> None:
    """Half of what a write wrote."""
    for file in files_below(path):
        os.truncate(file, file.stat().st_size // 2)


def put(operation: Any) -> None:
    files.operation = operation


def operations(recipe: Path) -> int:
    """How many operations an unbroken run takes, once its data is prepared."""
    reader, writer = os.pipe()

    def tell(name: str, path: Path, act: Callable[[], object]) -> object:
        os.write(writer, b".")
        return act()

    ended = Process(recipe, meanwhile=lambda: put(tell)).wait()
    os.close(writer)
    assert ended.code == 0, ended.said
    count = len(os.read(reader, 1 << 16))
    os.close(reader)
    return count
