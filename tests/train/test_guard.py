"""Promise 6: what is not finite reaches no weight, no moment, no file; a loss that jumps is told with its rows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivium.errors import CheckpointError, NonFiniteError
from trivium.forest import Example, Forest, TokenSequence, lay_out
from trivium.objectives import objective
from trivium.train import snapshot
from trivium.train.guard import ENOUGH, SEEN, Guard
from trivium.train.loop import StepLog, Task, train
from trivium.train.optimizer import build_optimizers
from trivium.train.reference import no_reference

V, D = 12, 4


class Small(nn.Module):
    """An embedding, a matrix, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.inner = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)

    def logprob(self, forest: Forest) -> Tensor:
        hidden = self.inner(self.embedding(forest.tokens[forest.source])).tanh()
        return self.head(hidden).log_softmax(-1).gather(1, forest.target[:, None])[:, 0]


def batch(step: int) -> Forest:
    rng = np.random.default_rng(step)
    rows = [TokenSequence(np.r_[np.arange(V), rng.integers(0, V, 4)], np.ones(V + 4, np.float32)) for _ in range(2)]
    return lay_out([Example((row,), f"rows.jsonl:{step}.{n}") for n, row in enumerate(rows)], share=False)


def state(model: Small, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    taken = snapshot.take(model, optimizers, "cpu", copy=True)
    return taken["weights"] | taken["optimizer"]


def task(model: Small, optimizer: str = "muon", **more: Any) -> Task:
    optimizers = build_optimizers(model, {"inner.weight"}, optimizer, 0.05, 0.1)
    return Task(objective({"loss": "next_token"}), model.logprob, no_reference, lambda n: iter([batch(n)]), 8,
                lambda n: 1.0, optimizers, 1.0, **more)  # fmt: skip


@pytest.mark.promise(6)
@pytest.mark.parametrize("where", ["loss", "gradient", "embedding"])
def test_a_hundred_faults_of_each_kind_reach_nothing(where, tried):
    for number in range(100):
        rng = random.Random(number)
        bad, at = rng.choice([float("nan"), float("inf"), float("-inf")]), rng.randrange(1, 9)
        model = Small()
        made = task(model, rng.choice(["adamw", "muon"]))
        states: list[dict[str, Tensor]] = [state(model, made.optimizers)]
        hooks = []

        def batches(n: int, model=model, at=at, bad=bad, rng=rng, hooks=hooks):
            if n + 1 == at:
                if where == "embedding":
                    model.embedding.weight.data[rng.randrange(V)] = bad
                elif where == "gradient":
                    victim = rng.choice(list(model.parameters()))
                    hooks.append(victim.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), bad)))
                else:
                    hooks.append(model.head.register_forward_hook(lambda m, i, o: o * bad))
            return iter([batch(n)])

        broken = Task(**{**vars(made), "batches": batches})
        with pytest.raises(NonFiniteError) as caught:
            train(
                broken, lambda log, model=model, made=made, states=states: states.append(state(model, made.optimizers))
            )
        assert f"step {at}: the " in caught.value.what
        assert f"rows.jsonl:{at - 1}.0, rows.jsonl:{at - 1}.1" in caught.value.what
        assert len(states) == at, "it is noticed at once"
        tried(faults=1)
        if where == "embedding":  # the weights were poisoned from outside: that is not saved
            with pytest.raises(NonFiniteError, match=r"embedding\.weight is not finite"):
                state(model, made.optimizers)
            continue
        now = state(model, made.optimizers)
        assert now.keys() == states[-1].keys()
        assert all(torch.equal(now[k], v) for k, v in states[-1].items())


@pytest.mark.promise(6, 19)
def test_a_step_that_may_be_left_out_changes_nothing_and_is_counted():
    model = Small()
    guard = Guard(1)
    made = task(model, not_finite=guard.not_finite)
    states, logs = [], []

    def logprob(forest: Forest) -> Tensor:
        found = model.logprob(forest)
        return found * float("nan") if forest.examples[0].origin == "rows.jsonl:4.0" else found

    def after(log: StepLog) -> None:
        logs.append(log)
        states.append(state(model, made.optimizers))

    train(Task(**{**vars(made), "logprob": logprob}), after)
    assert [log.step for log in logs if log.skipped] == [5]
    assert all(torch.equal(states[4][k], v) for k, v in states[3].items())
    assert not all(torch.equal(states[5][k], v) for k, v in states[4].items())
    assert [(s["step"], s["rows"]) for s in guard.skipped] == [(5, ["rows.jsonl:4.0", "rows.jsonl:4.1"])]
    assert Guard(1, [{"step": 5, "skipped": "loss", "rows": []}]).skipped, "those of an attempt before count"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_put_back_goes_on_bitwise(optimizer):
    """Eight steps at once, and four, put back into another model, and four more."""
    whole = Small()
    made = task(whole, optimizer)
    train(made, lambda log: None)
    half = Small()
    first = task(half, optimizer)
    train(Task(**{**vars(first), "steps": 4}), lambda log: None)
    taken = snapshot.take(half, first.optimizers, "cpu", copy=True)
    other = Small()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    second = task(other, optimizer)
    torch.manual_seed(5)
    snapshot.put_back(taken, other, second.optimizers, "cpu")
    assert torch.equal(torch.get_rng_state(), taken["rng"]["cpu"])
    train(second, lambda log: None, done=4)
    one, two = state(whole, made.optimizers), state(other, second.optimizers)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert snapshot.size_of(made.optimizers) == pytest.approx(sum(t.numel() for t in one.values()) * 4, abs=4 * 20)


def test_a_copy_stays_as_it_was_and_other_weights_are_refused():
    model = Small()
    made = task(model)
    train(Task(**{**vars(made), "steps": 1}), lambda log: None)
    taken = snapshot.take(model, made.optimizers, "cpu", copy=True)
    before = taken["weights"]["head.weight"].clone()
    train(made, lambda log: None, done=1)
    assert torch.equal(taken["weights"]["head.weight"], before)
    smaller = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="of other weights"):
        snapshot.put_back(taken, smaller, build_optimizers(smaller, set(), "adamw", 0.1, 0.0), "cpu")


# --- spikes


def step(number: int, loss: float) -> StepLog:
    return StepLog(number, loss, 1.0, 0.1, 1, 1, 1, 0.1, rows=[f"a.jsonl:{number}", f"b.jsonl:{number}"])


def falling(number: int, rng: random.Random) -> float:
    """A loss as it is in practice: falling, with noise."""
    return 2.0 + 3.0 * 0.98**number + rng.gauss(0, 0.15)


def test_a_jump_is_told_with_its_rows_and_noise_is_not(capsys):
    told = 0
    for seed in range(20):
        rng, guard = random.Random(seed), Guard(0)
        for number in range(1, 400):
            guard.spiked(step(number, falling(number, rng)))
        told += len(guard.spikes)
        assert guard.spiked(step(400, 6.0))
        assert guard.spikes[-1] == {"step": 400, "loss": 6.0, "rows": ["a.jsonl:400", "b.jsonl:400"]}
    assert told == 0
    said = capsys.readouterr().err
    assert "step 400: the loss jumped to 6.0000 from about 2." in said
    assert "rows: a.jsonl:400, b.jsonl:400" in said


def test_what_was_seen_before_a_kill_is_seen_after_it():
    rng, whole = random.Random(1), Guard(0)
    rows: list[dict[str, Any]] = []
    for number in range(1, 120):
        log = step(number, 9.0 if number == 60 else falling(number, rng))
        jumped = whole.spiked(log)
        rows.append({"step": number, "loss": log.loss} | ({"spike": log.rows} if jumped else {}))
    again = Guard(0, rows)
    assert again.spikes == whole.spikes
    assert len(whole.spikes) == 1
    for loss in (2.5, 4.0, 9.0):
        assert again.spiked(step(120, loss)) == whole.spiked(step(120, loss))
    assert SEEN >= ENOUGH
