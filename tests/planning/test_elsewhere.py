"""A device that is not here: from sizes alone, in operations that are counted another way here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from trivium.forest import Example, TokenSequence, lay_out
from trivium.model import readout
from trivium.model.load import wrap
from trivium.planning.elsewhere import flop


def model():
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=160, num_hidden_layers=3,
                                  num_attention_heads=4, num_key_value_heads=4, vocab_size=300)  # fmt: skip
    return wrap(AutoModelForCausalLM.from_config(config).eval(), None, "float32", torch.float32)


@pytest.mark.parametrize("full", [True, False])
def test_the_operations_are_those_that_pytorch_counts(full, monkeypatch):
    monkeypatch.setattr(readout, "CHUNK_BYTES", 1)  # several chunks, as of a large vocabulary
    mine, tokens = model(), 48
    mine.hf.requires_grad_(full)
    if not full:  # what LoRA does: the gradient of every layer's input is needed, and of no weight
        mine.hf.get_input_embeddings().weight.requires_grad_(True)
    row = TokenSequence(np.arange(tokens + 1) % 300, np.ones(tokens + 1, np.float32))
    with mine.laid_out("single"), FlopCounterMode(display=False) as counted:
        mine.logprob(lay_out([Example((row,), "x:1")])).sum().backward()
    expected = flop(mine, full, trained=1.0, seen=tokens / 2, again=0.0, reference=False) * tokens
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.12)  # attention without a mask counts all pairs


def test_recomputing_and_a_reference_are_forward_passes():
    mine = model()
    plain = flop(mine, False, 0.0, 100.0, 0.0, False)
    again = flop(mine, False, 0.0, 100.0, 1.0, False)
    assert flop(mine, False, 0.0, 100.0, 0.0, True) == again
    assert again / plain == pytest.approx(4 / 3, rel=0.1)


def test_eight_billion_weights_in_full_with_lora_and_in_four_bits():
    """Llama 3 8B: what its makers and users say it takes; nothing of it is loaded."""
    from trivium.planning.elsewhere import cost_elsewhere
    from trivium.planning.memory import lora_parameters, ways
    from trivium.recipe import Stage

    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                  num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)  # fmt: skip
    with torch.device("meta"):
        big = wrap(AutoModelForCausalLM.from_config(config), None, "bfloat16", torch.bfloat16)
    whole = sum(p.numel() for p in big.hf.parameters())
    stage = Stage(name="x", stage="sft", data="x", method="full", optimizer="adamw", micro_batch_tokens=2048)
    cost = cost_elsewhere(stage, big, whole, whole, 4096)
    assert cost.weights + cost.gradients + cost.moments == 16 * whole  # 128 GB
    found = ways(stage, big.hf, cost, 24e9, longest=512, frozen=2)
    assert [way.change for way in found] == ["method: lora", "method: qlora"]
    assert found[0].bytes > 2 * whole + 16 * lora_parameters(big.hf)
    assert [way.change for way in ways(stage, big.hf, cost, 12e9, longest=512, frozen=2)] == ["method: qlora"]
    assert ways(stage, big.hf, cost, 6e9, longest=512, frozen=2) == []
