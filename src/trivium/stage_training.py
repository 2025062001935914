"""A stage's training: the loop, and around it the log, evaluations, checkpoints, faults, and a request to stop.

    training = Training(run, work, reference, peak)    # goes on from the newest checkpoint there is
    training.carry_out()

Everything that is between two steps is in a checkpoint: a training that was killed at any moment and one that was not
end in the same bits (`tests/crash`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trivium.errors import Interrupted, NonFiniteError, OutOfMemory, UserError
from trivium.evaluate.held_out import evaluate
from trivium.evaluate.judge import ALONG_THE_WAY, shares
from trivium.files import make_folder
from trivium.forest import Forest
from trivium.interrupt import Stop, Stopped, deferred
from trivium.model.language_model import LanguageModel
from trivium.peft import base as deltas
from trivium.peft.targets import decoder_layers
from trivium.recipe import Stage
from trivium.stage_data import beside, fitted, packed
from trivium.stage_saving import Saving
from trivium.stage_together import go_on_alike, same_in_the_end
from trivium.stage_work import StageRun, Work
from trivium.talk import Talker
from trivium.terminal import say
from trivium.train import snapshot
from trivium.train.dropout import dropout_off, set_dropout
from trivium.train.guard import Guard
from trivium.train.log import LOG, TrainingLog, read_log
from trivium.train.loop import StepLog, Task, train
from trivium.train.machine import PeakMemory, give_back
from trivium.train.optimizer import build_optimizers
from trivium.train.passes import surviving
from trivium.train.reference import NoReference
from trivium.train.schedule import factor


class Training:
    """What a stage does between its proofs and its result; ``done`` steps are behind it."""

    def __init__(self, run: StageRun, work: Work, reference: NoReference, peak: PeakMemory) -> None:
        self.run, self.work, self.reference, self.peak = run, work, reference, peak
        self.model, self.stage, self.passes = run.model, run.stage, work.passes
        self.device = str(self.model.device)
        self.steps = len(work.order)
        self.done = 0
        self.optimizers = _optimizers(self.stage, self.model)
        kept = run.under_way is not None and run.others.first  # of several processes the first one saves for all
        self.saving = Saving(run, work, self.optimizers) if kept else None  # None: it cannot go on
        self.state: dict[str, Any] = self.saving.state if self.saving else {}
        self.log = self._log()
        self.guard = Guard(self.stage.skip_non_finite or 0, self.log.rows)
        self.best: dict[str, Any] = self.state.get("best") or {}
        self.elsewhere: list[dict[str, int]] = self.state.get("halvings_elsewhere") or []  # in other processes
        self.stop = Stop()
        self.random: dict[str, torch.Tensor] = {}  # the random state after the last step

    # --- the whole

    def carry_out(self) -> dict[str, float]:
        """Train to the end; returns the held-out metrics before. Raises Interrupted, NonFiniteError, DiskError."""
        hold = deferred() if self.run.under_way else contextlib.nullcontext(self.stop)  # else nothing could be saved
        with hold as self.stop, self._dropping(), torch.random.fork_rng():  # dropout draws from the global one
            torch.manual_seed(int(self.stage.seed or 0))
            if self.saving:
                self.done = self.saving.go_on(self.steps, self.reference)
                if self.done:
                    self.passes.put_back(self.state.get("halvings", []))
                self.saving.check_room()
                self._note_attempt(self.saving)
            self.done = go_on_alike(self.run.others, self.model.hf, self.optimizers, self.reference, self.done)
            self.random = snapshot.random_state(self.device)
            try:
                before = self.log.evaluation(0) if self.done else self.measure(0)
                self._evaluated()
                epochs, rows = self.work.order.epochs, len(self.work.data.examples)
                say(f"  {self.steps} steps over {epochs:.2f} epochs of {rows:,} examples")
                with self._profiled() as (task, after_step):
                    train(task, after_step, self.done)
                same_in_the_end(self.run.others, self.model.hf)
                self.save(beside=False)  # nothing is left to be trained beside it, and a copy takes memory
            except Stopped:
                raise self._stopped() from None
            except (NonFiniteError, OutOfMemory):
                self._save_before_the_fault()
                raise
        return before or {}

    def _task(self) -> Task:
        stage, work, model = self.stage, self.work, self.model
        examples, tokens = work.data.examples, int(stage.micro_batch_tokens or 1)
        device, count = model.device, self.run.others.count

        def batches(n: int) -> Iterator[Forest]:
            self.run.others.begin(int(stage.seed or 0), n)
            return packed(examples.at(work.order.chosen(n)), tokens, device, count)

        return Task(
            objective=work.goal,
            logprob=model.logprob if stage.memory is None else self._lean,
            reference=self.reference,
            batches=batches,
            beside=lambda n: beside(work.goal, list(examples.at(work.order.chosen(n))), tokens, device, count),
            steps=self.steps,
            rate=lambda n: factor(n, self.steps, str(stage.schedule), stage.warmup_ratio or 0.0),
            optimizers=self.optimizers,
            max_grad_norm=float(stage.max_grad_norm or 1.0),
            not_finite=self.guard.not_finite,
            fitted=lambda forests: fitted(forests, self.passes, device),
            no_room=self._no_room,
            others=self.run.others,
        )

    def _profiled(self) -> contextlib.AbstractContextManager[tuple[Task, Callable[[StepLog], None]]]:
        """What the loop is handed, and on request where the time of a few of its steps goes."""
        task, file = self._task(), self.run.profile
        if file is None:
            return contextlib.nullcontext((task, self._after_step))
        from trivium.stage_profile import profiled

        return profiled(file, self.stage.name, self.model, task, self._after_step, self.done, self.log.paused)

    def _no_room(self, step: int, reason: str) -> None:
        """Smaller passes, and the random state as it was before the step."""
        self.passes.no_room(step, reason)
        self.run.others.report(step=step, tokens=self.passes.tokens)
        snapshot.set_random_state(self.random, self.device)
        self.run.others.begin(int(self.stage.seed or 0), step - 1)

    def _lean(self, forest: Forest) -> torch.Tensor:
        """The model's log-probabilities, when what the pass before has freed is given back."""
        if forest.tokens.device.type == "cpu":
            give_back()
        return self.model.logprob(forest)

    def _after_step(self, step: StepLog) -> None:
        costs = self.run.costs
        costs.seconds += step.seconds
        costs.tokens += step.tokens
        costs.trained_tokens += step.trained_tokens
        self.log.step(step, spike=not step.skipped and self.guard.spiked(step))
        self.done = step.step
        self.random = snapshot.random_state(self.device)
        self.reference.after_step(self.done)
        self.stop.requested |= self.run.others.asked
        self.elsewhere += self.run.others.reported
        if self.run.others.first:  # it saves and ends, and the others with it
            self.stop.check()
        self._evaluated()
        if self.saving and self.done < self.steps and self.saving.due(self.done):
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
        if not run.others.first:
            return {}
        check = model.hf.base_model.register_forward_pre_hook(lambda *_: self.stop.check())
        try:
            with run.costs.clock("eval_seconds"), dropout_off(model), self.log.paused(), torch.random.fork_rng():
                metrics = surviving(self._held_out, lambda reason: self.passes.no_room(step, reason))
                if run.judge is not None:
                    with model.laid_out("single"):  # generation is the model's own
                        metrics |= shares(run.judge(Talker.of(model), ALONG_THE_WAY))
        finally:
            check.remove()
        if metrics and self.log.evaluation(step) is None:  # of a result that is not the last there was one
            self.log.evaluated(step, metrics)
        return metrics

    def _held_out(self) -> dict[str, float]:
        work, (tokens, device) = self.work, (self.passes.tokens, self.model.device)
        first = beside(work.goal, work.held_out, tokens, device)
        held_out = packed(work.held_out, tokens, device)
        return evaluate(work.goal, self.model.logprob, self.reference, held_out, first)

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

    # --- what is kept

    def _log(self) -> TrainingLog:
        """The log, with the rows so far of a training that goes on."""
        rows: list[dict[str, Any]] = []
        file = None
        if self.saving:
            file = make_folder(self.saving.under.folder) / LOG
            rows = read_log(self.saving.found.folder / LOG) if self.saving.found else []
        self.logged = max((row["step"] for row in read_log(file)), default=0) if file else 0  # by an attempt before
        elapsed = self.state.get("elapsed", 0.0)
        return TrainingLog(file, self.stage.name, self.steps, self.peak, self.run.tracker(), rows, elapsed)

    def _note_attempt(self, saving: Saving) -> None:
        repeats = max(0, self.logged - self.done)
        if self.logged and not self.done:
            told = f"an attempt before came to step {self.logged}, but has no checkpoint: this one starts at step 1"
            say(f"  note: {told}")
        saving.under.attempt(after=self.done, repeats=repeats, rejected=saving.kept.rejected)

    def save(self, best: bool = False, beside: bool = True) -> None:
        """A checkpoint of the state after the last step, unless there is one. Raises DiskError, NonFiniteError."""
        if self.saving:
            with self.log.paused():
                state = {"steps": self.steps, "best": self.best, "elapsed": self.log.elapsed,
                         "peak": self.peak_bytes(), "halvings": self.passes.halvings,
                         "halvings_elsewhere": self.elsewhere}  # fmt: skip
                also = {"rng": self.random, **({"reference": held} if (held := self.reference.tensors()) else {})}
                self.saving.save(self.done, also, state, self.log.text(), best, beside)

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
        if self.saving:
            self.saving.kept.wait()
            best = self.best.get("step", self.steps)
            if self.stage.result == "best" and best != self.steps:
                self.saving.put_best(best)
                say(f"  result: the model after step {best}, with a held-out loss of {self.best['loss']:.4f}")

    def events(self) -> dict[str, Any]:
        """What happened on the way, for the record: attempts, checkpoints, steps left out, spikes."""
        skipped = [{k: row[k] for k in ("step", "skipped", "rows")} for row in self.guard.skipped]
        saved = self.saving.events() if self.saving else {}
        return {**saved, "skipped": skipped, "spikes": self.guard.spikes, "best": self.best,
                "halvings": self.passes.halvings, "halvings_elsewhere": self.elsewhere}  # fmt: skip

    def peak_bytes(self) -> int:
        """Of all attempts."""
        return max(self.peak.read(), int(self.state.get("peak", 0)))

    def close(self) -> None:
        """Wait for what is being written, whoever asks for an end meanwhile, and close the log."""
        self.log.close()
        if self.saving:
            # another error is under way, or `choose_result` has raised it
            with deferred(), contextlib.suppress(UserError):
                self.saving.kept.wait()


def _optimizers(stage: Stage, model: LanguageModel) -> list[torch.optim.Optimizer]:
    inside = {id(p) for layer in decoder_layers(model.hf).values() for p in layer.parameters()}
    hidden = {n for n, p in model.hf.named_parameters() if id(p) in inside}
    return build_optimizers(
        model.hf,
        hidden,
        str(stage.optimizer),
        float(stage.learning_rate or 0),
        float(stage.weight_decay or 0),
        deltas.rates(model.hf),
    )
