"""Losses of pairs against numbers worked by hand from the papers' formulas, and what is made of batches of them."""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trivium.forest import Example, Forest, TokenSequence, lay_out
from trivium.objectives import OBJECTIVES, defaults, fault, objective, shares
from trivium.objectives.pairs import Pairs, pair_sums

PAIRED = [name for name, entry in OBJECTIVES.items() if entry.function and name != "kto"]
RELATIVE = [name for name in PAIRED if OBJECTIVES[name].relative]
LN2 = math.log(2)


def row(tokens: list[int], first: int) -> TokenSequence:
    return TokenSequence(np.array(tokens), (np.arange(len(tokens)) >= first).astype(np.float32))


def answers(prompt: list[int], *told: list[int], scores: tuple[float, ...] = (1, -1), **more) -> Example:
    return Example(tuple(row(prompt + a, len(prompt)) for a in told), scores=scores, **more)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def settings_of(loss: str, **more):
    return {"loss": loss, **defaults(loss), **more}


# --- every loss, on one pair: chosen gained 1.5 over 3 tokens, rejected lost 0.5 over 2; beta 0.4

C, R, B = 1.5, -0.5, 0.4
LOGPROBS = [-1.0, -0.7, -0.8, -1.4, -0.6]  # chosen -2.5, rejected -2.0
PARENT = [-1.5, -1.2, -1.3, -1.15, -0.35]
ODDS = [math.exp(x) / (1 - math.exp(x)) for x in (-2.5 / 3, -2.0 / 2)]


def nls(x: float) -> float:
    """-log sigmoid."""
    return -math.log(sigmoid(x))


BY_HAND = {
    "dpo": ({}, nls(B * (C - R))),
    "cdpo": ({"loss": "dpo", "label_smoothing": 0.1}, 0.9 * nls(B * (C - R)) + 0.1 * nls(-B * (C - R))),
    "robust": ({"label_smoothing": 0.2}, (0.8 * nls(B * (C - R)) - 0.2 * nls(-B * (C - R))) / 0.6),
    "ipo": ({}, (C / 3 - R / 2 - 1 / (2 * B)) ** 2),
    "hinge": ({}, 1 - B * (C - R)),
    "dpo_norm": ({}, nls(B * (C / 3 - R / 2))),
    "exo": (
        {"label_smoothing": 0.05},
        sigmoid(B * (C - R)) * math.log(sigmoid(B * (C - R)) / 0.95)
        + sigmoid(-B * (C - R)) * math.log(sigmoid(-B * (C - R)) / 0.05),
    ),
    "apo_zero": ({}, 1 - sigmoid(B * C) + sigmoid(B * R)),
    "apo_down": ({}, sigmoid(B * C) + 1 - sigmoid(B * (C - R))),
    "nca": ({}, nls(B * C) + 0.5 * nls(-B * C) + 0.5 * nls(-B * R)),
    "bco": ({}, nls(B * C) + nls(-B * R)),
    "orpo": ({"sft_weight": 1.0}, B * nls(math.log(ODDS[0] / ODDS[1])) + 2.5 / 3),
    "simpo": ({"gamma": 0.3}, nls(B * (-2.5 / 3 + 2.0 / 2) - 0.3)),
    "cpo": ({"sft_weight": 1.0}, nls(B * (-2.5 + 2.0)) + 2.5 / 3),
    "forward_kl": ({"loss": "dpo", "divergence": "forward_kl"}, nls(B * (-math.exp(-C) + math.exp(-R)))),
    "js": ({"loss": "dpo", "divergence": "js"}, nls(B * math.log(sigmoid(C) / sigmoid(R)))),
    "alpha": (
        {"loss": "dpo", "divergence": "alpha", "divergence_alpha": 0.5},
        nls(B * (math.exp(-0.5 * C) - math.exp(-0.5 * R)) / -0.5),
    ),
    "alpha of 1": ({"loss": "dpo", "divergence": "alpha", "divergence_alpha": 1.0}, nls(B * (C - R))),
    # the chosen answer's third token is beyond the two of the other: it gained 0.5
    "ld-dpo": ({"loss": "dpo", "ld_alpha": 0.3}, nls(B * (1.0 + 0.3 * 0.5 - R))),
    "dpo and sft": ({"loss": "dpo", "sft_weight": 2.0}, nls(B * (C - R)) + 2 * 2.5 / 3),
    "a mixture": ({"loss": {"dpo": 1.0, "hinge": 0.5}}, nls(B * (C - R)) + 0.5 * (1 - B * (C - R))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    changes, expected = BY_HAND[name]
    loss = changes.get("loss", name)
    goal = objective({"loss": loss, **defaults(loss), "beta": B, **changes})
    forest = lay_out([answers([1, 2], [3, 4, 5], [6, 7])])
    found = goal.compute(torch.tensor(LOGPROBS), forest, torch.tensor(PARENT))
    assert float(found.sum) == pytest.approx(expected, rel=1e-5)
    assert goal.weight(forest) == 1
    assert float(found.stats["logprob_chosen"]) == pytest.approx(-2.5)
    assert float(found.stats["logprob_rejected"]) == pytest.approx(-2.0)


def test_every_loss_has_a_number_by_hand():
    assert {changes.get("loss", name) for name, (changes, _) in BY_HAND.items() if name in PAIRED} == set(PAIRED)


STARTS = {"dpo": LN2, "robust": LN2, "ipo": 25.0, "hinge": 1, "dpo_norm": LN2, "apo_zero": 1, "apo_down": 1,
          "nca": 2 * LN2, "bco": 2 * LN2,
          "exo": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001)}  # fmt: skip


@pytest.mark.parametrize("loss", RELATIVE)
def test_its_value_where_nothing_has_been_learnt_yet(loss):
    goal = objective(settings_of(loss))
    assert goal.at_start == pytest.approx(STARTS[loss], rel=1e-6)
    forest = lay_out([answers([1, 2], [3, 4], [5])])
    same = torch.tensor([-1.0, -2.0, -4.0])
    found = goal.compute(same, forest, same)
    assert float(found.stats[goal.at_start_of]) == pytest.approx(goal.at_start, rel=1e-6)
    assert float(found.stats["accuracy"]) == 0.5  # a tie


def test_the_start_of_a_mixture_and_of_smoothed_labels():
    assert objective(settings_of("dpo", label_smoothing=0.3)).at_start == pytest.approx(LN2)
    mixed = objective({**settings_of("dpo"), "loss": {"dpo": 0.5, "hinge": 2.0}})
    assert (mixed.at_start, mixed.name) == (pytest.approx(0.5 * LN2 + 2), "0.5 dpo + 2 hinge(beta=0.1)")
    beside = objective({**settings_of("dpo"), "loss": {"dpo": 1.0, "simpo": 1.0}, "gamma": 1.0})
    assert (beside.at_start, beside.at_start_of, beside.needs_reference) == (0, "margin", True)


def test_losses_without_a_reference_need_none():
    forest = lay_out([answers([1, 2], [3, 4], [5])])
    for loss in ("orpo", "simpo", "cpo"):
        goal = objective(settings_of(loss))
        assert (goal.needs_reference, goal.at_start) == (False, None)
        assert float(goal.compute(torch.tensor([-1.0, -2.0, -4.0]), forest, None).sum) > 0


def test_nothing_overflows():
    forest = lay_out([answers([1], [2], [3])])
    for loss in PAIRED:
        for gains in ([1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]):
            logprob = torch.tensor(gains, requires_grad=True)
            found = objective(settings_of(loss)).compute(logprob, forest, torch.zeros(2)).sum
            found.backward()
            assert math.isfinite(float(found.detach())), (loss, gains)
            assert torch.isfinite(logprob.grad).all(), (loss, gains)


def test_the_table_names_just_the_settings_that_its_functions_take():
    known = {"chosen", "rejected", "margin", "chosen_tokens", "rejected_tokens", "chosen_logprob", "rejected_logprob"}
    handled = {"sft_weight", "ld_alpha", "divergence", "divergence_alpha", "reference_sync_steps", "reference_mixup"}
    for name in PAIRED:
        module, function = OBJECTIVES[name].function.split(":")
        taken = set(inspect.signature(getattr(importlib.import_module(module), function)).parameters)
        assert taken - known == set(OBJECTIVES[name].settings) - handled, name
        assert OBJECTIVES[name].relative == bool({"chosen", "rejected"} & taken)


# --- batches


def numbers(forest: Forest, seed: int = 0) -> Tensor:
    return -torch.rand(len(forest.source), generator=torch.Generator().manual_seed(seed))


def test_a_list_of_answers_is_every_better_one_against_every_worse_one():
    example = answers([1], [2, 3], [4], [5, 6, 7], scores=(0.5, 2, -1))
    assert example.pairs == ((0, 2), (1, 0), (1, 2))
    goal = objective(settings_of("dpo"))
    forest = lay_out([example])
    logprob, parent = numbers(forest), numbers(forest, 1)
    found = goal.compute(logprob, forest, parent)
    gains = [float(g.sum()) for g in (logprob - parent).split([2, 1, 3])]
    losses = [nls(0.1 * (gains[a] - gains[b])) for a, b in example.pairs]
    assert float(found.sum) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert goal.weight(forest) == 1


def test_ties_and_same_answers_are_no_pairs():
    assert answers([1], [2], [3], scores=(1, 1)).pairs == ()
    assert answers([1], [2], [2], [3], scores=(3, 2, 1)).pairs == ((0, 2), (1, 2))


def test_rows_weigh_what_they_say():
    one, other = answers([1], [2], [3]), answers([4], [5], [6])
    goal = objective(settings_of("ipo"))
    forest = lay_out([replace(one, weight=0.25), replace(other, weight=3.0)])
    found = goal.compute(numbers(forest), forest, numbers(forest, 1))
    alone = [lay_out([e]) for e in (one, other)]
    each = [goal.compute(n, f, p) for f, n, p in zip(alone, numbers(forest).split(2), numbers(forest, 1).split(2),
                                                     strict=True)]  # fmt: skip
    assert goal.weight(forest) == 3.25
    for name in found.stats:
        expected = 0.25 * each[0].stats[name] + 3 * each[1].stats[name]
        assert float(found.stats[name]) == pytest.approx(float(expected), rel=1e-5), name


@pytest.mark.parametrize("loss", PAIRED)
def test_margins_raise_what_is_asked_where_the_loss_knows_them(loss):
    goal = objective(settings_of(loss))
    plain, asked = (lay_out([answers([1], [2], [3, 4], margin=m)]) for m in (0.0, 0.7))
    logprob, parent = numbers(plain), numbers(plain, 1)
    before, after = (float(goal.compute(logprob, f, parent).sum) for f in (plain, asked))
    assert goal.margins == (loss in ("dpo", "robust", "hinge", "dpo_norm", "exo", "simpo", "cpo"))
    assert (after != before) == goal.margins
    if loss in ("dpo", "simpo", "hinge", "cpo", "dpo_norm"):
        assert after > before


def test_dpo_with_a_margin_by_hand():
    forest = lay_out([answers([1, 2], [3, 4, 5], [6, 7], margin=0.6)])
    found = objective(settings_of("dpo", beta=B)).compute(torch.tensor(LOGPROBS), forest, torch.tensor(PARENT))
    assert float(found.sum) == pytest.approx(nls(B * (C - R) - 0.6), rel=1e-6)


def test_length_desensitised_sums_over_uneven_answers():
    forest = lay_out([answers([1], [2, 3, 4], [5], [6, 7], scores=(3, 2, 1))])
    values = torch.tensor([1.0, 10.0, 100.0, 5.0, 2.0, 20.0], requires_grad=True)
    pairs = Pairs.of(forest)
    chosen, rejected = pair_sums(values, forest, pairs, 0.5)
    assert chosen.tolist() == [1 + 0.5 * 110, 11 + 0.5 * 100, 5]
    assert rejected.tolist() == [5, 22, 2 + 0.5 * 20]
    chosen.sum().backward()
    assert values.grad.tolist() == [2, 1.5, 1, 1, 0, 0]
    assert [s.tolist() for s in pair_sums(values, forest, pairs, None)] == [[111, 111, 5], [5, 22, 22]]
    assert [s.tolist() for s in pair_sums(values, forest, pairs, 1.0)] == [[111, 111, 5], [5, 22, 22]]


# --- what a recipe may say


@pytest.mark.parametrize(
    ("loss", "given", "says"),
    [
        ("dop", {}, "not dop; did you mean 'dpo'"),
        ("sigmoid", {}, "it is called dpo here"),
        ("cdpo", {}, "it is called dpo with label_smoothing here"),
        ("dpo", {"gamma": 1.0}, "gamma: dpo has no such setting; it is for simpo"),
        ("exo", {"label_smoothing": 0.0}, "exo needs one above 0"),
        ("dpo", {"divergence": "alpha"}, "divergence_alpha"),
        ("dpo", {"divergence": "js", "divergence_alpha": 0.5}, "divergence_alpha"),
        ("dpo", {"reference_mixup": 0.5}, "without reference_sync_steps"),
        ("simpo", {"reference_sync_steps": 5}, "simpo has no such setting"),
        ({"dpo": 1.0, "kto": 1.0}, {}, "only losses of pairs can be mixed"),
        ({"dpo": 0.0}, {}, "weight of dpo is 0.0"),
        ({"dpo": 1.0, "simpo": 1.0}, {}, "beta: dpo and simpo have different defaults: give one"),
        ({}, {}, "it names none"),
    ],
)
def test_what_does_not_go_together_is_said(loss, given, says):
    found = fault(loss, "preference", [*PAIRED, "kto"], given)
    assert found is not None
    assert says in found


def test_what_goes_together_is_not_held_up():
    allowed = [*PAIRED, "kto"]
    assert fault({"dpo": 1, "simpo": 0.5}, "preference", allowed, {"beta": 0.3}) is None
    assert fault("kto", "preference", allowed, {"desirable_weight": 2.0, "reference_sync_steps": 3}) is None
    assert shares("dpo") == {"dpo": 1.0}
    assert defaults({"simpo": 1, "hinge": 1})["beta"] == 2.0
