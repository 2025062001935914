"""Ctrl-C, a closed terminal, SIGTERM: at once where nothing is lost by it, else at the next step of the training.

    stop_at_once()                    # the command line: a signal raises `Stopped`
    with deferred() as stop:          # a training: a signal only sets `stop.requested`, which the loop looks at
        ...

A signal that the process was told to ignore (nohup) stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

PATIENCE = 2.0  # seconds in which somebody who asks twice means the same
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal. Not a KeyboardInterrupt, which the command-line library would answer in its own way."""


class Stop:
    """Whether somebody has asked for an end."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raises Stopped where somebody has: for places from which the state of the last step can be saved."""
        if self.requested:
            raise Stopped


heard = threading.Event()  # somebody has asked, since `stop_at_once`
plain = True  # whether what follows is said at once; of several processes one says it in the end
_asked: list[float] = []  # when a signal raised Stopped, since `stop_at_once`


def stop_at_once() -> None:
    """From now on a signal raises Stopped. Those that follow soon cannot disturb what is then put in order; a later
    one raises it again, for the first may have been lost in a place that lets no exception through."""
    _asked.clear()
    heard.clear()

    def stop(number: int, frame: Any) -> None:
        heard.set()
        now = time.monotonic()
        if not _asked or now - _asked[-1] > PATIENCE:
            _asked.append(now)
            raise Stopped

    _handle(stop)


def asked() -> bool:
    """Whether a signal has raised Stopped, which a library may have turned into an error of its own."""
    return bool(_asked)


def ignore() -> None:
    """Signals do nothing any more: the end is decided, and its exit code with it."""
    _handle(signal.SIG_IGN)


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """Signals only set ``requested`` within the block. Raises Stopped after it where that was not looked at."""
    stop = Stop()
    stop.requested = bool(_asked)

    def ask(number: int, frame: Any) -> None:
        heard.set()
        if not stop.requested and plain:
            with contextlib.suppress(OSError):  # not `say`: this may be in the middle of one; a terminal may be closed
                os.write(2, b"\n  stopping after this step; what was trained is saved\n")
        stop.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone, whose owner decides
        return
    before = _handle(ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop.check()


def _handle(handler: Any) -> dict[int, Any]:
    """Set a handler for all signals but those that are ignored; returns those there were."""
    before = {}
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    return before
