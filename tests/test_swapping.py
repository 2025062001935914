"""Other weights for the length of a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trivium.swapping import under


def test_within_the_block_others_and_then_its_own_again_also_after_an_error():
    model = nn.Linear(3, 2)
    weights = dict(model.named_parameters())
    others = {name: weight.detach().double() + 1 for name, weight in weights.items()}
    own, storage = {n: w.detach().clone() for n, w in weights.items()}, model.weight.data_ptr()

    def fails() -> None:
        with under(weights, others):
            assert model.weight.dtype == torch.float32
            assert torch.equal(model.weight.detach(), own["weight"] + 1)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert model.weight is weights["weight"]
    assert model.weight.data_ptr() == storage
    assert all(torch.equal(weights[n].detach(), own[n]) for n in own)
    with pytest.raises(KeyError), under(weights, {"weight": others["weight"]}):
        pass
    assert torch.equal(model.weight.detach(), own["weight"])
