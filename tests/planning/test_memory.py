"""What a stage holds by parts, and what would make it fit."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from trivium.planning.memory import NF4, lora_parameters, parts, ways
from trivium.recipe import Stage
from trivium.train.budget import Cost, in_bytes

GB = 1e9
LORA = {"name": "lora", "r": 16, "alpha": 32}


def stage(**more):
    values = {"name": "chat", "stage": "sft", "data": "x.jsonl", "micro_batch_tokens": 1024, "optimizer": "adamw"}
    return Stage(**{**values, **more})


@pytest.fixture(scope="module")
def hf():
    import torch

    config = AutoConfig.for_model("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                                  num_attention_heads=8, vocab_size=1000)  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def cost(hf, full: bool) -> Cost:
    weights = 4 * sum(p.numel() for p in hf.parameters())
    trained = weights if full else 4 * lora_parameters(hf)
    return Cost(
        weights, trained, 2 * trained, readout=1e8, runtime=4e8, kept=900_000, input=2048, working=50_000, layers=4
    )


def test_lora_counts_what_peft_would(hf):
    layer = 4 * 16 * (512 + 512) + 3 * 16 * (512 + 1024)  # q, k, v, o; gate, up, down
    assert lora_parameters(hf) == 4 * layer


def test_parts_add_up_to_the_peak_and_to_what_was_measured(hf):
    held = cost(hf, full=True)
    assert sum(parts(held, 1024, 0).values()) == pytest.approx(held.peak(1024, 0))
    told = parts(held, 1024, 0, measured=3 * GB)
    assert sum(told.values()) == pytest.approx(3 * GB)
    assert told["weights"] == held.weights
    assert parts(held, 1024, 0, measured=1e6)["other"] == 0


def test_the_cheapest_way_comes_first_and_each_fits(hf):
    held = cost(hf, full=True)
    there = held.peak(1024, 0) - 0.3 * GB
    found = ways(stage(method="full"), hf, held, there, longest=300, frozen=4)
    assert [way.change.split(":")[0] for way in found] == ["memory", "method", "method"]
    assert all(way.bytes <= there for way in found)
    assert in_bytes(found[0].change.split(": ")[1]) <= there
    assert "tokens a pass" in found[0].price
    assert "slower" in found[0].price
    assert found[1].change == "method: lora"
    assert f"{lora_parameters(hf):,} weights" in found[1].price


def test_a_smaller_method_where_no_arrangement_helps(hf):
    held = cost(hf, full=True)
    there = held.weights + held.moments / 2 + 6e8
    assert [w.change for w in ways(stage(method="full"), hf, held, there, longest=64, frozen=4)] == [
        "method: lora",
        "method: qlora",
    ]
    small = cost(hf, full=False)
    linear = sum(m.weight.numel() for n, m in hf.named_modules() if hasattr(m, "weight") and "proj" in n)
    packed = small.weights - linear * (4 - NF4)
    there = packed + small.gradients + small.moments + 5e8 + small.activations(64, 4) + 1e6
    (way,) = ways(stage(method=LORA), hf, small, there, longest=64, frozen=4)
    assert way.change == "method: qlora"
    assert ways(stage(method={"name": "qlora"}), hf, small, 1e8, longest=64, frozen=4) == []
