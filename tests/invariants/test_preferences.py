"""Every preference loss, the reward model and KTO's baseline: how a step is laid out cannot change it.

Loss and gradient of one optimizer step through the loop itself, on a tiny model: all examples in one forest that shares
what begins alike, against rows by themselves, against one example a micro-batch; pairs, lists of 2 to 8 answers, rows
behind one system prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from trivium.data.examples import at_its_end
from trivium.forest import Example, Forest, TokenSequence, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.load import wrap
from trivium.model.new import new_model
from trivium.objectives import OBJECTIVES, defaults, objective
from trivium.objectives.base import Objective
from trivium.train.loop import StepLog, Task, train
from trivium.train.reference import Moving, Remembered

VOCABULARY = 64
LOSSES = [name for name, entry in OBJECTIVES.items() if entry.rows is not None]
Grouping = Callable[[list[Example]], list[list[Example]]]

together: Grouping = lambda examples: [examples]  # noqa: E731
alone: Grouping = lambda examples: [[e] for e in examples]  # noqa: E731


def rows(kind: str, seed: int, count: int = 7) -> list[Example]:
    """Prompts, half of them behind one system prompt, with 1 to 8 answers; a row weighs and asks its own."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(3, VOCABULARY, rng.integers(low, high))  # noqa: E731
    system, found = draw(18, 19), []
    for number in range(count):
        prompt = np.r_[system, draw(4, 20)] if number % 2 else draw(17, 30)
        answers = [draw(1, 9) for _ in range(2 + number)]
        if kind == "rating":
            answers = answers[: 1 + number % 2]
            scores = (1, -1)[: len(answers)] if number % 3 else (-1,) * len(answers)
        else:
            scores = tuple(rng.permutation(len(answers)).tolist())
        sequences = [np.r_[prompt, a] for a in answers]
        weights = [(np.arange(len(s)) >= len(prompt)).astype(np.float32) for s in sequences]
        found.append(Example(tuple(map(TokenSequence, sequences, weights)), f"rows:{number}", key=number,
                             scores=scores, weight=1 + number / 4, margin=0.1 * number))  # fmt: skip
    return found


def examples_for(loss: str, seed: int = 0) -> list[Example]:
    made = rows(OBJECTIVES[loss].rows or "pair", seed)
    if loss != "bradley_terry":
        return made
    ends = [tuple(at_its_end(s) for s in e.sequences) for e in made]
    return [Example(s, e.origin, 0, e.key, None, e.scores, e.weight, e.margin) for e, s in zip(made, ends, strict=True)]


@cache
def tiny(seed: int) -> torch.nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=VOCABULARY, initializer_range=0.2,
    )  # fmt: skip
    return new_model(config, seed).eval()


def policy(loss: str, seed: int = 1) -> LanguageModel:
    model = wrap(copy.deepcopy(tiny(seed)), None, "float32", torch.float32)
    if loss == "bradley_terry":
        from transformers import LlamaForSequenceClassification

        from trivium.virtual import NEW_HEADS

        config = copy.deepcopy(model.hf.config)
        config.num_labels, config.pad_token_id = 1, 0
        torch.manual_seed(0)
        hf = LlamaForSequenceClassification(config).eval()
        hf.model = model.hf.model
        setattr(hf, NEW_HEADS, ("score",))
        model = wrap(hf, None, "float32", torch.float32)
    return model


class Kept(torch.optim.Optimizer):
    """Keeps the gradient instead of stepping."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0, "peak_lr": 1.0})
        self.taken: list[Tensor] = []

    def step(self, closure=None) -> None:
        self.taken = [p.grad.clone() for g in self.param_groups for p in g["params"]]


def one_step(
    goal: Objective, model: LanguageModel, examples: list[Example], grouping: Grouping = together, share: bool = True,
    reference=None,
) -> tuple[StepLog, Tensor]:  # fmt: skip
    """The loop's first step: its log, and the whole gradient."""
    optimizer = Kept([p for p in model.hf.parameters() if p.requires_grad])

    def forests(some: list[Example]) -> Iterator[Forest]:
        yield from (lay_out(group, share=share) for group in grouping(some))

    beside = goal.first.examples(examples) if goal.first else []
    if reference is None and goal.needs_reference:
        parent = wrap(copy.deepcopy(tiny(2)), None, "float32", torch.float32)
        with parent.laid_out("forest"):
            reference = Remembered(parent.logprob, [lay_out([e]) for e in [*examples, *beside]])
    logs: list[StepLog] = []
    with model.laid_out("forest"):
        task = Task(goal, model.logprob, reference or (lambda _: None), lambda _: forests(examples), 1, lambda _: 1.0,
                    [optimizer], 1e9, beside=lambda _: forests(beside))  # fmt: skip
        train(task, logs.append)
    return logs[0], torch.cat([g.reshape(-1) for g in optimizer.taken])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_neither_sharing_nor_accumulation_changes_a_step(loss, seed):
    goal, examples = objective({"loss": loss, **defaults(loss)}), examples_for(loss, seed)
    log, gradient = one_step(goal, policy(loss), examples)
    halves: Grouping = lambda some: [some[:2], some[2:]]  # noqa: E731
    for grouping, share in ((together, False), (alone, True), (halves, False)):
        other, found = one_step(goal, policy(loss), examples, grouping, share)
        assert other.loss == pytest.approx(log.loss, rel=1e-5)
        assert apart(found, gradient) < 1e-5
        for name, value in log.stats.items():
            assert other.stats[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    separate = sum(len(s.inputs) for e in examples for s in e.sequences)
    assert log.tokens < 0.75 * separate, "the forest must have shared something, or the test says little"


def test_a_step_of_a_loss_depends_on_its_rows():
    """Else the test above could not fail."""
    goal = objective({"loss": "dpo", **defaults("dpo")})
    one, gradient = one_step(goal, policy("dpo"), examples_for("dpo", 0))
    other, found = one_step(goal, policy("dpo"), examples_for("dpo", 1))
    assert abs(one.loss - other.loss) > 1e-3
    assert apart(found, gradient) > 0.1


def test_ktos_baseline_is_of_the_whole_step():
    """Its value changes the gradient, and is the same however the step is cut."""
    goal, examples = objective({"loss": "kto", **defaults("kto"), "beta": 0.5}), examples_for("kto")
    model = wrap(copy.deepcopy(tiny(2)), None, "float32", torch.float32)  # as the parent: everything gains nothing
    flat, _ = one_step(goal, model, examples)
    assert flat.stats["baseline"] == pytest.approx(0, abs=1e-4)
    other = wrap(copy.deepcopy(tiny(1)), None, "float32", torch.float32)
    with other.laid_out("forest"):
        theirs = Remembered(other.logprob, [lay_out([e]) for e in [*examples, *goal.first.examples(examples)]])
    model = wrap(copy.deepcopy(tiny(2)), None, "float32", torch.float32)
    logs = [one_step(goal, copy.deepcopy(model), examples, grouping, reference=theirs)[0]
            for grouping in (together, alone)]  # fmt: skip
    baselines = [log.stats["baseline"] for log in logs]
    assert baselines[0] == pytest.approx(baselines[1], rel=1e-5)


def test_a_moving_reference_starts_as_the_model_and_follows_it():
    model = policy("dpo")
    weights = dict(model.hf.named_parameters())
    import contextlib

    goal, examples = objective({"loss": "dpo", **defaults("dpo")}), examples_for("dpo")
    forest = lay_out(examples)
    with model.laid_out("forest"):
        moving = Moving(model.logprob, weights, 3, 0.5, contextlib.nullcontext)
        with torch.no_grad():
            start = model.logprob(forest)
            assert torch.equal(moving(forest), start)
            before = {n: p.detach().clone() for n, p in weights.items()}
            for parameter in weights.values():
                parameter.add_(0.01)
            own = model.logprob(forest)
        assert torch.equal(moving(forest), start), "it moves only when its time has come"
        moving.after_step(2)
        assert torch.equal(moving(forest), start)
        held = {n: t.clone() for n, t in moving.tensors().items()}
        moving.after_step(3)
        found = moving(forest)
        assert not torch.allclose(found, start)
        assert not torch.allclose(found, own)
        for name, tensor in moving.tensors().items():
            assert torch.allclose(tensor, before[name] + 0.005, atol=1e-6)
        moving.put_back(held)
        assert torch.equal(moving(forest), start)
        with torch.no_grad():
            assert torch.equal(model.logprob(forest), own), "the model itself is as it was"
        full = Moving(model.logprob, weights, 1, 1.0, contextlib.nullcontext)
        with torch.no_grad():
            for parameter in weights.values():
                parameter.mul_(1.1)
        full.after_step(1)
        with torch.no_grad():
            assert torch.equal(full(forest), model.logprob(forest))
    assert goal.needs_reference
