"""What a stage under way is made of: what it is asked, what it trains with, and what it costs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trivium.data.chat import ChatTemplate
from trivium.data.loader import RunOrder
from trivium.data.prepare import Prepared
from trivium.data.store import Examples
from trivium.evaluate.judge import Judge
from trivium.folder import Opened
from trivium.model.language_model import LanguageModel
from trivium.model.proof import Proof
from trivium.objectives.base import Objective
from trivium.peft.kinds import Settings
from trivium.recipe import Stage
from trivium.stage_data import InMemory
from trivium.train.budget import Cost
from trivium.train.passes import Passes
from trivium.train.processes import ALONE, Processes
from trivium.train.track import Tracker
from trivium.under_way import UnderWay


@dataclass
class Costs:
    """Seconds of a stage by what they were spent on; ``seconds`` is the training loop alone."""

    seconds: float = 0.0
    setup_seconds: float = 0.0
    reference_seconds: float = 0.0
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass
class StageRun:
    """One stage under way: what it starts from, and where it is written."""

    stage: Stage
    opened: Opened
    folder: Path | None = None  # the partial folder; the caller puts it in its place. None: nothing is written
    adapter_base: Callable[[], str] | None = None  # where the frozen base lies on disk, written there if need be
    data: InMemory | None = None  # rows instead of the stage's files
    weights: str | None = None  # the identity of what it starts from; None: nothing tells
    judge: Judge | None = None
    tracker: Callable[[], Tracker | None] = lambda: None
    under_way: UnderWay | None = None  # its checkpoints; None: it cannot go on
    profile: Path | None = None  # where it is written where the time of a few steps goes; None: that is not measured
    others: Processes = ALONE  # who train it with this process
    costs: Costs = field(default_factory=Costs)

    @property
    def model(self) -> LanguageModel:
        return self.opened.model


@dataclass
class Work:
    """What a stage trains: its data in order, its objective, and the method's settings."""

    template: ChatTemplate
    data: Prepared
    held_out: Examples
    order: RunOrder
    used: Examples  # the examples that the run will see, each once
    goal: Objective
    settings: Settings
    parent: dict[str, torch.Tensor] | None  # the parent's small weights; None: the bare base is the parent
    base: str | None  # where an adapter's base lies
    proof: Proof
    passes: Passes
    cost: Cost  # what it holds, reckoned
