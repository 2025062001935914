"""KTO against numbers worked by hand, and its baseline over whole steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trivium.forest import Example, TokenSequence, lay_out
from trivium.objectives import defaults, objective
from trivium.objectives.kto import kto_loss, mismatched


def rated(prompt: list[int], *answers: list[int], scores: tuple[float, ...] = (1,), **more) -> Example:
    rows = [prompt + a for a in answers]
    weights = [(np.arange(len(r)) >= len(prompt)).astype(np.float32) for r in rows]
    return Example(tuple(TokenSequence(np.array(r), w) for r, w in zip(rows, weights, strict=True)), scores=scores,
                   **more)  # fmt: skip


def goal(**more):
    return objective({"loss": "kto", **defaults("kto"), **more})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    gain, good = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, True, False])
    found = kto_loss(gain, good, 0.5, 0.4, 1.5, 0.8).tolist()
    assert found == pytest.approx([1.5 * (1 - sigmoid(0.4 * 1.5)), 1.5 * (1 - sigmoid(-0.4 * 1.5)), 0.8 * 0.5])


def test_it_starts_at_a_half_and_says_nothing_of_uneven_weights():
    assert (goal().at_start, goal().needs_reference, goal().name) == (0.5, True, "kto(beta=0.1)")
    uneven = goal(desirable_weight=2.0)
    assert (uneven.at_start, uneven.at_start_of) == (0, "margin")
    forest = lay_out([rated([1, 2], [3, 4]), rated([5], [6], scores=(-1,))])
    same = -torch.rand(3)
    found = goal().first.then(0.0).compute(same, forest, same)
    assert float(found.sum) / goal().weight(forest) == pytest.approx(0.5)
    assert float(uneven.first.then(0.0).compute(same, forest, same).stats["margin"]) == 0
    assert float(uneven.first.then(0.0).compute(same, forest, same - 0.3).stats["margin"]) > 0.01


def test_the_baseline_is_the_mean_gain_of_other_answers_and_never_below_zero():
    forests = [lay_out([rated([1], [2, 3]), rated([4], [5])]), lay_out([rated([6], [7, 8, 9])])]
    ahead = 0.5
    known = goal(beta=1.0).first.known(lambda f: torch.zeros(len(f.source)), lambda f: torch.full((len(f.source),),
                                       -ahead), forests)  # fmt: skip
    same = torch.zeros(1)
    probe = lay_out([rated([1], [2])])
    assert float(known.compute(same, probe, same).stats["baseline"]) == pytest.approx(ahead * 6 / 3)
    behind = goal(beta=1.0).first.known(lambda f: torch.full((len(f.source),), -9.0),
                                        lambda f: torch.zeros(len(f.source)), forests)  # fmt: skip
    assert float(behind.compute(same, probe, same).stats["baseline"]) == 0.0


def test_mismatched_answers_are_those_to_the_prompt_before():
    examples = [rated([1, 2], [3, 4]), rated([5], [6], [7, 7, 7], scores=(1, -1)), rated([8], [9])]
    found = mismatched(examples)
    assert [[s.tokens.tolist() for s in e.sequences] for e in found] == [[[1, 2, 9]], [[5, 3, 4], [5, 3, 4]], [[8, 6]]]
    assert [s.weights.tolist() for s in found[0].sequences] == [[0, 0, 1]]
    assert len({e.identity for e in found}) == 3
    assert mismatched(examples)[0].identity == found[0].identity
    assert mismatched(examples[:1]) == []


def test_a_mismatched_answer_is_not_longer_than_what_fits():
    found = mismatched([rated(list(range(1, 9)), [10]), rated([1], [11, 12, 13, 14])])
    assert [s.tokens.tolist() for e in found for s in e.sequences] == [[*range(1, 9), 11], [1, 10]]


def test_each_kind_of_answer_has_statistics_of_its_own():
    forest = lay_out([rated([1], [2], weight=2.0), rated([3], [4], scores=(-1,)), rated([5], [6], scores=(-1,))])
    known = goal(beta=1.0).first.then(0.1)
    found = known.compute(torch.tensor([-1.0, -2.0, -4.0]), forest, torch.tensor([-1.5, -1.0, -4.5]))
    means = {n: float(v) / found.weights.get(n, known.weight(forest)) for n, v in found.stats.items()}
    assert known.weight(forest) == 4
    assert means["logprob_chosen"] == -1.0
    assert means["logprob_rejected"] == -3.0
    assert means["reward_chosen"] == pytest.approx(0.5)
    assert means["reward_rejected"] == pytest.approx((-1.0 + 0.5) / 2)
    # 0.5 is above the baseline, -1 below it, 0.5 is not: weights 2, 1, 1
    assert means["accuracy"] == pytest.approx(3 / 4)
    assert means["margin"] == pytest.approx((2 * 0.4 + 1.1 - 0.4) / 4)


def test_of_a_pair_the_order_is_what_is_right():
    forest = lay_out([rated([1], [2], [3], scores=(1, -1))])
    known = goal(beta=1.0).first.then(5.0)
    found = known.compute(torch.tensor([-1.0, -2.0]), forest, torch.tensor([-1.5, -2.1]))
    assert float(found.stats["accuracy"]) / found.weights["accuracy"] == 1.0
    assert float(found.stats["margin"]) == pytest.approx(0.4)
    assert known.weight(forest) == 2
