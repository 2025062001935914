"""Exact numbers of trained parameters, on shapes without weights; the figures are the papers'."""

from __future__ import annotations

import pytest
import torch

from trivium.peft import BottleneckSettings, LoRASettings
from trivium.peft.base import attach, deltas
from trivium.peft.settings import settings_of

GPT3 = {
    "hidden_size": 12288,
    "ffn_dim": 4 * 12288,
    "word_embed_proj_dim": 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "vocab_size": 50257,
}
GPT2 = {"medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "large": {"n_embd": 1280, "n_layer": 36, "n_head": 20}}


@pytest.mark.parametrize(("r", "count"), [(1, 4_718_592), (8, 37_748_736)])
def test_lora_on_gpt3(on_meta, r, count):
    attached = attach(on_meta("opt", **GPT3), LoRASettings(r=r, target_modules=("q_proj", "v_proj")), seed=0)
    assert attached.trained_parameters == count
    assert len(attached.targets) == 2 * 96


@pytest.mark.parametrize(("r", "count"), [(1, 7_078_080), (8, 40_109_568)])
def test_houlsby_on_gpt3(on_meta, r, count):
    attached = attach(on_meta("opt", **GPT3), BottleneckSettings(r=r), seed=0)
    assert attached.trained_parameters == count == 96 * 2 * (2 * 12288 * r + r + 12288)
    assert attached.targets[:2] == ["model.decoder.layers.0.self_attn", "model.decoder.layers.0.fc2"]


@pytest.mark.parametrize(
    ("size", "r", "count"),
    [("medium", 6, 368_784), ("medium", 224, 11_089_152), ("large", 8, 875_808), ("large", 248, 23_002_848)],
)
def test_one_bottleneck_and_its_norm_per_layer_of_gpt2(on_meta, size, r, count):
    settings = BottleneckSettings(r=r, placement="pfeiffer", layer_norms=True)
    attached = attach(on_meta("gpt2", **GPT2[size]), settings, seed=0)
    assert attached.trained_parameters == count
    assert attached.targets[:2] == ["transformer.h.0.ln_2", "transformer.h.0.mlp"]


@pytest.mark.parametrize(("size", "count"), [("medium", 393_216), ("large", 737_280)])
def test_lora_on_gpt2_query_and_value(on_meta, size, count):
    # GPT-2 keeps query, key and value in one matrix, so the papers' figure is two square LoRAs per layer.
    d, layers = GPT2[size]["n_embd"], GPT2[size]["n_layer"]
    shape = {"hidden_size": d, "ffn_dim": 4 * d, "word_embed_proj_dim": d}
    model = on_meta("opt", **shape, num_hidden_layers=layers, num_attention_heads=16)
    settings = LoRASettings(r=4, target_modules=("q_proj", "v_proj"))
    assert attach(model, settings, seed=0).trained_parameters == count


def test_lora_on_qwen_3b(on_meta):
    model = on_meta(
        "qwen2",
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    attached = attach(model, LoRASettings(r=16, target_modules=("q_proj", "v_proj")), seed=0)
    assert attached.trained_parameters == 3_686_400
    assert attached.total_parameters == 3_089_625_088
    assert all(p.is_meta and p.dtype == torch.float32 for d in deltas(model).values() for p in d.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "opt"])
def test_formulas(tiny, kind):
    lora = tiny(kind)
    attached = attach(lora, LoRASettings(r=3), seed=0)
    shapes = [sum(d.lora_A.shape[1:] + d.lora_B.shape[:1]) for d in deltas(lora).values()]
    assert attached.trained_parameters == 3 * sum(shapes)
    for placement, per_layer in (("houlsby", 2), ("pfeiffer", 1)):
        settings = BottleneckSettings(r=5, placement=placement)
        adapters = attach(tiny(kind), settings, seed=0)
        assert adapters.trained_parameters == 2 * per_layer * (2 * 64 * 5 + 5 + 64)
        assert len(adapters.targets) == 2 * per_layer


def test_the_top_two_blocks_of_gpt2_medium(on_meta):
    attached = attach(on_meta("gpt2", **GPT2["medium"]), settings_of("top_layers"), seed=0)
    assert attached.trained_parameters == 25_192_448
    assert {name.split(".")[2] for name in attached.targets} == {"22", "23"}


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ({"name": "pfeiffer", "reduction_factor": 16}, 894_528),  # AdapterHub's published counts, 12 layers of 768
        ({"name": "houlsby", "reduction_factor": 16}, 1_789_056),
        ({"name": "houlsby", "reduction_factor": 16, "skip_layers": 5}, 1_789_056 * 7 // 12),
        ({"name": "parallel", "reduction_factor": 2}, 12 * (2 * 768 * 384 + 384 + 768)),
        ({"name": "compacter", "reduction_factor": 32}, 24 * (2 * (768 + 24) + 24 + 768) + 4**3),
        ({"name": "ia3"}, 12 * (3 * 768 + 4 * 768)),  # keys, values and queries are one matrix here
        ({"name": "vera", "r": 256}, 12 * (4 * 256 + (3 + 1 + 4 + 1) * 768)),
        ({"name": "prompt"}, 20 * 768),
        ({"name": "prefix"}, 20 * 2 * 12 * 768),
        ({"name": "bitfit"}, 12 * (3 + 1 + 4 + 1 + 2) * 768),
        ({"name": "layer_norms"}, (2 * 12 + 1) * 2 * 768),
        ({"name": "dora", "r": 8}, 12 * (8 * (4 + 2 + 5 + 5) * 768 + (3 + 1 + 4 + 1) * 768)),
        ({"name": "pissa", "r": 8}, 12 * 8 * (4 + 2 + 5 + 5) * 768),
    ],
)
def test_every_method_on_gpt2(on_meta, method, count):
    assert attach(on_meta("gpt2"), settings_of(method), seed=0).trained_parameters == count
