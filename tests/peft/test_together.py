"""Targets and their LoRAs in one operation: the numbers of `hub.py`, and when it is done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trivium.model import fast
from trivium.model.quantized import quantize
from trivium.peft import LoRASettings, together
from trivium.peft.base import attach
from trivium.peft.hub import CHILD
from trivium.peft.settings import settings_of
from trivium.virtual import adapters_of


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        k = self.k_proj(x if other is None else other)
        return self.o_proj(self.q_proj(x)) + torch.cat([k, self.v_proj(x)], -1)


def built(settings=None, name="default") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    attach(model, settings or LoRASettings(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), seed=0)
    for n, p in model.named_parameters():
        if n.endswith("lora_B"):
            nn.init.normal_(p)
    return model


def outcome(model, x, **more):
    leaf = x.clone().requires_grad_()
    out = model[0](leaf, **more)
    grads = torch.autograd.grad(out.square().sum(), [leaf, *(p for p in model[0].parameters() if p.requires_grad)])
    return out.detach(), grads


@pytest.fixture
def counted(monkeypatch):
    """How many targets each call computed."""
    sizes: list[int] = []
    compute = together.compute

    def counting(x, deltas):
        sizes.append(len(deltas))
        return compute(x, deltas)

    monkeypatch.setattr(together, "compute", counting)
    return sizes


def same(model, x, **more) -> bool:
    """With that way and without."""
    use = adapters_of(model)
    use.together(model, True)
    found = outcome(model, x, **more)
    use.together(model, False)
    expected = outcome(model, x, **more)
    assert not any("forward" in vars(m) for m in model.modules())
    return all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
    )


def test_siblings_are_one_call(counted):
    assert same(built(), torch.randn(1, 5, 8))
    assert sorted(counted) == [1, 3], "q, k and v together, and what is behind them"


def test_the_same_of_quantised_targets(counted):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(Attention())
    quantize(model, ["0.q_proj", "0.o_proj"], "int8")
    attach(model, LoRASettings(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), seed=0)
    for n, p in model.named_parameters():
        if n.endswith("lora_B"):
            nn.init.normal_(p)
    assert same(model, torch.randn(1, 5, 8))
    assert sorted(counted) == [1, 3]


def test_one_with_another_input_computes_itself(counted):
    assert same(built(), torch.randn(1, 5, 8), other=torch.randn(1, 5, 8))
    assert sorted(counted) == [1, 1, 1, 3], "once all for nothing, then each for itself"
    counted.clear()
    assert same(built(), torch.randn(1, 5, 8)), "another model begins anew"


def test_what_nobody_asks_for_is_let_go():
    model = built()
    use = adapters_of(model)
    use.together(model, True)
    model[0].q_proj(torch.randn(1, 5, 8))
    group = use.groups.groups[0]
    assert len(group.waiting) == 2
    use.together(model, False)
    assert group.waiting == {}
    assert group.input is None


def test_ranks_of_their_own_and_biases(counted):
    settings = LoRASettings(r=2, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={"k_proj": 3})
    assert same(built(settings), torch.randn(2, 3, 8))
    assert counted == [3]


@pytest.mark.parametrize("method", ["dora", "pissa", "vera"])
def test_other_methods_go_their_own_way(method, counted):
    settings = settings_of({"name": method, "r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"]})
    assert same(built(settings), torch.randn(1, 5, 8))
    assert counted == []


def test_dropout_two_adapters_or_none_go_the_usual_way(counted):
    model = built()
    use = adapters_of(model)
    use.together(model, True)
    x = torch.randn(1, 5, 8)
    with use.only(None):
        model[0](x)
    for module in model.modules():
        if hasattr(module, CHILD):
            delta = getattr(module, CHILD)["default"]
            delta.dropout, delta.dropping = 0.5, True
    model[0](x)
    assert counted == []
    with fast.without("linear"):
        model[0](x)
    assert counted == []


def test_a_sibling_that_has_no_lora_is_not_waited_for(counted):
    settings = LoRASettings(r=2, target_modules=["q_proj", "v_proj"])
    assert same(built(settings), torch.randn(1, 5, 8))
    assert counted == [2]


def test_a_base_that_is_trained_as_well_keeps_its_gradients(counted):
    model = built()
    model[0].k_proj.weight.requires_grad_(True)
    assert same(model, torch.randn(1, 5, 8))
    assert 3 not in counted
