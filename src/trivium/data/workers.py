"""Parts of prepared data, made here or by processes of their own, one per core.

    python -m trivium.data.workers      what such a process runs; it reads blocks from its input and answers with parts

A process gets its tokenizer and template once, then blocks, as frames: two lengths, a JSON header, bytes. It ends when
its input does, so none outlives the run that started it. Nothing of the run's own is imported in it, or run twice.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from trivium.data.blocks import Block
from trivium.data.chat import ChatTemplate
from trivium.data.encoder import Encoder
from trivium.data.examples import Maker, Spec
from trivium.data.formats import Fields
from trivium.data.readers import rows_of
from trivium.data.store import encode_part
from trivium.errors import DataError
from trivium.terminal import say

LIVES = 3  # processes that may die of a block, before it is taken for the cause
_LENGTHS = struct.Struct("<QQ")


@dataclass(frozen=True)
class Job:
    """A block, whose file it is of, and what its fields are called."""

    block: Block
    file: int
    name: str
    fields: Fields = ()


Part = tuple[dict[str, Any], bytes]  # the account of the rows, and the Arrow file of the examples


def part_of(maker: Maker, job: Job) -> Part:
    """Make the examples of a block. The account: rows read, what is counted, and every row that is not used, as
    (line, reason, tokens if over-long, row); and what the bytes must be."""
    collects = gc.isenabled()
    gc.disable()  # a block makes a million things, none of them in a circle: looking for circles takes long
    try:
        made = maker.make(rows_of(job.block, job.name), job.fields)
        data = encode_part(made, job.file)
    finally:
        if collects:
            gc.enable()
    too_long = f"tokens, more than {maker.spec.limit}"
    bad: list[tuple[int, str, int | None, str]] = [(line, why, None, row) for line, why, row in made.set_aside]
    bad += [(line, f"over-long: {tokens} {too_long}", tokens, row) for line, tokens, row in made.over_long]
    account = {"read": made.read, "counts": dict(made.counts), "bad": sorted(bad, key=lambda place: place[0]),
               "file": job.file, "bytes": len(data), "crc32": zlib.crc32(data)}  # fmt: skip
    return account, data


class Here:
    """Makes parts in this process: for little data, which a process would take longer to start for."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker

    def submit(self, job: Job) -> Future[Part]:
        done: Future[Part] = Future()
        done.set_result(part_of(self.maker, job))
        return done

    def close(self) -> None: ...


class Workers:
    """Makes parts in ``count`` processes."""

    def __init__(self, maker: Maker, count: int) -> None:
        self.setup = {"spec": asdict(maker.spec), "encoder": maker.encoder.dump(),
                      "template": None if maker.template is None else maker.template.dump()}  # fmt: skip
        self.closed, self.lock = False, threading.Lock()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(count)
        for _ in range(count):
            self.idle.put(self._started())

    def _started(self) -> subprocess.Popen[bytes]:
        """A new process, which knows its tokenizer and template."""
        known = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, known)),
        }
        command = [sys.executable, "-m", "trivium.data.workers"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.processes.append(process)
        assert process.stdin is not None, "its input is a pipe"
        with contextlib.suppress(OSError):  # one that is dead already is noticed when it is asked
            _send(process.stdin, self.setup, b"")
        return process

    def submit(self, job: Job) -> Future[Part]:
        return self.threads.submit(self._asked, job)

    def _asked(self, job: Job) -> Part:
        """The part, of another process if one dies at it. Raises DataError where they all do."""
        process = self.idle.get()
        try:
            for died in range(LIVES):
                if (answer := self._answer(process, job)) is not None:
                    account, data = answer
                    return account | {"counts": account["counts"] | ({"died": died} if died else {})}, data
                code = process.wait()
                with self.lock:  # none may be started when the others are being ended
                    if self.closed:
                        raise ChildProcessError("the preparation was ended")
                    say(f"  a process that prepares data died ({_ending(code)}); its rows are prepared again")
                    process = self._started()
        finally:
            self.idle.put(process)
        raise DataError(
            f"{job.name}:{job.block.line}: {LIVES} processes died preparing the rows from here on ({_ending(code)})",
            "free memory for them, or look at these rows; what was prepared before is kept",
        )

    def _answer(self, process: subprocess.Popen[bytes], job: Job) -> Part | None:
        """What a process makes of a block; None where it dies."""
        assert process.stdin is not None, "its input is a pipe"
        assert process.stdout is not None, "its output is a pipe"
        block = job.block
        data = json.dumps(block.read).encode("utf-8") if block.form == "rows" else block.data
        header = {"form": block.form, "line": block.line, "file": job.file, "name": job.name, "fields": job.fields}
        try:
            _send(process.stdin, header, data)
            return _receive(process.stdout)
        except (OSError, ValueError):  # ValueError: closed meanwhile
            return None

    def close(self) -> None:
        """End the processes, also amid a block."""
        with self.lock:
            self.closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()
        self.threads.shutdown(wait=True)
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was still to be written to a process that is gone
                    if stream is not None:
                        stream.close()


def _ending(code: int) -> str:
    """How a process ended, in words."""
    return f"signal {-code}{', as when memory runs out' if code == -9 else ''}" if code < 0 else f"exit code {code}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _send(stream: IO[bytes], header: dict[str, Any], data: bytes) -> None:
    head = json.dumps(header).encode("utf-8")
    stream.write(_LENGTHS.pack(len(head), len(data)))
    stream.write(head)
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next frame; None at the stream's end."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    head, size = _LENGTHS.unpack(lengths)
    header, data = stream.read(head), stream.read(size)
    return (json.loads(header), data) if len(header) == head and len(data) == size else None


def _work() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the run itself ends us
    asks, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that prints may come between the frames
    first = _receive(asks)
    if first is None:
        return
    setup = first[0]
    encoder = Encoder.load(setup["encoder"])
    template = None if setup["template"] is None else ChatTemplate.load(encoder, setup["template"])
    maker = Maker(Spec(**setup["spec"]), encoder, template)
    while (asked := _receive(asks)) is not None:
        header, data = asked
        read = [tuple(row) for row in json.loads(data)] if header["form"] == "rows" else []
        block = Block(header["form"], header["line"], b"" if read else data, read)
        fields = tuple((ours, theirs) for ours, theirs in header["fields"])
        _send(answers, *part_of(maker, Job(block, header["file"], header["name"], fields)))


if __name__ == "__main__":
    _work()
