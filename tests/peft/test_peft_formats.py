"""Every method that PEFT has, too: what it writes is read here, what is written here it reads, logits and gradients
are the same on the same weights."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import peft
from trivium.errors import ModelError
from trivium.peft import folder, lora_starts
from trivium.peft.base import attach, continues, deltas, merge, state
from trivium.peft.settings import settings_of

OURS = {
    "lora": {"name": "lora", "r": 4},
    "dora": {"name": "dora", "r": 4},
    "pissa": {"name": "pissa", "r": 4, "alpha": 3},
    "olora-rslora": {"name": "olora", "r": 4, "rslora": True, "rank_pattern": {"*1.mlp.*": 2}},
    "vera": {"name": "vera", "r": 8},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 5},
    "prefix": {"name": "prefix", "num_virtual_tokens": 5},
}
KINDS = ["llama", "qwen3", "gemma3", "gpt2"]


def theirs_of(model, path):
    """The folder in PEFT, which must have nothing to complain about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*Position ids are not supported.*")
        return peft.PeftModel.from_pretrained(model, path)


def their_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -tokens.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS)
def test_peft_reads_ours(tiny, tokens, logits, train, tmp_path, kind, name):
    settings = settings_of(OURS[name])
    model = tiny(kind)
    base = copy.deepcopy(model)
    attach(model, settings, seed=0)
    train(model)
    folder.save(model, tmp_path, base="org/tiny", settings=settings)
    found = their_logits(theirs_of(base, tmp_path), tokens)
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=2e-5)
    again = tiny(kind)
    assert continues(again, settings) is False
    assert folder.load(again, tmp_path).trained_parameters == sum(t.numel() for t in state(model).values())
    assert torch.equal(logits(again), logits(model))
    assert continues(again, settings)


THEIRS = {
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "vera": peft.VeraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", d_initial=0.3),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
NAMES = {
    "dora": ("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
    "vera": ("vera_lambda_d", "vera_lambda_d.default"),
    "ia3": ("ia3_l", "ia3_l.default"),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("name", THEIRS)
def test_ours_reads_pefts_and_has_its_gradients(tiny, tokens, logits, loss, tmp_path, kind, name):
    config = copy.deepcopy(THEIRS[name])
    if name == "ia3":  # PEFT knows no defaults for most of today's decoders
        down = "mlp.c_proj" if kind == "gpt2" else "down_proj"
        config.target_modules = {*(["c_attn"] if kind == "gpt2" else ["k_proj", "v_proj"]), down}
        config.feedforward_modules = {down}
    config.fan_in_fan_out = kind == "gpt2"
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny(kind), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model = tiny(kind)
    folder.load(model, tmp_path)
    torch.testing.assert_close(logits(model), their_logits(theirs, tokens), rtol=1e-4, atol=2e-5)

    loss(model).backward()
    out = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -tokens.shape[1] :]
    F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    other = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    if name == "prompt":
        (delta,) = deltas(model).values()
        torch.testing.assert_close(delta.embeddings.grad, *other.values(), rtol=1e-3, atol=1e-6)
    elif name == "prefix":
        parts = torch.stack([g for d in deltas(model).values() for g in (d.keys.grad, d.values.grad)])
        torch.testing.assert_close(parts.permute(2, 0, 1, 3).flatten(1), *other.values(), rtol=1e-3, atol=1e-6)
    else:
        ours, their_name = NAMES[name]
        for target, delta in deltas(model).items():
            found = other[f"base_model.model.{target}.{their_name}"]
            torch.testing.assert_close(getattr(delta, ours).grad, found.view(-1), rtol=1e-3, atol=1e-6)


def test_pissa_and_olora_are_pefts_own_starts(tiny, tokens, logits):
    """PEFT takes the start out of the base; what is computed is the same, and so are the trained factors."""
    for name in ("pissa", "olora"):
        model = tiny("llama")
        settings = settings_of({"name": name, "r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]})
        attach(model, settings, seed=0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=name)
        theirs = peft.get_peft_model(tiny("llama"), config).eval()
        torch.testing.assert_close(their_logits(theirs, tokens), logits(model), rtol=1e-4, atol=2e-4)
        for target, delta in deltas(model).items():
            other = theirs.base_model.model.get_submodule(target)
            product = other.lora_B["default"].weight @ other.lora_A["default"].weight
            torch.testing.assert_close(delta.lora_B @ delta.lora_A, product, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_trained_beside_it(tiny, on_meta, tokens, logits, train, tmp_path, tied):
    model = tiny("llama" if not tied else "gemma3")
    assert bool(model.config.tie_word_embeddings) == tied
    base, before = copy.deepcopy(model), logits(model)
    settings = settings_of({"name": "lora", "r": 2, "modules_to_save": ["embed_tokens", "lm_head"]})
    attach(model, settings, seed=0)
    assert torch.equal(logits(model), before)
    size = 128 * 64
    embeddings = [t.numel() for name, t in state(model).items() if "held" in name]
    assert embeddings == [size] * (1 if tied else 2)
    train(model)
    folder.save(model, tmp_path, base="org/tiny", settings=settings)
    assert folder.read_config(tmp_path)["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    torch.testing.assert_close(their_logits(theirs_of(base, tmp_path), tokens), logits(model), rtol=1e-4, atol=2e-5)
    again = tiny("llama" if not tied else "gemma3")
    folder.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert len(state(again)) == len(state(model))


def test_one_side_of_what_is_tied_brings_the_other(tiny, logits, train, tmp_path):
    model = tiny("gemma3")
    attached = attach(model, settings_of({"name": "lora", "r": 2, "modules_to_save": ["embed_tokens"]}), seed=0)
    assert {"model.embed_tokens", "lm_head"} <= set(attached.targets)
    assert any("tied" in note for note in attached.notes)
    # PEFT, asked for one side, unties: that is read as it is
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny("gemma3"), config).eval()
    train_theirs = [p for n, p in theirs.named_parameters() if "modules_to_save" in n]
    with torch.no_grad():
        train_theirs[0].add_(0.3 * torch.randn(128, 64))
    theirs.save_pretrained(tmp_path)
    fresh = tiny("gemma3")
    folder.load(fresh, tmp_path)
    ids = torch.arange(24)[None]
    torch.testing.assert_close(fresh(ids).logits, theirs(ids).logits, rtol=1e-4, atol=2e-5)


def test_what_is_tied_and_was_trained_apart_is_not_merged(tiny, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    theirs = peft.get_peft_model(tiny("gemma3"), config)
    for name, parameter in theirs.named_parameters():
        if "lm_head.modules_to_save" in name:
            parameter.data += 1
    theirs.save_pretrained(tmp_path)
    model = tiny("gemma3")
    folder.load(model, tmp_path)
    with pytest.raises(ModelError, match="is shared with another module"):
        merge(model)


def test_pissa_by_iteration_finds_what_the_whole_decomposition_finds(tiny, monkeypatch):
    settings = settings_of({"name": "pissa", "r": 4, "target_modules": ["down_proj"]})
    left = []  # of each weight, when its start is taken away: nothing of rank 4 leaves less than the exact one
    for exact in (1024, 8):
        monkeypatch.setattr(lora_starts, "EXACT", exact)
        model = tiny("llama")
        attach(model, settings, seed=0)
        pairs = [(model.get_submodule(name).weight, delta) for name, delta in deltas(model).items()]
        left.append([float((w - d.scale * d.start_B @ d.start_A).norm()) for w, d in pairs])
    for one, other in zip(*left, strict=True):
        assert one != other
        assert one <= other * (1 + 1e-6) <= one * (1 + 1e-4)


def test_a_pissa_folder_alone_says_what_it_is(tiny, tmp_path):
    settings = settings_of({"name": "pissa", "r": 4, "alpha": 6, "target_modules": ["q_proj"]})
    model = tiny("llama")
    attach(model, settings, seed=0)
    folder.save(model, tmp_path, base="tiny", settings=settings)
    again = tiny("llama")
    folder.load(again, tmp_path)
    assert continues(again, settings_of(folder.method_in(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tiny, tmp_path, value):
    settings = settings_of({"name": "ia3"})
    model = tiny("llama")
    attach(model, settings, seed=0)
    next(iter(deltas(model).values())).ia3_l.data[0] = value
    folder.save(model, tmp_path, base="tiny", settings=settings)
    with pytest.raises(ModelError, match="no finite fractions"):
        folder.load(tiny("llama"), tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts(tiny, tokens, logits, train, tmp_path, kind):
    """Bare parameters, both ways, with the modules' own LoRAs beside them."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    settings = settings_of({"name": "lora", "r": 2, "target_modules": ["q_proj"], "target_parameters": names})
    model = tiny(kind)
    base, before = copy.deepcopy(model), logits(model)
    attach(model, settings, seed=0)
    assert torch.equal(logits(model), before)
    train(model)
    after = logits(model)
    assert not torch.equal(after, before)
    folder.save(model, tmp_path / "ours", base="org/tiny", settings=settings)
    again = copy.deepcopy(base)
    folder.load(again, tmp_path / "ours")
    assert torch.equal(logits(again), after)
    assert continues(again, settings)
    torch.testing.assert_close(their_logits(theirs_of(copy.deepcopy(base), tmp_path / "ours"), tokens), after,
                               rtol=1e-4, atol=2e-5)  # fmt: skip
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], target_parameters=names,
                             init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    folder.load(base, tmp_path / "theirs")
    torch.testing.assert_close(logits(base), their_logits(theirs, tokens), rtol=1e-4, atol=2e-5)


def test_the_same_adapter_is_the_same_bytes_and_says_what_it_holds(tiny, train, tmp_path):
    settings = settings_of({"name": "qlora", "r": 2, "loraplus_lr_ratio": 4.0})
    model = tiny("llama")
    attach(model, settings, seed=0)
    for path in (tmp_path / "a", tmp_path / "b"):
        folder.save(model, path, base="tiny", settings=settings, dtype=torch.bfloat16)
    weights = [(tmp_path / name / folder.WEIGHTS).read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert folder.written_beside(tmp_path / "a") == {"quantize": "nf4", "loraplus_lr_ratio": 4.0}
    # rewritten in another dtype by somebody else, and left with the old header: noticed
    small = load_file(tmp_path / "a" / folder.WEIGHTS)
    header = json.loads(weights[0][8 : 8 + int.from_bytes(weights[0][:8], "little")])["__metadata__"]
    save_file({k: v.float() for k, v in small.items()}, tmp_path / "a" / folder.WEIGHTS, metadata=header)
    with pytest.raises(ModelError, match="bytes of \\['float32'\\], and it says"):
        folder.load(tiny("llama"), tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("ia3", {"modules_to_save": ["x"]}, "uses modules_to_save"),
        ("prefix", {"prefix_projection": True}, "uses prefix_projection"),
        ("vera", {"d_initial": "x"}, "d_initial is 'x'"),
        ("vera", {"r": 16}, "has shape"),
        ("prompt", {"something_of_tomorrow": 1}, "something_of_tomorrow"),
    ],
)
def test_what_is_not_understood_is_refused(tiny, tmp_path, name, values, said):
    settings = settings_of(OURS[name])
    model = tiny("llama")
    attach(model, settings, seed=0)
    folder.save(model, tmp_path, base="tiny", settings=settings)
    config = json.loads((tmp_path / folder.CONFIG).read_text())
    (tmp_path / folder.CONFIG).write_text(json.dumps({**config, **values}))
    fresh = tiny("llama")
    with pytest.raises(ModelError) as caught:
        folder.load(fresh, tmp_path)
    assert said in str(caught.value)
    assert not deltas(fresh)


@pytest.mark.parametrize("name", ["ia3", "vera", "prompt", "prefix"])
def test_an_adapter_of_another_base(tiny, tmp_path, name):
    settings = settings_of(OURS[name])
    model = tiny("llama")
    attach(model, settings, seed=0)
    folder.save(model, tmp_path, base="org/tiny", settings=settings)
    with pytest.raises(ModelError):
        folder.load(tiny("gpt2") if name != "prompt" else _wider(tiny), tmp_path)


def _wider(tiny):
    model = tiny("llama")
    model.config.hidden_size = 96
    return model
