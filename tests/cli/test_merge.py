"""``trivium merge``: one adapter, several, and every way in which it must not happen; ``inspect --modules``."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trivium as package
from trivium.merging import merge_difference
from trivium.peft import folder as adapters


def logits(source, ids):
    with torch.no_grad():
        return package.load(source).hf(ids).logits


IDS = torch.arange(5, 45)[None]


def test_a_merged_model_stands_alone(trivium, walk, tmp_path):
    done = trivium("merge", walk.folder / "chat", "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    assert "merged = adapter on" in done.err
    assert "100.0% the same next token (float32)" in done.err
    found = logits(tmp_path / "merged", IDS)
    torch.testing.assert_close(found, logits(walk.folder / "chat", IDS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, found)
    record = json.loads((tmp_path / "merged" / "trivium.json").read_text())
    assert [link["stage"] for link in record["lineage"]] == ["random weights", "pretrain", "sft", "merge"]
    assert record["merge"]["logits"] <= 1e-4
    assert merge_difference(str(walk.folder / "chat")) == record["merge"]["logits"]
    assert "merge" in trivium("inspect", tmp_path / "merged").out


def test_what_cannot_be_merged_is_told_with_what_to_do_instead(trivium, walk, tmp_path):
    done = trivium("merge", walk.folder / "tutor", "--out", tmp_path / "merged")
    assert done.code == 2
    assert "non-linear and cannot be merged" in done.error
    assert "keep the adapter folder beside its base" in done.error
    assert not (tmp_path / "merged").exists()
    assert merge_difference(str(walk.folder / "tutor")) is None
    assert merge_difference(str(walk.folder / "base")) is None


def test_a_merged_model_that_is_another_one_is_refused(trivium, walk, tmp_path, monkeypatch):
    from trivium.peft.lora import LoRA

    monkeypatch.setattr(LoRA, "update", lambda self: 1.5 * self.scale * self.lora_B @ self.lora_A)
    copy = strong(walk, tmp_path)
    done = trivium("merge", copy, "--out", tmp_path / "merged")
    assert done.code == 2
    assert "the merged model is not the adapter's" in done.error
    assert not (tmp_path / "merged").exists()


def strong(walk, path):
    """The chat adapter with an update that shows."""
    shutil.copytree(walk.folder / "chat", path / "chat")
    shutil.copytree(walk.folder / "base", path / "base")
    weights = path / "chat" / adapters.WEIGHTS
    save_file({k: 3 * v for k, v in load_file(weights).items()}, weights)
    return path / "chat"


def test_a_base_in_bfloat16_stays_in_it(trivium, walk, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(walk.folder / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(walk.folder / "base" / name, tmp_path / "half")
    shutil.copytree(walk.folder / "chat", tmp_path / "chat")
    (tmp_path / "chat" / "trivium.json").unlink()
    config = json.loads((tmp_path / "chat" / adapters.CONFIG).read_text())
    (tmp_path / "chat" / adapters.CONFIG).write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "half")})
    )
    done = trivium("merge", tmp_path / "chat", "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    assert "(bfloat16)" in done.err
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_several_loras_become_one(trivium, walk, tmp_path):
    """``aligned`` goes on from ``chat``: two LoRAs on one base."""
    two = (walk.folder / "chat", walk.folder / "aligned")
    for number, more in enumerate(
        (["--weights", "0.5,0.5"], ["--how", "svd", "--rank", "2"], ["--how", "ties", "--density", "0.5"],
         ["--how", "dare", "--density", "0.5", "--seed", "1"], ["--how", "linear", "--weights", "1,-0.5"])
    ):  # fmt: skip
        done = trivium("merge", *two, "--out", tmp_path / str(number), *more)
        assert done.code == 0, done.err
        assert (tmp_path / str(number) / "model.safetensors").is_file()
    done = trivium("merge", *two, "--out", tmp_path / "one", "--adapter", "--weights", "0.25,0.75")
    assert done.code == 0, done.err
    model = package.load(walk.folder / "base")
    for folder, name in zip(two, "ab", strict=True):
        model.load_adapter(folder, name)
    with torch.no_grad():
        averaged = model.use({"a": 0.25, "b": 0.75}).hf(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "one", IDS), averaged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{chat}", "--how", "ties"], 2, "--how is for several adapters"),
        (["{base}"], 2, "not an adapter folder"),
        (["{chat}", "{tutor}"], 2, "no plain LoRA (Bottleneck on model.layers.0"),
        (["{chat}", "{again}"], 2, "is an adapter on another base"),
        (["{chat}", "{aligned}", "--how", "tis"], 2, "did you mean 'ties'"),
        (["{chat}", "{aligned}", "--weights", "1,x"], 2, "--weights 1,x: not numbers"),
        (["{chat}", "{aligned}", "--weights", "1"], 2, "weights [1.0] for 2 LoRAs"),
        (["{chat}", "{aligned}", "--how", "ties"], 2, "ties with density None"),
        (["nowhere"], 2, "nowhere: no such model folder"),
    ],
)
def test_mistakes(trivium, walk, tmp_path, arguments, code, said):
    paths = {name: str(walk.folder / name) for name in ("chat", "base", "tutor", "aligned", "again")}
    done = trivium("merge", *[a.format(**paths) for a in arguments], "--out", tmp_path / "out")
    assert (done.code, said in done.error) == (code, True), done.error
    assert len(done.error.strip().splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_never_overwritten(trivium, walk, tmp_path):
    (tmp_path / "mine").write_text("x")
    assert trivium("merge", walk.folder / "chat", "--out", tmp_path).code == 3
    assert (tmp_path / "mine").read_text() == "x"


def test_modules_of_a_shape_that_fits_no_memory(trivium, tmp_path):
    config = {"model_type": "opt", "hidden_size": 12288, "ffn_dim": 49152, "word_embed_proj_dim": 12288,
              "num_hidden_layers": 96, "num_attention_heads": 96, "vocab_size": 50257}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = trivium("inspect", tmp_path, "--modules")
    assert "174,604,283,904 parameters, 96 layers of width 12,288" in done.out
    assert "model.decoder.layers.0–93 (94 times)" in done.out
    assert "12288 × 12288 + bias  L D V I B" in done.out
    assert "not parallel: " in done.out
    found = json.loads(trivium("inspect", tmp_path, "--modules", "--json").out)
    trained = {one["name"]: one.get("trained") for one in found["methods"]}
    assert trained["lora"] == 16 * 96 * (6 * 12288 * 2 + 2 * (12288 + 49152) - 2 * 2 * 12288)
    assert trained["houlsby"] == 2 * 96 * (2 * 12288 * 64 + 64 + 12288)
    modules = {one["name"]: one for one in found["modules"]}
    assert modules["model.decoder.layers.3.self_attn.q_proj"]["shapes"] == {"weight": [12288, 12288], "bias": [12288]}


def test_modules_of_a_real_folder_and_of_none(trivium, walk):
    done = trivium("inspect", walk.folder / "base", "--modules")
    assert "model.layers.0–1 (2 times)" in done.out or "model.layers.0" in done.out
    assert "down_proj" in done.out
    shown = trivium("inspect", walk.folder / "chat", "--modules")  # an adapter: its base
    assert shown.out.splitlines()[1:] == done.out.splitlines()[1:]
    assert trivium("inspect", walk.folder / "nowhere", "--modules").code == 2
