"""Runs of a tiny model in several processes, one of which dies, freezes or is asked to end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from tests.crash.process import Ended, Process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Several:
    """``trivium run`` in ``count`` forks that know of each other as torchrun would tell them, without torchrun."""

    def __init__(
        self, recipe: Path, *more: object, count: int = 2, meanwhile: Callable[[int], None] = lambda rank: None,
        only: int | None = None,
    ) -> None:  # fmt: skip
        port = free_port()

        def told(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            meanwhile(rank)

        self.ranks = [
            Process(recipe, *more, meanwhile=lambda rank=rank: told(rank), log=recipe.parent / f"said{rank}.txt")
            for rank in (range(count) if only is None else [only])
        ]

    def send(self, number: int) -> None:
        for process in self.ranks:
            process.send(number)

    def wait(self, seconds: float = 120.0) -> list[Ended]:
        """Until all have ended. None of them is left behind where one has not."""
        try:
            return [process.wait(seconds) for process in self.ranks]
        except BaseException:
            for process in self.ranks:
                try:
                    process.send(signal.SIGKILL)
                except ProcessLookupError:
                    continue
            raise
