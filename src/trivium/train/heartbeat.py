"""Who of several processes still lives: a beat a second from each, and what becomes of the rest when one stops.

Two threads in each process, neither of which needs the main one, that may be in a long evaluation or wait for the
others. One carries beats to the launcher's store and reads those of the others; the other one only looks: at the beats'
age, and, of processes on this machine, at what the system says of them. So a store that hangs holds up nobody.

A process that is gone, frozen or silent is named; where it is on this machine it is ended for good; the others end
with exit code 75, and the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from trivium import interrupt
from trivium.errors import Interrupted, RecipeError

BEAT = 1.0  # seconds between two beats
SILENT = 20.0  # seconds without one, after which a process is taken for dead
LOOKS = 3  # at a process that the system does not know, two a second, before it is dead
BUSY = 300.0  # the same, where the system says that it runs: a library may hold up its threads
GRACE = 3.0  # seconds that the main thread has to end by itself
JOIN = 300.0  # seconds in which all have to be there: their imports may come over a slow network
AGAIN = "run the same command again to go on"
EX_TEMPFAIL = Interrupted.exit_code


def store_of(port: int, rank: int, count: int) -> tuple[Any, bool]:
    """The store through which the processes find each other, and whether the first of them holds it itself.

    torchrun holds it in its own process. Raises RecipeError.
    """
    from torch.distributed import DistError, TCPStore

    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            host, port, count, is_master=hosted and rank == 0, timeout=timedelta(seconds=JOIN), wait_for_workers=False
        )
    except (DistError, RuntimeError, OSError) as error:
        what = f"process {rank} cannot reach the others at {host}:{port} ({str(error).splitlines()[0][:120]})"
        remedy = "use a free port (torchrun --master_port), or check MASTER_ADDR and MASTER_PORT"
        raise RecipeError(what, remedy) from None
    return store, hosted


@dataclass
class Seen:
    """What is known of a process: where it runs, its last beat, and for how long there was none."""

    pid: int
    host: str
    machine: str
    started: str | None
    beats: int = -1
    stop: bool = False  # whether it was asked to end
    end: int | None = None  # the exit code with which it ends
    quiet: float = 0.0  # seconds, those left out in which this process was held up itself
    gone: int = 0  # looks in a row at which the system did not know it
    lost: bool = False  # whether it was found dead, frozen or silent

    @property
    def here(self) -> bool:
        """Whether it runs on this machine, in the same space of process numbers."""
        return self.machine == _machine()


class Watch:
    """This process's beat, and its look at the others; ``verdict`` is the exit code that another one's end demands."""

    def __init__(self, store: Any, rank: int, count: int, hosted: bool) -> None:
        from torch.distributed import PrefixStore

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.stores = [PrefixStore(f"trivium/{attempt}", store.clone()) for _ in range(2)]  # one waits for no other
        self.rank, self.count, self.hosted = rank, count, hosted
        self.seen: list[Seen] = []
        self.met = False  # whether all were there, and are watched
        self.verdict: int | None = None
        self.ending = False  # this process ends by itself
        self.end: int | None = None
        self.round = 0  # exchanges with the store
        self.store_quiet = 0.0
        self.store_broken = False
        self._now = threading.Event()
        self._told = False
        self._looking = threading.RLock()

    # --- the beginning

    def meet(self) -> None:
        """Wait for all, and begin to watch. Raises Interrupted where one does not come."""
        started = _life(os.getpid())[1]
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "started": started}
        store = self.stores[0]
        store.set(f"who/{self.rank}", json.dumps(mine))
        end = time.monotonic() + JOIN
        for rank in range(self.count):
            try:
                while not store.check([f"who/{rank}"]):  # in Python: a signal is heard
                    if time.monotonic() > end:
                        raise Interrupted(f"process {rank} did not come within {JOIN:.0f} s", AGAIN)
                    time.sleep(0.02)
                self.seen.append(Seen(**json.loads(store.get(f"who/{rank}"))))
            except RuntimeError:  # the store is gone
                raise Interrupted("a process ended before all had come", AGAIN) from None
        self.met = True
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name="heartbeat", daemon=True).start()

    def listed(self) -> str:
        """Where they run."""
        hosts: dict[str, list[str]] = {}
        for seen in self.seen:
            hosts.setdefault(seen.host, []).append(str(seen.pid))
        return "; ".join(f"pid {', '.join(pids)} on {host}" for host, pids in hosts.items())

    # --- the two threads

    def _beat(self) -> None:
        store, number = self.stores[0], 0
        keys = [f"beat/{rank}" for rank in range(self.count)]
        there: set[str] = set()
        while True:
            number += 1
            end = self.end
            try:
                store.set(keys[self.rank], json.dumps([number, interrupt.heard.is_set(), end]))
                there |= {key for key in keys if key not in there and store.check([key])}
                ready = [rank for rank, key in enumerate(keys) if key in there]
                for rank, told in zip(ready, store.multi_get([keys[r] for r in ready]), strict=True):
                    self._heard(self.seen[rank], *json.loads(told))
            except RuntimeError:  # the store is gone
                self.store_broken = True
                self._now.wait(BEAT)
                continue
            self.round += 1
            self.store_quiet = 0.0
            if end is None or self.end == end:
                self._now.wait(BEAT)
            self._now.clear()

    def _heard(self, seen: Seen, beats: int, stop: bool, end: int | None) -> None:
        if beats != seen.beats:
            seen.beats, seen.quiet = beats, 0.0
        seen.stop, seen.end = stop, end

    def _watch(self) -> None:
        last = time.monotonic()
        while self.end is None:
            time.sleep(BEAT / 2)
            now = time.monotonic()
            awake = min(now - last, BEAT)  # a process that was frozen itself has not listened meanwhile
            last = now
            for seen in self.seen:
                seen.quiet += awake
            self.store_quiet += awake
            if any(seen.stop for seen in self.seen) and not interrupt.heard.is_set():
                _ask_main()
            self.look()

    def look(self) -> None:
        """Whether all are well; else the verdict is given, told, and carried out."""
        with self._looking:
            if self.ending or self.verdict is not None:
                return
            for rank, seen in enumerate(self.seen):
                if rank == self.rank or seen.end == 0:
                    continue
                if seen.end is not None:
                    self._give(seen.end, None)
                elif (why := self._lost(rank, seen)) is not None:
                    seen.lost = True
                    self._give(EX_TEMPFAIL, f"process {rank} of {self.count} (pid {seen.pid} on {seen.host}) {why}")
                    return
            if self.verdict is None and (self.store_broken or self.store_quiet > SILENT):
                self._without_store()

    def _lost(self, rank: int, seen: Seen) -> str | None:
        """What has become of a process that has not said how it ends; None where it is well."""
        state = _life(seen.pid) if seen.here else None
        if state is not None:
            known = state[0] not in ("", "Z", "X") and (seen.started is None or state[1] == seen.started)
            seen.gone = 0 if known else seen.gone + 1
            if seen.gone:  # its last word may still be under way
                return "has died" if seen.gone >= LOOKS else None
        running = state is not None and state[0] in ("R", "S", "D")
        limit = BUSY if running else SILENT
        if seen.quiet > limit and (self.store_quiet <= SILENT or running):
            return self._ended_for_good(seen, f"has been silent for {seen.quiet:.0f} s")
        if self.hosted and rank == 0 and self.store_quiet > limit:
            return self._ended_for_good(seen, f"has been silent for {self.store_quiet:.0f} s")
        return None

    def _ended_for_good(self, seen: Seen, what: str) -> str:
        """A frozen process must not wake up beside the run that goes on."""
        if not seen.here:
            return what
        with contextlib.suppress(OSError):
            os.kill(seen.pid, signal.SIGKILL)
            return f"{what}, and was killed"
        return what

    def _without_store(self) -> None:
        """The store has gone with the one who held it."""
        if self.hosted:
            first = self.seen[0]
            if not first.here:  # else the system says in a moment whether it lives
                first.lost = True
                told = f"process 0 of {self.count} (pid {first.pid} on {first.host}) cannot be reached any more"
                self._give(EX_TEMPFAIL, told)
            return
        what = "has died" if self.store_broken else f"has been silent for {self.store_quiet:.0f} s"
        self._give(EX_TEMPFAIL, f"the launcher (torchrun) of process {self.rank} {what}")

    def _give(self, code: int, told: str | None) -> None:
        """The verdict. The main thread hears it where it waits for others; elsewhere it has a moment's grace."""
        if told is not None and self.first_to_tell():
            _say(f"error: {told}\n  {AGAIN}\n")
        self.verdict = code
        threading.Thread(target=self._end_soon, name="end", daemon=True).start()

    def _end_soon(self) -> None:
        time.sleep(GRACE)
        self.leave(self.verdict or EX_TEMPFAIL)
        os._exit(self.verdict or EX_TEMPFAIL)

    # --- what the main thread asks

    def check(self) -> None:
        """Raises SystemExit where the others' end demands that of this process."""
        if self.verdict is not None:
            sys.exit(self.verdict)

    def settle(self, patient: bool = False) -> None:
        """Wait until it is clear whether another process has ended: a moment, or as long as a silent one may take."""
        end = time.monotonic() + (SILENT + 5 if patient else 4.0)
        while self.verdict is None and time.monotonic() < end:
            time.sleep(0.05)

    def suspects(self) -> bool:
        """Whether another process seems to have ended."""
        return any(self._out_of_sight(seen) for rank, seen in enumerate(self.seen) if rank != self.rank)

    def end_of_first(self) -> int:
        """Wait for the end of the first process; returns its exit code."""
        while self.verdict is None and self.seen[0].end is None:
            time.sleep(0.02)
        return self.verdict if self.verdict is not None else int(self.seen[0].end or 0)

    def first_to_tell(self) -> bool:
        """Whether nobody has told yet why all end. Without an answer of the store, the first that lives tells."""
        if self._told:
            return False
        answer: list[int] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answer.append(self.stores[1].add("told", 1))

        if not (self.store_broken or (self.hosted and self.seen[0].lost)):
            asking = threading.Thread(target=ask, daemon=True)  # it may hang with the one who holds the store
            asking.start()
            asking.join(2.0)
        alive = [rank for rank, seen in enumerate(self.seen) if seen.end is None and not seen.lost]
        self._told = answer == [1] if answer else self.rank == min(alive, default=self.rank)
        return self._told

    def leave(self, code: int) -> None:
        """Say how this process ends. One that holds the store stays a moment, for the others to hear it."""
        self.ending, self.end = True, code
        if not self.met:
            return
        before = self.round
        self._now.set()
        end = time.monotonic() + GRACE
        while self.round < before + 2 and not self.store_broken and time.monotonic() < end:
            self._now.set()
            time.sleep(0.01)
        while self.hosted and self.rank == 0 and time.monotonic() < end:
            if all(s.end is not None or self._out_of_sight(s) for r, s in enumerate(self.seen) if r):
                break
            self._now.set()
            time.sleep(0.05)

    def _out_of_sight(self, seen: Seen) -> bool:
        return seen.here and _life(seen.pid)[0] in ("", "Z", "X")


def _ask_main() -> None:
    """As if this process had got the signal that another one got."""
    import _thread

    with contextlib.suppress(ValueError):
        _thread.interrupt_main(signal.SIGTERM)


def _say(text: str) -> None:
    """Whatever the main thread is in the middle of; also of a process that is silent otherwise."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _machine() -> str:
    """This machine since it was started, and the space of process numbers."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        found.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(found)


def _life(pid: int) -> tuple[str, str | None]:
    """A process's state as the system has it ("" where it knows none) and when it was started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return "", None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "", None
    except OSError:
        pass
    return "?", None
