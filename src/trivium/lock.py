"""One run at a time in a folder.

    with only_run(Path("runs/demo")): ...

The system itself holds the lock (flock) and lets go of it when the process ends, however it ends: a lock file that
nobody holds is left over from a process that was killed, and is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trivium.errors import BusyError
from trivium.files import BLOCK, clear_errors

LOCK = ".lock"
PATIENCE = 1.0  # seconds in which whoever has taken a lock writes who it is

_ours: dict[int, Path] = {}  # what this process holds


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[str | None]:
    """Hold ``folder`` for the block, or raise BusyError with who has it. Gives what is to be said of a lock that was
    left over, or None."""
    path = folder / LOCK
    with clear_errors(path, BLOCK):
        handle = _open(path)
    _ours[handle] = path
    try:
        left = _read(handle)
        os.ftruncate(handle, 0)
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
        with clear_errors(path, BLOCK):
            os.pwrite(handle, json.dumps(mine).encode(), 0)
        yield (
            f"process {left.get('pid')} on {left.get('host')} died in this folder; its lock is taken over"
            if left
            else None
        )
    finally:
        _let_go(handle)


def let_go() -> None:
    """At the end of the process, when no signal can come any more: one may have come amid the end of a block."""
    for handle in list(_ours):
        _let_go(handle)


def _let_go(handle: int) -> None:
    with contextlib.suppress(OSError):  # while it is still held: whoever waits for it looks again
        if _at(handle, _ours[handle]):  # else it was deleted before, and another's lies there
            _ours[handle].unlink()
    del _ours[handle]
    os.close(handle)


def _open(path: Path) -> int:
    """The lock file, held by this process. Raises BusyError."""
    patience = time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _held(handle):
            other = _read(handle)
            os.close(handle)
            if _alive(other) or time.monotonic() > patience:
                raise _busy(path, other)
            time.sleep(0.01)  # its holder has not yet written who it is, over what a dead one left
            continue
        with contextlib.suppress(FileNotFoundError):
            if _at(handle, path):
                return handle
        os.close(handle)  # its holder has just deleted it


def _at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that lies there. Raises FileNotFoundError."""
    return os.fstat(handle).st_ino == path.stat().st_ino


def _held(handle: int) -> bool:
    """Whether the lock is ours now. Where the file system has no locks, its holder's life decides."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return not _alive(_read(handle))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return not _alive(_read(handle))


def _alive(other: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock may still run: on another host nobody knows."""
    pid = other.get("pid")
    if not isinstance(pid, int):
        return False
    if other.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return _started(pid) == other.get("started")  # else its number was given to another


def _started(pid: int) -> str | None:
    """When a process began, as the system counts; None where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _busy(path: Path, other: dict[str, Any]) -> BusyError:
    who = f"process {other.get('pid', '?')} on {other.get('host', 'an unknown host')}"
    return BusyError(
        f"{path.parent}: another run is at work here ({who})", "wait for it, stop it, or choose another --out"
    )
