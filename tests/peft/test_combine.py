"""Several LoRAs into one, against PEFT and by hand."""

from __future__ import annotations

import copy

import pytest
import torch

import peft
from trivium.errors import RecipeError
from trivium.peft.combine import HOW, SPARSE, Factors, combine

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def three(tiny):
    """PEFT's model with three adapters, and the same as factors."""
    model = None
    for name, (r, alpha) in {"a": (4, 8), "b": (4, 3), "c": (4, 4)}.items():
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False)
        torch.manual_seed(ord(name))
        if model is None:
            model = peft.get_peft_model(tiny("llama"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    found = []
    for name in "abc":
        layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
        found.append({
            n: Factors(m.lora_A[name].weight.detach(), m.lora_B[name].weight.detach(), m.scaling[name])
            for n, m in layers.items()
        })  # fmt: skip
    return model, found


@pytest.mark.parametrize(
    ("how", "theirs", "more"),
    [
        ("cat", "cat", {}),
        ("linear", "linear", {}),
        ("svd", "svd", {}),
        ("svd", "svd", {"rank": 2}),
        ("ties", "ties_svd", {"density": 0.3}),
        ("ties", "ties_svd", {"density": 0.5, "rank": 9}),
        ("dare", "dare_linear_svd", {"density": 0.4}),
        ("dare_ties", "dare_ties_svd", {"density": 0.4, "rank": 9}),
    ],
)
@pytest.mark.parametrize("weights", [[0.7, 0.5, 1.2], [0.7, -0.5, 1.2]])
def test_as_peft(three, monkeypatch, how, theirs, more, weights):
    model, loras = three
    generator = torch.Generator().manual_seed(0)
    # PEFT draws from the global generator: it gets the numbers that we draw
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=generator) < p).to(p))
    options = {"svd_rank": more["rank"]} if "rank" in more else {}
    options |= {"density": more["density"]} if "density" in more else {}
    model.add_weighted_adapter(list("abc"), weights, "new", combination_type=theirs, **options)
    made = combine(loras, weights, how, **more)
    for target, one in made.items():
        other = model.base_model.model.get_submodule(target)
        torch.testing.assert_close(one.update(), other.get_delta_weight("new").detach(), rtol=1e-3, atol=1e-4)
        assert one.scale == 1


def test_cat_is_the_sum_and_svd_its_best_approximation(three):
    _, loras = three
    weights = [1.0, -0.5, 2.0]
    for target in loras[0]:
        exact = sum(w * lora[target].update() for w, lora in zip(weights, loras, strict=True))
        torch.testing.assert_close(combine(loras, weights)[target].update(), exact, rtol=1e-4, atol=1e-5)
        whole = combine(loras, weights, "svd", rank=12)[target]
        torch.testing.assert_close(whole.update(), exact, rtol=1e-3, atol=1e-4)
        less = combine(loras, weights, "svd", rank=3)[target]
        singular = torch.linalg.svdvals(exact)
        assert (less.update() - exact).norm() == pytest.approx(float(singular[3:].norm()), rel=1e-3)
        assert less.A.shape[0] == less.B.shape[1] == 3


def one(*rows: list[float]) -> dict[str, Factors]:
    update = torch.tensor(rows)
    return {"m": Factors(torch.eye(update.shape[1]), update)}


def test_ties_by_hand():
    # trimmed to their two largest of four; elected signs by total: +, -, +, +
    loras = [one([3.0, -1.0], [0.5, 4.0]), one([-2.0, -5.0], [1.0, 0.25]), one([1.0, 0.5], [2.0, -3.0])]
    # kept: [3, 0 / 0, 4], [-2, -5 / 0, 0], [0, 0 / 2, -3]
    found = combine(loras, [1.0, 1.0, 1.0], "ties", density=0.5)["m"].update()
    torch.testing.assert_close(found, torch.tensor([[3.0, -5.0], [2.0, 4.0]]))
    weighted = combine(loras, [2.0, 1.0, 0.5], "ties", density=1.0)["m"].update()
    # signs of the totals 2, -5.5, 3.5, 1.25; means of the weighted entries that agree
    torch.testing.assert_close(weighted, torch.tensor([[(6 + 0.5) / 2, -7 / 2], [3 / 3, 8.25 / 2]]))


@pytest.mark.parametrize("how", ["dare", "dare_ties"])
def test_dare_keeps_the_mean_and_repeats(how):
    update = torch.full((200, 200), 0.5)
    lora = {"m": Factors(torch.eye(200), update)}
    found = combine([lora], [1.0], how, rank=200, density=0.25, seed=3)["m"].update()
    assert set(found.mul(1000).round().unique().tolist()) == {0, 2000}
    assert abs(float(found.mean()) - 0.5) < 0.02
    again = combine([lora], [1.0], how, rank=200, density=0.25, seed=3)["m"].update()
    assert torch.equal(found, again)
    assert not torch.equal(found, combine([lora], [1.0], how, rank=200, density=0.25, seed=4)["m"].update())


def test_a_module_that_only_some_adapt():
    a, b = one([2.0, 4.0]), {"other": Factors(torch.ones(1, 3), torch.ones(2, 1), 5.0)}
    found = combine([a, b], [0.5, 2.0], "svd")
    torch.testing.assert_close(found["m"].update(), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(found["other"].update(), torch.full((2, 3), 10.0))


@pytest.mark.parametrize("how", HOW)
def test_what_a_lora_does_not_adapt_counts_as_zero(how):
    more = {"density": 0.5} if how in SPARSE else {}
    rows = [3.0, -1.0, 0.5], [0.25, 4.0, -2.0], [1.0, 5.0, 6.0]
    absent = combine([one(*rows), {}], [0.5, 2.0], how, **more)
    nothing = {"m": Factors(torch.zeros(3, 3), torch.zeros(3, 3))}
    zero = combine([one(*rows), nothing], [0.5, 2.0], how, **more)
    torch.testing.assert_close(absent["m"].update(), zero["m"].update())


def test_a_negative_weight_takes_away():
    a = one([2.0, 4.0])
    torch.testing.assert_close(combine([a], [-1.0], "linear")["m"].update(), torch.tensor([[-2.0, -4.0]]))
    turned = {"m": Factors(a["m"].A, a["m"].B, scale=-1.0)}
    torch.testing.assert_close(combine([turned], [-1.0], "linear")["m"].update(), torch.tensor([[2.0, 4.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", HOW)
def test_results_are_float32(how, dtype):
    lora = {"m": Factors(torch.eye(2, dtype=dtype), torch.ones(3, 2, dtype=dtype))}
    found = combine([lora, lora], [1, 2], how, density=0.5 if how in SPARSE else None)["m"]
    assert found.A.dtype == found.B.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], []), "no LoRA"),
        (([{}, {}], [1.0, 1.0]), "no LoRA"),
        (([one([1.0])], [1.0, 2.0]), "weights [1.0, 2.0] for 1 LoRAs"),
        (([one([1.0])], [float("nan")]), "weights [nan]"),
        (([one([1.0])], [float("inf")]), "weights [inf]"),
        (([one([1.0])], [1.0], "tis"), "did you mean 'ties'"),
        (([one([1.0])], [1.0], "ties"), "ties with density None"),
        (([one([1.0])], [1.0], "ties", None, 0.0), "density 0.0"),
        (([one([1.0])], [1.0], "dare", None, 1.5), "density 1.5"),
        (([one([1.0])], [1.0], "dare_ties", None, float("nan")), "density nan"),
        (([one([1.0])], [1.0], "svd", None, 0.5), "svd with density 0.5"),
        (([one([1.0])], [1.0], "cat", 3), "cat with rank 3"),
        (([one([1.0])], [1.0], "svd", 0), "svd with rank 0"),
        (([one([1.0])], [1.0], "linear", 3), "linear with rank 3"),
        (([one([1.0]), one([1.0, 2.0])], [1.0, 1.0]), "m is (1, 1) and (1, 2)"),
        (([{"m": Factors(torch.ones(3, 2), torch.ones(4, 2))}], [1.0]), "m: A (3, 2) and B (4, 2) are no factors"),
        (
            ([one([1.0, 0.0]), {"m": Factors(torch.ones(1, 2), torch.ones(1, 1))}], [1, 1], "linear"),
            "ranks of m differ",
        ),
    ],
)
def test_mistakes_are_named(arguments, said):
    with pytest.raises(RecipeError) as caught:
        combine(*copy.deepcopy(arguments))
    assert said in str(caught.value)
