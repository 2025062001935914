"""Adapter folders: PEFT reads ours, we read PEFT's, and whatever does not fit is refused in one line."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
from trivium.errors import ModelError
from trivium.folder import base_of
from trivium.peft import BottleneckSettings, LoRASettings, folder
from trivium.peft.base import attach, deltas, state

SETTINGS = {
    "plain": LoRASettings(r=4),
    "rslora": LoRASettings(r=4, alpha=3, rslora=True),
    "two": LoRASettings(r=4, alpha=2.5, target_modules=("layers.1.self_attn.q_proj", "layers.0.mlp.down_proj")),
}


def saved(model, train, path: Path, settings=SETTINGS["plain"]) -> Path:
    attach(model, settings, seed=0)
    train(model)
    folder.save(model, path, base="org/tiny", settings=settings)
    return path


def edit(path: Path, **values: object) -> None:
    config = json.loads((path / folder.CONFIG).read_text())
    (path / folder.CONFIG).write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(("kind", "name"), [("llama", n) for n in SETTINGS] + [("gpt2", "plain"), ("gemma3", "plain")])
def test_peft_reads_ours(tiny, train, logits, tmp_path, kind, name):
    model = tiny(kind)
    base = copy.deepcopy(model)
    saved(model, train, tmp_path, SETTINGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as a key that is missing or not known
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    their_names = {n.split(".lora_A")[0] for n, _ in theirs.base_model.model.named_modules() if n.endswith(".lora_A")}
    assert their_names == set(deltas(model))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("qwen3", {"target_modules": r".*\.(q|v)_proj", "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"layers.1.mlp.down_proj": 2},
                "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "q_proj": 7},
            },
        ),
    ],
)
def test_ours_reads_pefts(tiny, train, logits, tmp_path, kind, values):
    model = tiny(kind)
    base = copy.deepcopy(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **values)).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    attached = folder.load(base, tmp_path / "theirs")
    torch.testing.assert_close(logits(base), logits(theirs), rtol=1e-4, atol=1e-5)
    # and once more around: patterns of ranks and alphas survive our own save
    folder.save(base, tmp_path / "ours", base="org/tiny", settings=attached.settings)
    again = tiny(kind)
    folder.load(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(base))
    round_trip = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours")
    torch.testing.assert_close(logits(round_trip), logits(theirs), rtol=1e-4, atol=1e-5)


def test_target_modules_are_suffixes_where_those_are_exact(tiny, train, tmp_path):
    saved(tiny("llama"), train, tmp_path / "all", LoRASettings(r=2, target_modules=("q_proj", "v_proj")))
    assert folder.read_config(tmp_path / "all")["target_modules"] == ["q_proj", "v_proj"]
    saved(tiny("llama"), train, tmp_path / "one", LoRASettings(r=2, target_modules=("layers.1.*.q_proj",)))
    assert folder.read_config(tmp_path / "one")["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_saved_in_another_dtype(tiny, train, tmp_path):
    model = tiny("llama")
    attach(model, LoRASettings(r=2), seed=0)
    train(model)
    folder.save(model, tmp_path, base="org/tiny", settings=LoRASettings(r=2), dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / folder.WEIGHTS).values()} == {torch.bfloat16}
    fresh = tiny("llama")
    folder.load(fresh, tmp_path)
    mine, loaded = state(model), state(fresh)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], tensor.bfloat16().float()) for name, tensor in mine.items())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "init_lora_weights"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'; LORA, VERA, IA3, PROMPT_TUNING, PREFIX_TUNING are read"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "lora_magnitude_vector of model.layers.0.self_attn.q_proj is missing"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save 'lm_head' and holds no weights of it"),
        ({"modules_to_save": 7}, "modules_to_save '7'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"bias": ["x"]}, "bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters 'experts.down_proj' and holds no"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"something_of_tomorrow": 3}, "something_of_tomorrow"),
        ({"r": 0}, "r is 0"),
        ({"r": 8}, "lora_A of model.layers.0.self_attn.q_proj is [4, 64], this model takes [8, 64]"),
        ({"lora_alpha": "x"}, "alpha is 'x'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": "9"}}, "rank_pattern"),
        ({"rank_pattern": 7}, "rank_pattern"),
    ],
)
def test_what_is_not_understood_is_refused(tiny, train, logits, tmp_path, values, said):
    edit(saved(tiny("llama"), train, tmp_path), **values)
    fresh = tiny("llama")
    refused(fresh, tmp_path, said)


def refused(model, path: Path, *said: str) -> None:
    with pytest.raises(ModelError) as caught:
        folder.load(model, path)
    assert not [one for one in said if one not in str(caught.value)], str(caught.value)
    assert "\n" not in caught.value.what
    assert not deltas(model)


@pytest.mark.parametrize("settings", [LoRASettings(r=2), BottleneckSettings(r=2)])
def test_an_adapter_of_another_base(tiny, on_meta, train, tmp_path, settings):
    saved(tiny("llama"), train, tmp_path, settings)
    refused(tiny("gpt2"), tmp_path, "model.layers.0", "org/tiny")
    wider = on_meta("llama", hidden_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    refused(wider, tmp_path, "128]", "org/tiny")


def test_tensors_that_do_not_belong(tiny, train, tmp_path):
    saved(tiny("llama"), train, tmp_path)
    small = load_file(tmp_path / folder.WEIGHTS)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for name, said in (
        ("base_model.model.lm_head.weight", "lm_head"),
        (first.replace("_A", "_embedding_A"), "does not belong"),
    ):
        save_file({**small, name: torch.zeros(2, 2)}, tmp_path / folder.WEIGHTS)
        refused(tiny("llama"), tmp_path, said)
    save_file({name: tensor for name, tensor in small.items() if name != first}, tmp_path / folder.WEIGHTS)
    refused(tiny("llama"), tmp_path, "lora_A of model.layers.0.self_attn.q_proj is missing")
    save_file({**small, first: torch.zeros(4, 64, dtype=torch.int8)}, tmp_path / folder.WEIGHTS)
    refused(tiny("llama"), tmp_path, first)
    save_file({}, tmp_path / folder.WEIGHTS)
    refused(tiny("llama"), tmp_path, "no weights")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trivium_type": "os.system"}, "no method 'os.system'"),
        ({"trivium_type": ["x"]}, "no method"),
        ({"trivium_type": "full"}, "no setting"),
        ({"trivium_type": "lora"}, "no setting"),
        ({"r": -1}, "r is -1"),
        ({"code": "x"}, "no setting 'code'"),
        ({"r": 3}, "has shape"),
        ({"r": 1_000_000}, "has shape"),  # no memory is taken for what a config claims
        ({"r": 10**30}, "r is 10000"),
        ({"placement": "pfeiffer"}, "not one of the deltas"),
    ],
)
def test_a_bottleneck_folder_with_other_settings(tiny, train, tmp_path, values, said):
    edit(saved(tiny("llama"), train, tmp_path, BottleneckSettings(r=2)), **values)
    refused(tiny("llama"), tmp_path, said)


def test_damaged_folders(tiny, train, tmp_path):
    model = tiny("llama")
    path = saved(tiny("llama"), train, tmp_path / "a")
    weights, config = (path / folder.WEIGHTS).read_bytes(), (path / folder.CONFIG).read_bytes()
    for damaged in (b"", b"x", weights[:100], weights[:-1], b"\xff" * 8 + weights[8:]):
        (path / folder.WEIGHTS).write_bytes(damaged)
        refused(model, path, folder.WEIGHTS)
    (path / folder.WEIGHTS).write_bytes(weights)
    for damaged in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"3"):
        (path / folder.CONFIG).write_bytes(damaged)
        refused(model, path, folder.CONFIG)
    (path / folder.CONFIG).unlink()
    refused(model, path, "is not there")
    (path / folder.CONFIG).write_bytes(config)
    (path / folder.WEIGHTS).unlink()
    refused(model, path, "is not there")
    (path / "adapter_model.bin").write_bytes(b"a pickle")
    refused(model, path, "never read")
    refused(model, tmp_path / "nowhere", "is not there")


def test_links_lead_nowhere_but_into_a_hub_cache(tiny, train, tmp_path):
    model = tiny("llama")
    real = saved(tiny("llama"), train, tmp_path / "models--x" / "blobs")
    linked, cached = tmp_path / "linked", tmp_path / "models--x" / "snapshots" / "abc"
    for path in (linked, cached):
        path.mkdir(parents=True)
        for name in (folder.WEIGHTS, folder.CONFIG):
            (path / name).symlink_to(real / name)
    refused(model, linked, "link out of its folder")
    assert folder.load(model, cached).targets


@pytest.mark.parametrize("kind", [[], {}, None, 3])
def test_a_peft_type_that_is_no_name(tiny, train, tmp_path, kind):
    saved(tiny("llama"), train, tmp_path)
    edit(tmp_path, peft_type=kind)
    assert folder.method_in(tmp_path) is None
    with pytest.raises(ModelError, match="peft_type"):
        folder.load(tiny("llama"), tmp_path)


def test_a_base_whose_path_is_none(tiny, train, tmp_path):
    saved(tiny("llama"), train, tmp_path)
    edit(tmp_path, base_model_name_or_path="a\0b")
    with pytest.raises(ModelError, match="names no base"):
        base_of(tmp_path)
