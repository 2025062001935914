"""A new model from a few sizes: what is derived fits together, what contradicts itself is said at once."""

from __future__ import annotations

import pytest
import torch

from trivium.errors import RecipeError
from trivium.model.new import new_config, new_model


class Tokens:
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return 77


def sizes(architecture: str, **more: object) -> dict:
    return {"architecture": architecture, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **more}


LATENT = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "minicpm3"]
KINDS = ["llama", "gpt2", "gpt_neox", "phi3", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "qwen2", "stablelm"]


@pytest.mark.parametrize("width", [48, 64, 72])
@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
def test_few_sizes_make_a_model_that_runs(architecture, width):
    config = new_config(sizes(architecture, hidden_size=width), Tokens())
    model = new_model(config, seed=0)
    assert model.get_input_embeddings().weight.shape == (77, width)
    logits = model(torch.arange(9)[None]).logits
    assert logits.shape == (1, 9, 77)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("architecture", [*KINDS, *LATENT])
def test_families_run_with_what_is_derived(architecture):
    config = new_config(sizes(architecture), Tokens())
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    model = new_model(config, seed=0)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000, "a library's defaults for a 7B model slipped in"
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_head_width_of_ones_own():
    config = new_config(sizes("deepseek_v3", head_dim=24, qk_rope_head_dim=16), Tokens())
    assert (config.qk_nope_head_dim, config.v_head_dim, config.qk_rope_head_dim) == (24, 24, 16)
    with torch.no_grad():
        new_model(config, seed=0)(torch.arange(5)[None])
    assert new_config(sizes("llama", head_dim=24), Tokens()).head_dim == 24


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_one_alone():
    config = new_config(sizes("llama"), Tokens())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other, third = (new_model(config, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert any(not torch.equal(one[n], third[n]) for n in one)
    assert all(w.dtype == torch.float32 for w in one.values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (sizes("lama"), "did you mean 'llama'"),
        (sizes("llama", hidden_sise=8), "did you mean 'hidden_size'"),
        (sizes("llama", hidden_size=62), "cannot be split"),
        (sizes("llama", num_key_value_heads=3), "does not divide"),
        (sizes("llama", intermediate_size=-1), "is negative"),
        ({"architecture": "llama", "num_hidden_layers": 2}, "hidden_size is missing"),
        ({"architecture": "llama", "hidden_size": 64}, "num_hidden_layers is missing"),
    ],
)
def test_contradictions_are_named(given, says):
    with pytest.raises(RecipeError, match="model\\.") as caught:
        new_config(given, Tokens())
    assert says in str(caught.value)


@pytest.mark.parametrize("given", [sizes("llama", num_attention_heads=0), sizes("llama", hidden_size=0)])
def test_a_size_of_nothing_is_named(given):
    with pytest.raises(RecipeError, match="0 leaves no model"):
        new_config(given, Tokens())
