"""The loop by itself: what is handed to it, what it refuses, what it writes down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivium.errors import DataError, NonFiniteError
from trivium.evaluate.held_out import evaluate
from trivium.forest import Example, Forest, TokenSequence, lay_out
from trivium.objectives import objective
from trivium.objectives.base import Objective, Result
from trivium.train.loop import StepLog, Task, train
from trivium.train.optimizer import build_optimizers
from trivium.train.reference import Remembered, UnderParent, no_reference


class Bigram(nn.Module):
    """The smallest language model: the next token's logits are a row of a table."""

    def __init__(self, vocabulary: int = 12) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)))
        self.poison = 0.0

    def logprob(self, forest: Forest) -> Tensor:
        logits = self.table[forest.tokens[forest.source]]
        return logits.log_softmax(-1).gather(1, forest.target[:, None])[:, 0] + self.poison


def example(number: int, weights: float = 1.0, tokens: int = 6) -> Example:
    rng = np.random.default_rng(number)
    row = TokenSequence(rng.integers(0, 12, tokens), np.full(tokens, weights, np.float32))
    return Example((row,), f"stories.jsonl:{number}")


def task(model: Bigram, batches, steps: int = 3, goal: Objective | None = None, **changed) -> Task:
    optimizers = build_optimizers(model, set(), "adamw", 0.1, 0.0)
    values = {
        "objective": goal or objective({"loss": "next_token"}),
        "logprob": model.logprob,
        "reference": no_reference,
        "batches": batches,
        "steps": steps,
        "rate": lambda n: 1.0,
        "optimizers": optimizers,
        "max_grad_norm": 1e9,
    }
    return Task(**{**values, **changed})


def run(model: Bigram, batches, steps: int = 3, **more) -> list[StepLog]:
    logs: list[StepLog] = []
    train(task(model, batches, steps, **more), logs.append)
    return logs


def forests(*groups: list[Example]):
    return lambda n: (lay_out(g, share=False) for g in groups)


def test_a_step_by_hand():
    """Loss: the mean over trained tokens of both micro-batches; gradient norm and update of that loss."""
    model, twin = Bigram(), Bigram()
    groups = ([example(1, 1.0), example(2, 0.5)], [example(3, 2.0, 9)])
    (log,) = run(model, forests(*groups), steps=1, rate=lambda n: 0.5)
    flat = [s for g in groups for e in g for s in e.sequences]
    terms = [
        (w, twin.table[a].log_softmax(-1)[b])
        for s in flat
        for a, b, w in zip(s.tokens[:-1], s.tokens[1:], s.weights[1:], strict=True)
    ]
    loss = -sum(w * t for w, t in terms) / sum(w for w, _ in terms)
    loss.backward()
    assert log.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert log.grad_norm == pytest.approx(float(twin.table.grad.norm()), rel=1e-5)
    reference = torch.optim.AdamW([twin.table], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    reference.step()
    assert torch.allclose(model.table, twin.table, atol=1e-6)
    assert (log.step, log.learning_rate) == (1, 0.05)
    assert (log.tokens, log.trained_tokens, log.examples) == (5 + 5 + 8, 5 + 5 + 8, 3)
    assert log.seconds > 0


def test_the_gradient_is_clipped_and_its_norm_logged_unclipped():
    def batches(n):
        return iter([lay_out([example(1)])])

    free, clipped = Bigram(), Bigram()
    seen: list[float] = []
    for model, most in ((free, 1e9), (clipped, 0.01)):
        sgd = torch.optim.SGD([model.table], lr=1.0)
        sgd.param_groups[0]["peak_lr"] = 1.0
        before = model.table.detach().clone()
        (log,) = run(model, batches, steps=1, optimizers=[sgd], max_grad_norm=most)
        seen.append(log.grad_norm)
        assert float((model.table.detach() - before).norm()) == pytest.approx(min(most, log.grad_norm), rel=1e-3)
    assert seen[0] == pytest.approx(seen[1])


@pytest.mark.promise(6)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_a_weight(bad, number, where, tried):
    tried(faults=1)
    model = Bigram()
    logs: list[StepLog] = []
    groups = [[example(n) for n in range(7)], [example(9)]]

    def batches(n):
        if n + 1 == number:
            if where == "loss":
                model.poison = bad
            else:
                model.table.register_hook(lambda g: g * bad)
        return forests(*groups)(n)

    made = task(model, batches)
    moments = []

    def after(log: StepLog) -> None:
        logs.append(log)
        moments.append({k: v.clone() for k, v in made.optimizers[0].state[model.table].items()})

    before = [model.table.detach().clone()]
    with pytest.raises(NonFiniteError) as caught:
        train(made, lambda log: (after(log), before.append(model.table.detach().clone())))
    assert len(logs) == number - 1
    assert torch.equal(model.table.detach(), before[-1])
    if moments:
        now = made.optimizers[0].state[model.table]
        assert all(torch.equal(now[k], v) for k, v in moments[-1].items())
    said = str(caught.value)
    assert f"step {number}: the {where} is not finite" in said
    assert "stories.jsonl:0, stories.jsonl:1, stories.jsonl:2, stories.jsonl:3 and 4 more" in said
    assert caught.value.exit_code == 5


@pytest.mark.promise(8)
@pytest.mark.parametrize("groups", [[], [[example(1, 0.0)]], [[example(1, 0.0), example(2, 0.0)], [example(3, 0.0)]]])
def test_a_step_without_anything_to_learn_is_refused(groups):
    model = Bigram()
    before = model.table.detach().clone()
    with pytest.raises(DataError, match="step 1: nothing to learn") as caught:
        run(model, forests(*groups))
    assert all(e.origin in str(caught.value) for g in groups for e in g)
    assert torch.equal(model.table.detach(), before)


def test_statistics_are_per_unit_of_weight_of_the_whole_step():
    def compute(logprob: Tensor, forest: Forest, reference: Tensor | None) -> Result:
        rows = torch.tensor(float(forest.sequences))
        return Result(-logprob.sum(), {"loss": -logprob.sum().detach(), "rows": rows})

    goal = Objective("counted", compute, lambda f: float(f.sequences * 2))
    (log,) = run(Bigram(), forests([example(1), example(2)], [example(3)]), steps=1, goal=goal)
    assert log.stats == {"rows": 0.5}


def test_evaluation_is_the_training_loss_without_gradient():
    model = Bigram()
    groups = ([example(1, 1.0), example(2, 0.5)], [example(3, 2.0, 9)])
    found = evaluate(objective({"loss": "next_token"}), model.logprob, no_reference, forests(*groups)(0))
    assert model.table.grad is None
    (log,) = run(model, forests(*groups), steps=1)
    assert found == {"loss": pytest.approx(log.loss, rel=1e-6)}
    assert evaluate(objective({"loss": "next_token"}), model.logprob, no_reference, []) == {}


# --- the reference


def pairs(count: int) -> list[Example]:
    return [Example((example(2 * n, tokens=5 + n).sequences[0], example(2 * n + 1).sequences[0])) for n in range(count)]


def test_remembered_numbers_follow_their_examples_into_any_batch():
    model = Bigram()
    examples = pairs(6)
    remembered = Remembered(model.logprob, [lay_out(examples[:4]), lay_out(examples[4:])])
    expected = {e: model.logprob(lay_out([e])).detach() for e in examples}
    with torch.no_grad():
        model.table.add_(1.0 + torch.randn_like(model.table))
    for order in ([5, 0, 3], [1], [2, 4]):
        batch = lay_out([examples[n] for n in order])
        found = remembered(batch)
        assert torch.equal(found, torch.cat([expected[examples[n]] for n in order]))
        assert not torch.allclose(found, model.logprob(batch))
        assert not found.requires_grad


def test_under_the_parent_no_gradient_and_the_parent_only_within():
    import contextlib

    inside = []
    model = Bigram()

    @contextlib.contextmanager
    def parent():
        inside.append(True)
        yield
        inside.pop()

    def logprob(forest: Forest) -> Tensor:
        assert inside
        return model.logprob(forest)

    found = UnderParent(logprob, parent)(lay_out(pairs(1)))
    assert not found.requires_grad
    assert not inside
