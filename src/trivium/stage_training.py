"""A stage's training: the loop, and around it the log, evaluations, checkpoints, faults, and a request to stop.

    training = Training(run, work, reference, held_out, peak)    # goes on from the newest checkpoint there is
    training.carry_out()

Everything that is between two steps is in a checkpoint: a training that was killed at any moment and one that was not
end in the same bits (`tests/crash`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from trivium.errors import CheckpointError, DataError, Interrupted, NonFiniteError, UserError
from trivium.evaluate.held_out import evaluate
from trivium.evaluate.judge import ALONG_THE_WAY, shares
from trivium.files import check_room, folder_bytes, make_folder, sha256_json
from trivium.forest import Forest, lay_out
from trivium.interrupt import Stop, Stopped, deferred
from trivium.model.language_model import LanguageModel
from trivium.peft import base as deltas
from trivium.peft.settings import FullSettings
from trivium.peft.targets import decoder_layers
from trivium.recipe import Stage
from trivium.stage_work import StageRun, Work
from trivium.talk import Talker
from trivium.terminal import say
from trivium.train import snapshot
from trivium.train.checkpoint import Checkpoints, Found
from trivium.train.dropout import dropout_off, set_dropout
from trivium.train.guard import Guard
from trivium.train.log import TrainingLog, read_log
from trivium.train.loop import StepLog, Task, train
from trivium.train.machine import PeakMemory, free_memory
from trivium.train.optimizer import build_optimizers
from trivium.train.schedule import factor
from trivium.under_way import versions

LOG = "metrics.jsonl"
KEPT = 2  # checkpoints, where the recipe does not say how many: one to fall back on
SPARE = 2**20  # bytes, for logs and tables
LEAST_SECONDS = 30.0  # between two checkpoints, where the recipe does not say how many
SHARE = 0.02  # of the training's time that they may then take
BESIDE = 0.1  # of the free memory that a copy of the state may take, to be written beside the training


class Training:
    """What a stage does between its proofs and its result; ``done`` steps are behind it."""

    def __init__(self, run: StageRun, work: Work, reference: Any, held_out: list[Forest], peak: PeakMemory) -> None:
        self.run, self.work, self.reference, self.held_out, self.peak = run, work, reference, held_out, peak
        self.model, self.stage = run.model, run.stage
        self.device = str(self.model.device)
        self.steps = len(work.order)
        self.done = 0
        self.optimizers = _optimizers(self.stage, self.model)
        self.kept = self._checkpoints()
        found = self.kept.newest() if self.kept else None
        self.state: dict[str, Any] = found.state if found else {}
        self.log = self._log(found)
        self.guard = Guard(self.stage.skip_non_finite or 0, self.log.rows)
        self.best: dict[str, Any] = self.state.get("best") or {}
        self.saved_at = time.monotonic()  # not the clock on the wall, which may jump
        self.stop = Stop()
        self.random: dict[str, torch.Tensor] = {}  # the random state after the last step
        self.found = found
        self.saved = 0  # the step of the last checkpoint
        self.waited = self.beside_before = 0.0  # seconds that the training waited for it, and of the threads before it

    # --- the whole

    def carry_out(self) -> dict[str, float]:
        """Train to the end; returns the held-out metrics before. Raises Interrupted, NonFiniteError, DiskError."""
        hold = deferred() if self.kept else contextlib.nullcontext(self.stop)  # else nothing could be saved
        with hold as self.stop, self._dropping(), torch.random.fork_rng():  # dropout draws from the global one
            torch.manual_seed(int(self.stage.seed or 0))
            if self.found is not None:
                self._go_on(self.found)
            self.random = snapshot.random_state(self.device)
            self._check_room()
            self._note_attempt()
            try:
                before = self.log.evaluation(0) if self.done else self.measure(0)
                self._evaluated()
                epochs, rows = self.work.order.epochs, len(self.work.data.examples)
                say(f"  {self.steps} steps over {epochs:.2f} epochs of {rows:,} examples")
                train(self._task(), self._after_step, self.done)
                self.save()
            except Stopped:
                raise self._stopped() from None
            except NonFiniteError:
                self._save_before_the_fault()
                raise
        return before or {}

    def _task(self) -> Task:
        stage, work, model = self.stage, self.work, self.model
        examples = work.data.examples
        return Task(
            objective=work.goal,
            logprob=model.logprob,
            reference=self.reference,
            batches=lambda n: (lay_out([examples[i] for i in g]).to(model.device) for g in work.order[n]),
            steps=self.steps,
            rate=lambda n: factor(n, self.steps, str(stage.schedule), stage.warmup_ratio or 0.0),
            optimizers=self.optimizers,
            max_grad_norm=float(stage.max_grad_norm or 1.0),
            not_finite=self.guard.not_finite,
        )

    def _after_step(self, step: StepLog) -> None:
        costs = self.run.costs
        costs.seconds += step.seconds
        costs.tokens += step.tokens
        costs.trained_tokens += step.trained_tokens
        self.log.step(step, spike=not step.skipped and self.guard.spiked(step))
        self.done = step.step
        self.random = snapshot.random_state(self.device)
        self.stop.check()
        self._evaluated()
        if self.done < self.steps and self._due():
            self.save()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        set_dropout(self.model, self.stage.dropout or 0.0)
        deltas.dropping(self.model.hf, True)
        try:
            yield
        finally:
            deltas.dropping(self.model.hf, False)
            set_dropout(self.model, 0.0)

    # --- evaluation

    def measure(self, step: int) -> dict[str, float]:
        """Held-out metrics of the model as it is, entered in the log; draws on no random state of the training.

        A request to stop is heard before every pass through the model.
        """
        model, run = self.model, self.run
        check = model.hf.base_model.register_forward_pre_hook(lambda *_: self.stop.check())
        try:
            with run.costs.clock("eval_seconds"), dropout_off(model), self.log.paused(), torch.random.fork_rng():
                metrics = evaluate(self.work.goal, model.logprob, self.reference, self.held_out)
                if run.judge is not None:
                    with model.laid_out("single"):  # generation is the model's own
                        metrics |= shares(run.judge(Talker.of(model), ALONG_THE_WAY))
        finally:
            check.remove()
        if metrics and self.log.evaluation(step) is None:  # of a result that is not the last there was one
            self.log.evaluated(step, metrics)
        return metrics

    def _evaluated(self) -> None:
        """Evaluate where it is time to and was not done before; the best model so far is saved."""
        every = self.stage.eval_every or max(1, math.ceil(self.steps / 3))
        at_end = self.done == self.steps  # what is saved then is measured afterwards
        if self.done == 0 or (self.stage.result != "best" if at_end else self.done % every):
            return
        if self.log.evaluation(self.done) is None:
            loss = self.measure(self.done).get("loss", math.inf)
            if loss < self.best.get("loss", math.inf):
                self.best = {"step": self.done, "loss": loss}
                self.save(best=True)

    # --- checkpoints

    def _checkpoints(self) -> Checkpoints | None:
        under = self.run.under_way
        if under is None:
            return None
        same = sha256_json([under.about["parent"], under.about["settings"]])  # the data may change, with consent
        return Checkpoints(under.folder, {"training": same}, last=self.stage.keep_checkpoints or KEPT)

    def _log(self, found: Found | None) -> TrainingLog:
        file = self.run.under_way.folder / LOG if self.run.under_way else None
        self.logged = max((row["step"] for row in read_log(file)), default=0) if file else 0  # by an attempt before
        if file is not None:
            make_folder(file.parent)
        rows = [json.loads(line) for line in found.text(LOG).splitlines()] if found else []
        return TrainingLog(file, self.stage.name, self.steps, self.peak, self.run.tracker(), rows,
                           self.state.get("elapsed", 0.0))  # fmt: skip

    def _go_on(self, found: Found) -> None:
        """Put everything back as it was after the checkpoint's step."""
        assert self.kept is not None, "what was found was looked for"
        if not 0 < found.step <= self.steps:  # the data has changed with the user's consent
            raise DataError(
                f"{self.stage.name} was at step {found.step}, and its changed data makes {self.steps} steps",
                "put the data back, or start over with --fresh",
            )
        snapshot.put_back(found.tensors(), self.model.hf, self.optimizers, self.device)
        self.done = self.saved = found.step
        self.kept.best = self.best.get("step")
        for total, more in ((self.run.costs, self.state["costs"]), (self.kept.costs, self.state["saving"])):
            for name, value in more.items():
                setattr(total, name, value if name == "bytes" else getattr(total, name) + value)
        for reason in self.kept.rejected:
            say(f"  rejected: {reason}")
        say(f"  goes on after step {self.done} of {self.steps}")
        if changed := snapshot.versions_differ(self.state["how"], self._how()):
            say(f"  note: not to the last bit what an unbroken run gives: {', '.join(changed)}")

    def _note_attempt(self) -> None:
        if self.run.under_way is not None:
            rejected = self.kept.rejected if self.kept else []
            self.run.under_way.attempt(after=self.done, repeats=max(0, self.logged - self.done), rejected=rejected)

    def _how(self) -> dict[str, str]:
        """What the last bits of a result depend on, beside the recipe."""
        names = ("device", "micro_batch_tokens", "recompute")
        return versions() | {n: str(getattr(self.stage, n)) for n in names}

    def _due(self) -> bool:
        stage, since = self.stage, time.monotonic() - self.saved_at
        if stage.save_every:
            return self.done % stage.save_every == 0
        if stage.save_minutes:
            return since >= 60 * stage.save_minutes
        if self.kept is None or self.kept.writing:
            return False
        cost = self.waited + self.kept.costs.seconds_beside - self.beside_before
        return since >= max(LEAST_SECONDS, cost / SHARE)

    def save(self, best: bool = False, beside: bool = True) -> None:
        """A checkpoint of the state after the last step, unless there is one. Raises DiskError, NonFiniteError."""
        if self.kept is None or self.done == 0 or (self.saved == self.done and not best):
            return
        started = time.perf_counter()
        with self.log.paused():
            self.kept.wait()
            self.beside_before = self.kept.costs.seconds_beside
            beside = beside and snapshot.size_of(self.optimizers) < BESIDE * free_memory("cpu")
            taken = snapshot.take(self.model.hf, self.optimizers, self.device, copy=beside)
            taken["rng"] = self.random
            self.kept.save(self.done, taken, self._state(), {LOG: self.log.text()}, beside, best)
        self.waited = time.perf_counter() - started
        self.kept.costs.seconds += self.waited
        self.saved, self.saved_at = self.done, time.monotonic()

    def _state(self) -> dict[str, Any]:
        assert self.kept is not None, "there is where to save"
        assert self.run.under_way is not None, "there is where to save"
        under, template = self.run.under_way, self.work.template
        return {
            "step": self.done,
            "steps": self.steps,
            "about": under.about,
            "accepted": under.accepted,
            "date": str(template.date or datetime.date.today()) if template.jinja.uses_date else None,
            "best": self.best,
            "costs": asdict(self.run.costs),
            "saving": asdict(self.kept.costs),
            "elapsed": self.log.elapsed,
            "peak": self.peak_bytes(),
            "how": self._how(),
        }

    def _check_room(self) -> None:
        """There is room for what will be written; raises DiskError."""
        if self.kept is None:
            return
        full = isinstance(self.work.settings, FullSettings)
        result = (
            self.model.parameters() * self.model.saved_dtype.itemsize if full else 4 * self.model.trained_parameters()
        )
        have = folder_bytes(self.kept.folder)
        needed = (self.kept.last + 2) * snapshot.size_of(self.optimizers) + result + SPARE - have
        remedy = "free some space, keep fewer (keep_checkpoints: 1), or choose another --out"
        check_room(self.kept.folder, needed, "checkpoints and the result", remedy)

    # --- the end

    def _stopped(self) -> Interrupted:
        """Somebody has asked for an end: what was trained is saved."""
        name = self.stage.name
        self.save(beside=False)
        where = (
            f"at step {self.done} of {self.steps} of {name}, which is saved"
            if self.done
            else f"before step 1 of {name}"
        )
        return Interrupted(f"interrupted {where}", "run the same command again to go on")

    def _save_before_the_fault(self) -> None:
        """So that the same command goes on at the step that failed, with another setting or mended rows."""
        try:
            self.save(beside=False)
        except UserError as error:
            say(f"  note: the state before this step could not be saved: {error.what}")

    def choose_result(self) -> None:
        """With ``result: best`` the weights become those of the best evaluation. Raises CheckpointError."""
        if self.kept is not None:
            self.kept.wait()
        best = self.best.get("step", self.steps)
        if self.stage.result != "best" or best == self.steps:
            return
        found = self.kept.at(best) if self.kept is not None else None
        if found is None:
            raise CheckpointError(
                f"the best checkpoint, of step {best}, is damaged: {(self.kept.rejected if self.kept else [''])[-1]}",
                "restore it from a copy, or take result: last",
            )
        trained = {n: p for n, p in self.model.hf.named_parameters() if p.requires_grad}
        snapshot.put_weights(found.tensors()["weights"], trained)
        say(f"  result: the model after step {best}, with a held-out loss of {self.best['loss']:.4f}")

    def events(self) -> dict[str, Any]:
        """What happened on the way, for the record: attempts, checkpoints, steps left out, spikes."""
        attempts = self.run.under_way.attempts() if self.run.under_way else []
        found: dict[str, Any] = {
            "attempts": max(1, len(attempts)),
            "went_on_after": [a["after"] for a in attempts[1:] if isinstance(a.get("after"), int)],
            "steps_repeated": sum(a["repeats"] for a in attempts if isinstance(a.get("repeats"), int)),
            "rejected": [r for a in attempts for r in a.get("rejected", [])],
            "skipped": [{k: row[k] for k in ("step", "skipped", "rows")} for row in self.guard.skipped],
            "spikes": self.guard.spikes,
        }
        if self.kept is not None:
            found |= {"checkpoints": asdict(self.kept.costs), "state_sha256": self.kept.hashes, "best": self.best}
        if self.run.under_way and self.run.under_way.accepted:
            found["accepted_changed_data"] = self.run.under_way.accepted
        return found

    def peak_bytes(self) -> int:
        """Of all attempts."""
        return max(self.peak.read(), int(self.state.get("peak", 0)))

    def close(self) -> None:
        """Wait for what is being written, and close the log."""
        self.log.close()
        if self.kept is not None:
            with contextlib.suppress(UserError):  # another error is under way, or `choose_result` has raised it
                self.kept.wait()


def _optimizers(stage: Stage, model: LanguageModel) -> list[torch.optim.Optimizer]:
    inside = {id(p) for layer in decoder_layers(model.hf).values() for p in layer.parameters()}
    hidden = {n for n, p in model.hf.named_parameters() if id(p) in inside}
    return build_optimizers(
        model.hf, hidden, str(stage.optimizer), float(stage.learning_rate or 0), float(stage.weight_decay or 0)
    )
