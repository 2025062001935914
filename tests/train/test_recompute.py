"""Recomputed layers: the same numbers, one layer's activations instead of all, counted and not believed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from trivium.model.new import new_model
from trivium.peft.targets import decoder_layers
from trivium.train.recompute import SHARE, recomputed, saved_bytes, too_much


@pytest.fixture(params=["llama", "gpt2", "gemma3_text"])
def model(request) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    if request.param != "gpt2":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "pad_token_id": 0}
    return new_model(AutoConfig.for_model(request.param, **sizes), seed=0).eval()


TOKENS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


class Count:
    """Forwards of each layer, counted inside the layer: a child's hook runs whenever the layer really computes."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.runs = [0] * len(layers)
        for number, layer in enumerate(layers):
            first = next(m for m in layer.modules() if m is not layer and not list(m.children()))
            first.register_forward_hook(lambda *_, n=number: self.runs.__setitem__(n, self.runs[n] + 1))


def gradients(model: nn.Module) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters()]


def test_layers_run_twice_and_give_the_same(model):
    layers = list(decoder_layers(model).values())
    count = Count(layers)
    plain = gradients(model)
    assert count.runs == [1, 1, 1]
    with recomputed([]):
        gradients(model)
    assert count.runs == [2, 2, 2]
    with recomputed(layers):
        loss, found = gradients(model)
        assert count.runs == [4, 4, 4], "once forward, once more in the backward pass, in evaluation mode too"
        with torch.no_grad():
            model(TOKENS)
        assert count.runs == [5, 5, 5]
    gradients(model)
    assert count.runs == [6, 6, 6], "afterwards all is as it was"
    assert loss == plain[0]
    assert all(torch.equal(f, p) for f, p in zip(found, plain[1], strict=True))


def test_forward_is_restored_after_an_error(model):
    layers = list(decoder_layers(model).values())
    with pytest.raises(ValueError, match="x"), recomputed(layers):
        raise ValueError("x")
    assert all("forward" not in vars(layer) for layer in layers)


def test_it_saves_memory(model):
    layers = list(decoder_layers(model).values())

    def run() -> torch.Tensor:
        return model.base_model(TOKENS, use_cache=False).last_hidden_state

    plain = saved_bytes(run, model.parameters())
    with recomputed(layers):
        less = saved_bytes(run, model.parameters())
    assert less < plain / 3
    assert less >= 3 * TOKENS.numel() * 32 * 4, "each layer's input is kept"


def test_saved_bytes_counts_each_storage_once_and_no_weight():
    weight = nn.Parameter(torch.randn(10, 10))
    x = torch.randn(7, 10)

    def run() -> torch.Tensor:
        y = x @ weight  # keeps x; the weight is not counted
        return (y * y).sum()  # keeps y, twice the same storage

    assert saved_bytes(run, [weight]) == (7 * 10 + 7 * 10) * 4


def test_when_it_is_too_much():
    assert not too_much(10.0, 50, int(500 / SHARE) + 1)
    assert too_much(10.0, 51, int(500 / SHARE))
