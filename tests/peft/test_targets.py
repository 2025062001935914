"""Which modules are chosen: all linear ones, by pattern, never the head, never a router; and what is said about it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trivium.errors import ModelError, RecipeError
from trivium.peft import BottleneckSettings, LoRASettings
from trivium.peft.base import attach
from trivium.peft.targets import decoder_layers, find_targets, matches

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def last(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", LLAMA),
        ("qwen3", LLAMA),
        ("gemma3", LLAMA),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_all_linear(tiny, kind, expected):
    model = tiny(kind)
    names = find_targets(model, "all-linear")
    assert last(names) == expected
    layers = decoder_layers(model)
    assert len(layers) == 2
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert names == [n for n in linear if n != "lm_head"]


@pytest.mark.parametrize(
    ("kind", "expected", "told"),
    [
        ("mixtral", ATTENTION, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]),
        ("qwen3_moe", ATTENTION, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]),
        ("gpt_oss", ATTENTION, ["mlp.experts.gate_up_proj", "mlp.router.weight"]),
        ("qwen2_moe", LLAMA, ["mlp.experts.gate_up_proj", "mlp.gate.weight", "mlp.shared_expert_gate.weight"]),
    ],
)
def test_experts_and_routers_stay_frozen_and_are_named(tiny, kind, expected, told, tokens):
    model = tiny(kind)
    attached = attach(model, LoRASettings(r=2), seed=0)
    assert last(attached.targets) == expected
    assert "shared_expert_gate" not in last(attached.targets)
    (note,) = attached.notes
    assert not [name for name in told if name not in note]
    model(tokens, labels=tokens).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is not None and "trivium_delta" not in n]


def test_nothing_is_said_where_nothing_is_left_out(tiny):
    assert attach(tiny("llama"), LoRASettings(r=2), seed=0).notes == []


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "opt"])
def test_bottlenecks_fit_other_blocks_too(tiny, kind, tokens):
    model = tiny(kind)
    before = model(tokens).logits
    attached = attach(model, BottleneckSettings(r=4), seed=0)
    assert len(attached.targets) == 4
    assert torch.equal(model(tokens).logits, before)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if n.endswith((".up", ".up_bias")))


def test_a_linear_router_is_known_by_name_or_by_its_size():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.choose, self.proj = nn.Linear(8, 3), nn.Linear(8, 4), nn.Linear(8, 8)
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.config = type("Config", (), {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 8})()

    names = find_targets(Model(), "all-linear")
    assert names == [f"layers.{i}.{own}" for i in (0, 1) for own in ("proj", "experts.0", "experts.1")]


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (("q_proj", "v_proj"), 4),
        (("model.layers.1.self_attn.q_proj",), 1),
        (("self_attn.q_proj",), 2),
        (("*_proj",), 14),
        (("layers.1.*",), 7),
        (("model.layers.*.mlp.*",), 6),
        (("[qk]_proj", "q_proj"), 4),
    ],
)
def test_patterns(tiny, patterns, count):
    names = find_targets(tiny("llama"), patterns)
    assert len(names) == count == len(set(names))


def test_matches():
    assert matches("a.b.q_proj", "q_proj")
    assert not matches("a.b.xq_proj", "q_proj")
    assert matches("a.b.xq_proj", "*q_proj")
    assert not matches("a.b.q_proj", "b")


def test_a_pattern_that_matches_nothing(tiny):
    with pytest.raises(RecipeError) as caught:
        find_targets(tiny("llama"), ("q_proj", "v_prj"))
    assert "'v_prj'" in caught.value.what
    assert "did you mean 'v_proj'?" in caught.value.what
    assert "down_proj" in caught.value.remedy
    assert "lm_head" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["lm_head", "*", "lm_*"])
def test_the_head_is_never_adapted(tiny, pattern):
    with pytest.raises(RecipeError, match="output head lm_head"):
        find_targets(tiny("llama"), ("q_proj", pattern))


def test_a_mistake_leaves_the_model_as_it_was(tiny, logits):
    model = tiny("llama")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RecipeError):
        attach(model, LoRASettings(target_modules=("nothing",)), seed=0)
    assert [p.requires_grad for p in model.parameters()] == before


def test_bottleneck_targets(tiny):
    def chosen(**values: object) -> list[str]:
        return attach(tiny("llama"), BottleneckSettings(r=4, **values), seed=0).targets

    assert chosen(target_modules=["layers.1.mlp"]) == ["model.layers.1.mlp"]
    assert sorted(chosen(target_modules=["self_attn", "k_proj"])) == [
        f"model.layers.{i}.self_attn{own}" for i in (0, 1) for own in ("", ".k_proj")
    ]
    with pytest.raises(RecipeError, match="all-linear"):
        chosen(target_modules="all-linear")
    with pytest.raises(RecipeError, match="did you mean 'self_attn'"):
        chosen(target_modules=["self_atn"])


def test_norms_of_adapted_layers_only(tiny):
    settings = BottleneckSettings(r=4, target_modules=("layers.1.mlp",), layer_norms=True)
    names = attach(tiny("llama"), settings, seed=0).targets
    own = ("mlp", "input_layernorm", "post_attention_layernorm")
    assert names == [f"model.layers.1.{name}" for name in own]


def test_a_model_without_layers(tiny):
    model = tiny("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="found no list of 7 decoder layers"):
        attach(model, LoRASettings(), seed=0)
    assert len(attach(model, LoRASettings(target_modules=("q_proj",)), seed=0).targets) == 2
