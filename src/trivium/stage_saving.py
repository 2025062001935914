"""When a stage's training is saved, what is saved of it, and how it is put back.

saving = Saving(run, work, optimizers)      # finds the newest checkpoint that is whole
saving.go_on()                              # puts it back
if saving.due(done):
    saving.save(done, random, state, log)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from trivium.errors import CheckpointError, DataError
from trivium.files import check_room, folder_bytes, sha256_json
from trivium.peft.kinds import FullSettings
from trivium.recipe import Stage
from trivium.stage_work import StageRun, Work
from trivium.terminal import say
from trivium.train import snapshot
from trivium.train.checkpoint import Checkpoints
from trivium.train.log import LOG
from trivium.train.machine import free_memory
from trivium.train.reference import NoReference
from trivium.under_way import versions

SPARE = 2**20  # bytes, for logs and tables
LEAST_SECONDS = 10.0  # between two checkpoints, where the recipe does not say how many
SHARE = 0.02  # of the training's time that they may then take
BESIDE = 0.1  # of the free memory that a copy of the state may take, to be written beside the training


class Saving:
    """The checkpoints of one stage. ``step`` is that of the last one, 0 where there is none."""

    def __init__(self, run: StageRun, work: Work, optimizers: list[torch.optim.Optimizer]) -> None:
        assert run.under_way is not None, "there is where to save"
        self.run, self.work, self.optimizers, self.under = run, work, optimizers, run.under_way
        same = sha256_json([self.under.about["parent"], self.under.about["settings"]])  # the data may change, if asked
        self.kept = Checkpoints(self.under.folder, {"training": same}, last=int(run.stage.keep_checkpoints or 1))
        self.found = self.kept.newest()
        self.state: dict[str, Any] = self.found.state if self.found else {}
        self.step = 0
        self._at = time.monotonic()  # not the clock on the wall, which may jump
        self._waited = self._beside = 0.0  # seconds that the training waited for it, and of all threads before it

    def go_on(self, steps: int, reference: NoReference) -> int:
        """Put everything back as it was after the checkpoint's step, which is returned: 0 where there is none."""
        if self.found is None:
            return 0
        name, self.step = self.run.stage.name, self.found.step
        if self.step > steps:  # the data has changed, with the user's consent
            raise DataError(
                f"{name} was at step {self.step}, and its changed data makes {steps} steps",
                "put the data back, or start over with --fresh",
            )
        device = str(self.run.model.device)
        tensors = self.found.tensors()
        snapshot.put_back(tensors, self.run.model.hf, self.optimizers, device)
        reference.put_back(tensors.get("reference", {}))
        self.kept.best = (self.state.get("best") or {}).get("step")
        for total, more in ((self.run.costs, self.state["costs"]), (self.kept.costs, self.state["saving"])):
            for key, value in more.items():
                setattr(total, key, value if key == "bytes" else getattr(total, key) + value)
        for reason in self.kept.rejected:
            say(f"  rejected: {reason}")
        say(f"  goes on after step {self.step} of {steps}")
        then, now = self.state["how"], self._how()
        if apart := [f"{k} {then[k]} → {now[k]}" for k in now if k in then and then[k] != now[k]]:
            say(f"  note: not to the last bit what an unbroken run gives: {', '.join(apart)}")
        return self.step

    def _how(self) -> dict[str, str]:
        """What the last bits of a result depend on, beside the recipe."""
        names = ("device", "micro_batch_tokens", "recompute")
        found = versions() | {n: str(getattr(self.run.stage, n)) for n in names}
        return found | {"processes": str(self.run.others.count)}

    def due(self, done: int) -> bool:
        """Whether it is time for a checkpoint: every so many steps or minutes, or as often as costs little."""
        stage, since = self.run.stage, time.monotonic() - self._at
        if stage.save_every:
            return done % stage.save_every == 0
        if stage.save_minutes:
            return since >= 60 * stage.save_minutes
        cost = self._waited + self.kept.costs.seconds_beside - self._beside
        return since >= max(LEAST_SECONDS, cost / SHARE) and not self.kept.writing

    def save(
        self, done: int, also: Mapping[str, dict[str, torch.Tensor]], state: Mapping[str, Any], log: str,
        best: bool = False, beside: bool = True,
    ) -> None:  # fmt: skip
        """A checkpoint of the state after step ``done``, unless there is one; ``also`` are groups of tensors besides:
        the random state then, and a reference that moves.

        Raises DiskError, NonFiniteError.
        """
        if done == 0 or (self.step == done and not best):
            return
        started = time.perf_counter()
        self.kept.wait()
        self._beside = self.kept.costs.seconds_beside
        beside = beside and copied(self.run.stage, snapshot.size_of(self.optimizers))
        taken = snapshot.take(self.run.model.hf, self.optimizers, str(self.run.model.device), copy=beside)
        told = {**state, "step": done, "about": self.under.about, "accepted": self.under.accepted,
                "date": self.work.template.told_date, "costs": asdict(self.run.costs),
                "saving": asdict(self.kept.costs), "how": self._how()}  # fmt: skip
        self.kept.save(done, {**taken, **_kept(also, beside)}, told, {LOG: log}, beside, best)
        self._waited = time.perf_counter() - started
        self.kept.costs.seconds += self._waited
        self.step, self._at = done, time.monotonic()

    def check_room(self) -> None:
        """There is room for what will be written; raises DiskError."""
        model = self.run.model
        full = isinstance(self.work.settings, FullSettings)
        result = (model.parameters() if full else model.trained_parameters()) * model.saved_dtype.itemsize
        have = folder_bytes(self.kept.folder)
        needed = (self.kept.last + 2) * snapshot.size_of(self.optimizers) + result + SPARE - have
        remedy = "free some space, keep fewer (keep_checkpoints: 1), or choose another --out"
        check_room(self.kept.folder, needed, "checkpoints and the result", remedy)

    def put_best(self, step: int) -> None:
        """The weights of a checkpoint. Raises CheckpointError."""
        found = self.kept.at(step)
        if found is None:
            raise CheckpointError(
                f"the best checkpoint cannot be the result: {self.kept.rejected[-1]}",
                "restore it from a copy, or take result: last",
            )
        trained = {n: p for n, p in self.run.model.hf.named_parameters() if p.requires_grad}
        snapshot.put_weights(found.tensors()["weights"], trained)

    def events(self) -> dict[str, Any]:
        """For the record: attempts, and checkpoints with the hashes of the last one's tensors."""
        attempts = self.under.attempts()
        found: dict[str, Any] = {
            "attempts": max(1, len(attempts)),
            "went_on_after": [a["after"] for a in attempts[1:] if isinstance(a.get("after"), int)],
            "steps_repeated": sum(a["repeats"] for a in attempts if isinstance(a.get("repeats"), int)),
            "rejected": [r for a in attempts for r in a.get("rejected", [])],
            "checkpoints": asdict(self.kept.costs),
            "state_sha256": self.kept.hashes,
        }
        return found | ({"accepted_changed_data": self.under.accepted} if self.under.accepted else {})


def copied(stage: Stage, state: int) -> bool:
    """Whether a state of so many bytes is copied, to be written beside the training; not where memory is short."""
    return stage.memory is None and state < BESIDE * free_memory("cpu")


def _kept(groups: Mapping[str, dict[str, torch.Tensor]], copy: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors on the CPU; with ``copy`` they stay as they are while training goes on."""
    return {name: {k: t.to("cpu", copy=copy) for k, t in group.items()} for name, group in groups.items()}
