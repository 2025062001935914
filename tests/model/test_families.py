"""Every family that the design names: packed, prefix-shared batches against plain `transformers` on separate rows.

The other side of each comparison is a second model with the same weights, in eager attention, that trivium never
touched: one row after the other, whole logits, ``log_softmax``. Rows are longer than every sliding window. Norms and
biases are moved off their neutral start, so that one left out or applied twice shows.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from trivium.errors import ModelError
from trivium.forest import Example, Forest, TokenSequence, lay_out
from trivium.model import proof as proof_module
from trivium.model.language_model import LanguageModel
from trivium.model.load import wrap
from trivium.model.new import new_config, new_model
from trivium.model.proof import prove
from trivium.peft import BottleneckSettings, FullSettings, LoRASettings
from trivium.peft.base import attach, load_state, state

VOCABULARY = 96
WINDOW = 12
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MIXED = {**GROUPED, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": {**MIXED, "use_sliding_window": True},
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "gemma2": {**MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": MIXED,
    "gemma4_text": {**MIXED, "hidden_size_per_layer_input": 8},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "olmo3": MIXED,
    "granite": {**GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "smollm3": {**GROUPED, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "gpt2": SIZES,
    "gpt_neox": SIZES,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, "num_experts": 4},
    "gpt_oss": {**MIXED, "num_local_experts": 4},
    "glm4": GROUPED,
    "deepseek_v3": {**SIZES, "n_routed_experts": 4},
}
ROWS_ONLY: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **GROUPED, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
    },
    "qwen3_5_text": {
        **GROUPED, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "falcon": {**SIZES, "alibi": True},
}  # fmt: skip
OWN_NAMES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "mpt": {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "vocab_size": VOCABULARY},
}
METHODS = {
    "full": FullSettings(),
    "lora": LoRASettings(r=4),
    "bottleneck": BottleneckSettings(r=8),
}


class Tokens:
    """What a config takes from a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return VOCABULARY


def stirred(model: nn.Module) -> nn.Module:
    """Weights wide enough that every part counts, norms and biases off their start, experts' routers included."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model.eval()


def config_of(name: str, tied: bool = False) -> Any:
    if name in OWN_NAMES:
        return AutoConfig.for_model(name, **OWN_NAMES[name], tie_word_embeddings=tied)
    sizes = {**FAMILIES, **ROWS_ONLY}[name]
    return new_config({**sizes, "architecture": name, "tie_word_embeddings": tied}, Tokens())


def pair(config: Any, method: str = "full") -> tuple[LanguageModel, nn.Module]:
    """The model as trivium uses it, and its untouched twin: same weights, same deltas, eager attention."""
    other = copy.deepcopy(config)
    mine = stirred(new_model(config, seed=0))
    # Falcon's two own attentions scale alibi differently: there, the one that it takes by itself
    eager = "sdpa" if config.model_type == "falcon" else "eager"
    twin = AutoModelForCausalLM.from_config(other, attn_implementation=eager).eval()
    twin.load_state_dict(mine.state_dict())
    assert twin.config._attn_implementation == eager
    settings = METHODS[method]
    if method == "bottleneck" and config.model_type == "lfm2":
        settings = BottleneckSettings(r=8, placement="pfeiffer")  # its convolutions are no attention to adapt
    for model in (mine, twin):
        attach(model, settings, seed=3)
    if method != "full":
        generator = torch.Generator().manual_seed(8)
        small = {n: 0.2 * torch.randn(w.shape, generator=generator) for n, w in state(mine).items()}
        for model in (mine, twin):
            load_state(model, small)
    return wrap(mine, Tokens(), "float32", torch.float32), twin


def sequence(tokens: np.ndarray, first: int) -> TokenSequence:
    weights = np.where(np.arange(len(tokens)) < first, 0.0, 0.5 + (np.arange(len(tokens)) % 3) / 2)
    return TokenSequence(tokens, weights.astype(np.float32))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Two pairs behind their prompts, two rows that share a beginning, a long row and a short one."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, n)

    found = []
    for prompt, answers in ((draw(20), (9, 17)), (draw(33), (14, 4))):
        found.append(Example(tuple(sequence(np.r_[prompt, draw(n)], len(prompt)) for n in answers)))
    system = draw(25)
    found += [Example((sequence(np.r_[system, draw(n)], 1),)) for n in (6, 21)]
    return [*found, Example((sequence(draw(61), 1),)), Example((sequence(draw(5), 2),))]


def plainly(twin: nn.Module, examples: list[Example]) -> Tensor:
    """Log-probabilities of all trained tokens, by `transformers` alone, row by row."""
    found = []
    for one in (s for e in examples for s in e.sequences):
        row = torch.from_numpy(one.tokens)
        logprob = twin(input_ids=row[None], use_cache=False).logits[0].double().log_softmax(-1)
        trained = torch.from_numpy(np.flatnonzero(one.weights[1:]))
        found.append(logprob[trained, row[trained + 1]])
    return torch.cat(found)


def gradients(model: nn.Module, logprob: Tensor) -> dict[str, Tensor]:
    """Of a mixture of the entries with signs of both kinds, for every trained weight."""
    model.zero_grad(set_to_none=True)
    (torch.sin(1.0 + torch.arange(len(logprob))) * logprob).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(mine: LanguageModel, twin: nn.Module, forest: Forest, examples: list[Example], layout: str) -> None:
    with mine.laid_out(layout):
        found = mine.logprob(forest)
        found_gradients = gradients(mine.hf, found)
    expected = plainly(twin, examples)
    expected_gradients = gradients(twin, expected)
    assert expected.detach().std() > 0.2, "the rows must differ for the comparison to mean anything"
    assert float((found - expected).detach().abs().max()) < 1e-4
    assert found_gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        apart = float((found_gradients[name] - gradient).abs().max())
        assert apart <= 1e-4 * float(gradient.abs().max()) + 1e-6 * largest, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_training_packed_and_shared(name, tied, examples):
    mine, twin = pair(config_of(name, tied))
    tied_for_real = mine.hf.get_output_embeddings().weight is mine.hf.get_input_embeddings().weight
    assert tied_for_real == tied
    shared, packed = lay_out(examples), lay_out(examples, share=False)
    assert len(shared.tokens) < 0.75 * len(packed.tokens)
    assert_equal(mine, twin, shared, examples, "forest")
    if not tied:
        with torch.no_grad(), mine.laid_out("forest"):
            assert float((mine.logprob(packed) - mine.logprob(shared)).abs().max()) < 1e-4
    assert all(p.grad is not None for n, p in mine.hf.named_parameters() if p.dim() == 1 and "norm" in n)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
@pytest.mark.parametrize("name", FAMILIES)
def test_small_weights_packed_and_shared(name, method, examples):
    mine, twin = pair(config_of(name), method)
    assert_equal(mine, twin, lay_out(examples), examples, "forest")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_proof_picks_the_forest(name, examples):
    mine, _ = pair(config_of(name))
    before = mine.hf.config._attn_implementation
    found = prove(mine, examples)
    assert (found.layout, found.refused) == ("forest", ())
    assert found.logprob_difference < 1e-4
    assert 0 < found.gradient_difference < 1e-4
    assert found.line().startswith("proof: packed and prefix-shared = separate on ")
    assert mine.hf.config._attn_implementation == before, "the proof leaves the model as it was"


@pytest.mark.parametrize("layout", ["rows", "single"])
def test_the_other_layouts_give_the_same(layout, examples):
    for name in ("llama", "gemma3_text", "mixtral"):
        mine, twin = pair(config_of(name))
        assert_equal(mine, twin, lay_out(examples), examples, layout)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*ROWS_ONLY, *OWN_NAMES])
def test_where_the_forest_is_wrong_the_proof_falls_back(name, method, examples):
    mine, twin = pair(config_of(name, tied=name in OWN_NAMES), method)
    found = prove(mine, examples)
    assert found.layout in ("rows", "single")
    assert f"falling back to {'separate padded' if found.layout == 'rows' else 'single'} rows" in found.line()
    assert "not forest: " in found.line()
    assert_equal(mine, twin, lay_out(examples), examples, found.layout)


# --- rotary factors that switch with the length of the row


def longrope() -> Any:
    half = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
    return AutoConfig.for_model(
        "phi3", **GROUPED, intermediate_size=64, vocab_size=VOCABULARY, pad_token_id=0, tie_word_embeddings=False,
        max_position_embeddings=256, original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * half,
            "long_factor": [4.0 + n for n in range(half)], "original_max_position_embeddings": 32,
        },
    )  # fmt: skip


def test_rotary_factors_that_switch_with_length(examples):
    mine, twin = pair(longrope())
    lengths = [len(s.inputs) for e in examples for s in e.sequences]
    assert min(lengths) < 32 < max(lengths)
    found = prove(mine, examples)
    assert found.layout == "single"
    assert_equal(mine, twin, lay_out(examples), examples, found.layout)


def test_rows_are_proved_as_training_may_put_them_together():
    """A short row and a long one do not share a padded batch by themselves, but in training each has neighbours."""
    rng = np.random.default_rng(5)
    probe = [Example((sequence(rng.integers(3, VOCABULARY, n), 1),)) for n in (9, 90)]
    mine, twin = pair(longrope())
    layout = prove(mine, probe).layout
    others = [Example((sequence(rng.integers(3, VOCABULARY, n), 1),)) for n in (25, 31, 34, 40)]
    assert_equal(mine, twin, lay_out(others), others, layout)


# --- what cannot be proved is refused


class Louder(LlamaForCausalLM):
    """Changes its logits in a way that no config declares."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out


def test_logits_that_trivium_cannot_know_are_refused(examples):
    mine = wrap(stirred(Louder(config_of("llama"))), Tokens(), "float32", torch.float32)
    with pytest.raises(ModelError, match="differ from the model's own logits") as caught:
        prove(mine, examples)
    assert all(f"{layout}: log-probabilities differ" in str(caught.value) for layout in ("forest", "rows", "single"))


class Elsewhere(LlamaForCausalLM):
    """Right logits with wrong gradients: those of a scaled final norm."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 3 * out.logits - 2 * out.logits.detach()
        return out


def test_gradients_are_part_of_the_proof(examples):
    mine = wrap(stirred(Elsewhere(config_of("llama"))), Tokens(), "float32", torch.float32)
    with pytest.raises(ModelError, match="gradients by"):
        prove(mine, examples)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_proves_nothing(bad):
    expected = {"a": torch.ones(3), "b": torch.ones(3)}
    for name in expected:
        broken = {**expected, name: torch.tensor([0.0, bad, 1.0])}
        assert not proof_module._gradients_apart(broken, expected) < 1
    assert proof_module._gradients_apart(expected, {"a": torch.ones(3)}) == float("inf")


def test_a_leak_between_rows_is_caught(examples, monkeypatch):
    """The forest rule broken on purpose: every document on the line sees the ones before it."""
    from trivium.model import attention

    mine, _ = pair(config_of("llama"))

    def leaking(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    monkeypatch.setattr(attention, "segment_attention", leaking)
    monkeypatch.setattr(attention.segments, "attend", leaking)
    found = prove(mine, examples)
    assert found.layout == "rows"
    assert "not forest: log-probabilities differ" in found.line()


def test_a_window_shorter_than_the_longest_row_is_not_missed(examples, monkeypatch):
    """A short probe would pass: the longest row shows that the window was left out."""
    from trivium.model import attention

    mine, _ = pair(config_of("mistral"))
    whole = attention.segment_attention
    monkeypatch.setattr(
        attention,
        "segment_attention",
        lambda q, k, v, plan, o: whole(q, k, v, plan, attention.Options(o.dropout, o.scaling, None)),
    )
    short = [Example((s,)) for e in examples for s in e.sequences if len(s.inputs) <= WINDOW]
    assert prove(mine, short).layout == "forest"
    assert prove(mine, examples).layout == "rows"


def test_the_proof_of_long_rows_is_short(examples):
    """Gradients are compared on pieces of long rows, with what their sequences share and something trained in each."""
    prompt, rng = np.arange(900) % VOCABULARY, np.random.default_rng(0)
    answers = [rng.integers(0, VOCABULARY, 500) for _ in range(3)]
    weights = np.r_[np.zeros(900), np.ones(500)].astype(np.float32)
    long = Example(tuple(TokenSequence(np.r_[prompt, a], weights) for a in answers))
    (cut,) = proof_module._short([long])
    assert [len(s.tokens) for s in cut.sequences] == [proof_module.GRADIENT_TOKENS] * 3
    assert all(s.trained_tokens > 100 for s in cut.sequences)
    assert cut.tokens < 3 * proof_module.GRADIENT_TOKENS - 200, "the prompt's end is shared"
    assert proof_module._short(examples)[0].tokens == min(e.tokens for e in examples), "what is short stays whole"
