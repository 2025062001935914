"""What a process does while it looks at a hostile folder: a fork of this one, watched by ``sys.addaudithook``.

    seen = watched(act, Ground(folder, run))
    seen.faults      # one line for each thing that must not happen: code run, a socket, a file outside, one written

A hook cannot be removed, so that it lives in the fork alone; everything is imported before, and a fork is there at
once. The hook sees what Python does. What a library opens in Rust or C it does not see, so files that nobody may open
(bait) are watched by the kernel besides, with inotify.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import site
import struct
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIVEN_SECONDS = 2.0  # of the processor, for every look at a folder
HANGS_SECONDS = 30.0  # by the clock, on however slow a machine
MOST_MEMORY = 1 << 30  # bytes that a process may grow by
CODE = (".py", ".pyc", ".pyd", ".so", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
           "socket.sendmsg", "socket.__new__", "urllib.Request", "http.client.connect", "ftplib.connect")  # fmt: skip
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
             "os.startfile", "pty.spawn")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile", "os.setxattr")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OPENED = 0x20  # IN_OPEN


@dataclass(frozen=True)
class Ground:
    """Where a process may be: it reads ``folders``, and reads and writes ``run``; ``bait`` is opened by nobody."""

    folders: tuple[Path, ...]
    run: Path
    bait: tuple[Path, ...] = ()


@dataclass
class Seen:
    """What was said by each command and its exit code; seconds of the processor; and what must not be."""

    ended: list[tuple[int, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    grown: int = 0  # bytes
    faults: list[str] = field(default_factory=list)


class Hook:
    """Notes every event that must not be, as a line."""

    def __init__(self, ground: Ground) -> None:
        cache = [os.environ.get(name) for name in ("TRIVIUM_CACHE", "HF_HOME")]
        own = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), *site.getsitepackages(),
               str(Path(__file__).resolve().parents[2]), "/proc", "/sys", "/dev/null", "/dev/urandom"]  # fmt: skip
        self.writes = [real(p) for p in (ground.run, "/dev/null", "/proc/self/clear_refs", *filter(None, cache))]
        self.reads = [real(p) for p in (*ground.folders, *own)] + self.writes
        self.given = [real(p) for p in ground.folders]
        self.bait = [real(p) for p in ground.bait]
        self.faults: list[str] = []
        self.busy = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            told = self.fault(event, args)
        except Exception as error:  # else it would be raised where the event is
            told = f"the watcher failed: {error!r}"
        try:
            if told is not None and f"{event}: {told}" not in self.faults:
                self.faults.append(f"{event}: {told}")
        finally:
            self.busy = False

    def fault(self, event: str, args: tuple[Any, ...]) -> str | None:
        """What is wrong about an event; None: nothing."""
        if event == "open":
            return self.opened(*args[:3])
        if event in NETWORK or event in PROCESSES:
            return str(args)[:200]
        if event in CHANGES:
            paths = [a for a in args if isinstance(a, (str, bytes, os.PathLike))]
            if event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(args[-1], int) and args[-1] >= 0:
                # relative to a handle, as shutil.rmtree walks
                paths = [Path(f"/proc/self/fd/{args[-1]}").readlink() / os.fsdecode(p) for p in paths]
            return next((str(p) for p in paths if not self.may_write(parent_of(p))), None)
        if event == "exec":
            file = getattr(args[0], "co_filename", "")
            return f"code of {file}" if within(real(file), self.given) else None
        if event == "compile":
            file = args[1] if isinstance(args[1], (str, bytes)) else ""
            return f"code of {file!r}" if file and within(real(file), self.given) else None
        if event == "import":
            there = [place for place in args[1:2] if isinstance(place, str) and within(real(place), self.given)]
            return f"{args[0]} of {there[0]}" if there else None
        if event == "ctypes.dlopen":
            return str(args[0]) if args[0] and within(real(args[0]), self.given) else None
        if event == "pickle.find_class":
            return f"{args[0]}.{args[1]}"
        if event == "marshal.loads":
            caller = sys._getframe(2).f_code.co_filename
            return caller if "importlib" not in caller else None
        return None

    def may_write(self, place: str) -> bool:
        """Whether the nearest of the folders it is in is one that may be written to."""
        nearest = max((root for root in [*self.writes, *self.given] if within(place, [root])), key=len, default="")
        return nearest in self.writes

    def opened(self, path: Any, mode: Any, flags: Any) -> str | None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None  # a handle that is open already
        place = real(path)
        writing = bool(isinstance(flags, int) and flags & WRITES) or bool(
            isinstance(mode, str) and set(mode) & set("wax+")
        )
        if writing and not self.may_write(place):
            return f"{place} is written"
        if within(place, self.bait):
            return f"{place} is bait"
        if within(place, self.given) and place.endswith(CODE):
            return f"{place} is code"
        return None if within(place, self.reads) else f"{place} is outside"


def parent_of(path: Any) -> str:
    """Where a name stands: what it links to stays as it is when it is removed."""
    place = Path(os.fsdecode(path))
    return f"{real(place.parent)}/{place.name}"


def real(path: Any) -> str:
    return os.path.realpath(os.fsdecode(path))


def within(place: str, roots: Iterable[str]) -> bool:
    return any(place == root or place.startswith(root.rstrip("/") + "/") for root in roots)


def watched(acts: list[Callable[[], None]], ground: Ground) -> Seen:
    """Each of ``acts`` in one fork, one after the other; whatever ends one is noted. ``ground.bait`` is watched by the
    kernel. A process that hangs or takes all the memory is ended, and that is a fault, too."""
    with tempfile.TemporaryFile() as file, Bait(ground.bait) as bait:
        if not (pid := os.fork()):
            _child(acts, ground, file.fileno())
        fault = _wait(pid, HANGS_SECONDS)
        file.seek(0)
        told = json.loads(file.read() or b"{}")
        seen = Seen(**{**told, "ended": [tuple(one) for one in told.get("ended", [])]})
        seen.faults += [f"opened: {path}" for path in bait.opened()] + ([fault] if fault else [])
    return seen


def _child(acts: list[Callable[[], None]], ground: Ground, handle: int) -> None:
    """Carries out the acts, writes what was seen into ``handle``, and ends this process."""
    seen, hook = Seen(), Hook(ground)
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        said = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2 * MOST_MEMORY, now + 2 * MOST_MEMORY))
        before, at = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
        sys.addaudithook(hook)
        for act in acts:
            started = time.process_time()
            code = _ended(act)
            seen.seconds.append(time.process_time() - started)
            sys.stdout.flush()
            sys.stderr.flush()
            said.seek(at)
            seen.ended.append((code, said.read()))
            at = said.tell()
        seen.grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    finally:
        hook.busy = True
        seen.faults = hook.faults
        os.write(handle, json.dumps(vars(seen)).encode())
        os._exit(0)


def _ended(act: Callable[[], None]) -> int:
    """The exit code of an act; 1, and the traceback, where it raises what it should not."""
    from trivium.errors import UserError

    try:
        act()
    except SystemExit as end:
        return int(end.code or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _wait(pid: int, seconds: float) -> str | None:
    """Until the process has ended; what is wrong where it was killed, or has to be."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return None if not code else f"the process ended with {code}"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"the process hangs: more than {seconds:g} seconds"


class Bait:
    """Which of some files are opened, by whatever language: the kernel says."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.handle = self.libc.inotify_init1(os.O_NONBLOCK)
        self.names = {}
        for path in paths:
            if (number := self.libc.inotify_add_watch(self.handle, os.fsencode(path), OPENED)) >= 0:
                self.names[number] = str(path)

    def __enter__(self) -> Bait:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def opened(self) -> list[str]:
        """Those that were opened until now."""
        try:
            data = os.read(self.handle, 1 << 16)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at < len(data):
            number, mask, _, length = struct.unpack_from("iIII", data, at)
            found += [self.names[number]] if mask & OPENED else []  # else it was removed
            at += 16 + length
        return sorted(set(found))
