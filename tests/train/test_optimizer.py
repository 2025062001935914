"""AdamW and Muon: which weight goes where, and how large an update is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from trivium.model.new import new_model
from trivium.peft import LoRASettings
from trivium.peft.base import attach, rates
from trivium.peft.targets import decoder_layers
from trivium.train.optimizer import Muon, build_optimizers, orthogonalised, set_rate

SHAPES = [(64, 64), (128, 32), (32, 128), (16, 200)]


def tiny(tied: bool = False) -> nn.Module:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return new_model(config, seed=0)


def built(model: nn.Module, name: str, lr: float = 0.01, weight_decay: float = 0.1) -> list[torch.optim.Optimizer]:
    inside = {id(p) for layer in decoder_layers(model).values() for p in layer.parameters()}
    hidden = {n for n, p in model.named_parameters() if id(p) in inside}
    return build_optimizers(model, hidden, name, lr, weight_decay)


def names(model: nn.Module, group: dict) -> set[str]:
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    """Newton-Schulz with Muon's coefficients does not converge to 1 but stays around it, in 0.7 to 1.2."""
    torch.manual_seed(0)
    batch = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    values = torch.linalg.svdvals(orthogonalised(batch))
    assert values.max() < 1.25
    assert values.median() > 0.65
    assert 0.7 < values.mean() < 1.15
    if shape[0] != shape[1]:  # a square random matrix has singular values near 0, which five steps do not lift
        assert values.min() > 0.6


def test_orthogonalised_keeps_the_singular_vectors():
    torch.manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(24, 12))
    v, _ = torch.linalg.qr(torch.randn(12, 12))
    matrix = u @ torch.diag(torch.linspace(0.5, 3, 12)) @ v.T
    core = u.T @ orthogonalised(matrix[None])[0] @ v
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-4
    assert core.diagonal().min() > 0.6
    assert core.diagonal().max() < 1.25


def test_matrices_of_one_shape_together_are_as_each_alone():
    torch.manual_seed(2)
    batch = torch.randn(4, 20, 12)
    together = orthogonalised(batch)
    for one, alone in zip(together, (orthogonalised(m[None])[0] for m in batch), strict=True):
        assert torch.allclose(one, alone, atol=1e-5)
    assert orthogonalised(torch.zeros(1, 4, 4)).abs().max() == 0, "no gradient, no update, no NaN"


@pytest.mark.parametrize("shape", SHAPES)
def test_muons_update_is_as_large_as_adamws(shape):
    """Root mean square of an update: AdamW's is about 0.2 in training (Liu et al. 2025); Muon is scaled to it."""
    torch.manual_seed(3)
    weight = nn.Parameter(torch.zeros(shape))
    muon = Muon([weight], lr=1.0)
    sizes = []
    for _ in range(5):
        before = weight.detach().clone()
        weight.grad = 1e-3 * torch.randn(shape)
        muon.step()
        sizes.append(float((weight.detach() - before).pow(2).mean().sqrt()))
    assert all(0.14 < s < 0.24 for s in sizes), sizes

    weight = nn.Parameter(torch.zeros(shape))
    adamw = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(60):
        before = weight.detach().clone()
        weight.grad = 1e-3 * torch.randn(shape)
        adamw.step()
    adam = float((weight.detach() - before).pow(2).mean().sqrt())
    assert 0.6 < sizes[-1] / adam < 1.6


def test_muon_by_hand():
    """Nesterov momentum as Jordan's: the first update looks ahead from a momentum of 0.05 of the gradient."""
    weight = nn.Parameter(torch.eye(4) * 2)
    gradients = [torch.diag(torch.tensor([1.0, -2.0, 3.0, 4.0])), torch.diag(torch.tensor([0.5, 1.0, -1.0, 2.0]))]
    muon = Muon([weight], lr=0.1, weight_decay=0.5)
    expected, momentum = torch.eye(4) * 2, torch.zeros(4, 4)
    for gradient in gradients:
        weight.grad = gradient.clone()
        muon.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.05 * gradient + 0.95 * momentum
        update = orthogonalised(ahead[None])[0] * 0.2 * 2
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
        assert torch.allclose(weight, expected, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_inside_the_layers_go_to_muon(tied):
    model = tiny(tied)
    adamw, muon = built(model, "muon")
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, Muon)
    mine = names(model, muon.param_groups[0])
    assert mine == {n for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}
    rest = set().union(*(names(model, g) for g in adamw.param_groups))
    assert mine | rest == {n for n, _ in model.named_parameters()}
    assert not mine & rest
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= rest
    assert ("lm_head.weight" in rest) == (not tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_alone(name, tied):
    model = tiny(tied)
    decayed, plain = set(), set()
    for optimizer in built(model, name, weight_decay=0.1):
        for group in optimizer.param_groups:
            assert group["weight_decay"] in (0.0, 0.1)
            (decayed if group["weight_decay"] else plain).update(names(model, group))
    assert plain == {n for n, p in model.named_parameters() if p.dim() < 2 or "embed_tokens" in n}
    assert decayed | plain == {n for n, _ in model.named_parameters()}
    assert not decayed & plain


def test_frozen_weights_are_left_out():
    model = tiny()
    attach(model, LoRASettings(r=2), seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    (adamw,) = built(model, "adamw")
    assert set().union(*(names(model, g) for g in adamw.param_groups)) == trained


def test_the_rate_is_a_factor_of_each_groups_peak():
    optimizers = built(tiny(), "muon", lr=0.4)
    for value in (0.5, 0.25):  # from the peak each time, not from the last rate
        set_rate(optimizers, value)
        assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.4 * value}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns(name):
    model = tiny().eval()
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizers = built(model, name, lr=0.01)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1


def test_what_wants_another_rate_has_its_own_group():
    """LoRA+: B at 16 times the rate of A, along the whole course, and the same weight decay."""
    model = tiny()
    attach(model, LoRASettings(r=2, loraplus_lr_ratio=16.0), seed=0)
    (optimizer,) = build_optimizers(model, set(), "adamw", 0.01, 0.1, rates(model))
    slow, fast = optimizer.param_groups
    assert {n.rpartition(".")[2] for n in names(model, slow)} == {"lora_A"}
    assert {n.rpartition(".")[2] for n in names(model, fast)} == {"lora_B"}
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    set_rate([optimizer], 0.5)
    assert [slow["lr"], fast["lr"]] == pytest.approx([0.005, 0.08])
