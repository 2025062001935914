"""LoRA against equation 3 written out, and against PEFT: logits and gradients on the same weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import peft
from trivium.errors import ModelError, RecipeError
from trivium.peft import LoRASettings
from trivium.peft.base import attach, deltas, merge, rates
from trivium.peft.lora import LoRA
from trivium.peft.peft_lora import tensors


def twin(model, settings: LoRASettings, targets: list[str]):
    """The same LoRA by PEFT, on a copy of the base, with the same weights."""
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.effective_alpha,
        use_rslora=settings.rslora,
        target_modules=targets,
        use_dora=settings.dora,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
    )
    return peft.get_peft_model(copy.deepcopy(model), config)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "settings", [LoRASettings(r=4), LoRASettings(r=4, alpha=3, rslora=True), LoRASettings(r=4, dora=True)]
)
def test_logits_and_gradients_are_pefts(tiny, tokens, train, kind, settings):
    model = tiny(kind)
    names = attach(copy.deepcopy(model), settings, seed=0).targets
    theirs = twin(model, settings, names)
    attach(model, settings, seed=0)
    train(model)
    weights = {
        name.replace(".weight", ".default.weight").replace("_vector", "_vector.default.weight"): tensor
        for name, tensor in tensors(deltas(model)).items()
    }
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    model.zero_grad()

    mine, their = model(tokens, labels=tokens), theirs.eval()(tokens, labels=tokens)
    torch.testing.assert_close(mine.logits, their.logits, rtol=1e-4, atol=1e-5)
    mine.loss.backward()
    their.loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == (3 if settings.dora else 2) * len(names)
    for target, delta in deltas(model).items():
        for name, parameter in delta.named_parameters():
            other = gradients[f"base_model.model.{target}.{name}.default.weight"]
            torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_equation_3_by_hand(rslora):
    target = torch.nn.Linear(2, 2, bias=False)
    lora = LoRA(target, 1, 6, LoRASettings(r=1, rslora=rslora))
    lora.lora_A.data = torch.tensor([[1.0, 2.0]])
    lora.lora_B.data = torch.tensor([[1.0], [-1.0]])
    output = torch.tensor([[10.0, 20.0]])
    # A x = 1*3 + 2*4 = 11;  B A x = (11, -11);  times 6
    assert lora(target, torch.tensor([[3.0, 4.0]]), output).tolist() == [[76.0, -46.0]]


def test_scales():
    target = torch.nn.Linear(8, 8)
    assert LoRA(target, 4, 8, LoRASettings()).scale == 2
    assert LoRA(target, 4, 8, LoRASettings(rslora=True)).scale == 4
    assert LoRASettings(r=5).effective_alpha == 10


def test_start_is_kaiming_uniform():
    target = torch.nn.Linear(300, 8)
    lora = LoRA(target, 64, 1, LoRASettings())
    lora.reset(target, torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(300)  # kaiming_uniform with a = sqrt(5): sqrt(6 / (6 * in))
    assert 0.98 * bound < lora.lora_A.abs().max() <= bound
    assert not lora.lora_B.any()


def test_dropout_is_on_the_input_and_keeps_the_mean():
    target = torch.nn.Linear(1, 1, bias=False)
    lora = LoRA(target, 1, 1, LoRASettings(dropout=0.75))
    lora.lora_A.data, lora.lora_B.data = torch.ones(1, 1), torch.ones(1, 1)
    lora.dropping = True
    torch.manual_seed(0)
    out = lora(target, torch.ones(4000, 1), torch.zeros(4000, 1))
    assert set(out.flatten().tolist()) == {0.0, 4.0}
    assert abs(out.mean().item() - 1) < 0.1


def test_merging_a_bfloat16_base_rounds_once(tiny, train):
    model = tiny("llama")
    attach(model, LoRASettings(r=4), seed=0)
    train(model)
    model.model.to(torch.bfloat16)
    target = model.model.layers[0].mlp.up_proj
    delta = deltas(model)["model.layers.0.mlp.up_proj"].float()
    exact = target.weight.double() + delta.scale * delta.lora_B.double() @ delta.lora_A.double()
    merge(model)
    assert target.weight.dtype == torch.bfloat16
    assert ((target.weight.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_a_quantised_target_is_not_merged(tiny):
    model = tiny("llama")
    attach(model, LoRASettings(r=4, target_modules=("up_proj", "down_proj")), seed=0)
    weights = model.model.layers[0].mlp.up_proj.weight.clone()
    packed = torch.zeros(96, 32, dtype=torch.uint8)
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        merge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weights)  # all or nothing
    assert len(deltas(model)) == 4


def test_a_shared_weight_is_not_merged(tiny):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    attach(model, LoRASettings(r=4), seed=0)
    with pytest.raises(ModelError, match=r"up_proj.weight is shared"):
        merge(model)


def test_ranks_and_alphas_by_pattern(tiny):
    patterns = {"rank_pattern": {"layers.1.*": 3, "q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    model = tiny("llama")
    attach(model, LoRASettings(r=8, target_modules=("q_proj", "v_proj"), **patterns), seed=0)
    found = {name.removeprefix("model.layers."): (d.r, d.alpha) for name, d in deltas(model).items()}
    # the first pattern that fits counts; an alpha left out follows the module's own rank
    assert found == {
        "0.self_attn.q_proj": (2, 4), "0.self_attn.v_proj": (8, 5), "1.self_attn.q_proj": (3, 6),
        "1.self_attn.v_proj": (3, 5),
    }  # fmt: skip
    for key in patterns:
        with pytest.raises(RecipeError, match=f"{key} 'k_proj' matches none of the target_modules"):
            attach(tiny("llama"), LoRASettings(target_modules=("q_proj",), **{key: {"k_proj": 4}}), seed=0)


def test_loraplus_gives_b_its_own_rate(tiny):
    model = tiny("llama")
    attach(model, LoRASettings(r=2, target_modules=("q_proj",), loraplus_lr_ratio=16.0), seed=0)
    named = dict(model.named_parameters())
    assert {name.rpartition(".")[2]: factor for name, factor in rates(model).items()} == {"lora_B": 16.0}
    assert rates(model).keys() <= named.keys()
