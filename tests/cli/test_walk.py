"""The walk end to end: what each stage's folder holds, and that `transformers` and `peft` see the same model in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trivium.folder import open_folder
from trivium.terminal import size

PROBE = torch.tensor([[1, 70, 80, 90, 100, 2, 75, 85]])
KEYS = {
    "name", "stage", "method", "trained_parameters", "total_parameters", "bytes_on_disk", "seconds", "setup_seconds",
    "eval_seconds", "save_seconds", "tokens", "trained_tokens", "tokens_per_second", "peak_memory_bytes", "metrics",
}  # fmt: skip
FULL, LORA, BOTTLENECK = ["base", "whole"], ["chat", "aligned", "again"], ["tutor", "judged"]


def logits(hf: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return hf(PROBE).logits


def test_the_summary_has_the_promised_keys(walk):
    on_disk = json.loads((walk.folder / "summary.json").read_text(encoding="utf-8"))
    assert on_disk == walk.summary
    assert [s["name"] for s in on_disk["stages"]] == [*FULL[:1], "chat", "aligned", "tutor", "judged", "whole", "again"]
    for stage in on_disk["stages"]:
        assert set(stage) >= KEYS
        weights = next((walk.folder / stage["name"]).glob("*.safetensors"))
        assert stage["bytes_on_disk"] == weights.stat().st_size
        assert stage["tokens"] >= stage["trained_tokens"] > 0
        assert stage["tokens_per_second"] == pytest.approx(stage["tokens"] / stage["seconds"])
        assert stage["peak_memory_bytes"] > 2**20
        assert min(stage[k] for k in ("seconds", "setup_seconds", "eval_seconds", "save_seconds")) > 0


def test_parameters_are_counted_exactly(walk):
    found = {s["name"]: (s["trained_parameters"], s["total_parameters"]) for s in walk.summary["stages"]}
    hf = AutoModelForCausalLM.from_pretrained(walk.folder / "base")
    whole = sum(p.numel() for p in hf.parameters())
    linear = [m for m in hf.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    lora = 2 * sum(m.in_features + m.out_features for m in linear)
    bottleneck = 4 * (2 * 32 * 4 + 4 + 32)  # two layers, two adapters each
    assert found["base"] == found["whole"] == (whole, whole)
    assert {found[name] for name in LORA} == {(lora, whole + lora)}
    assert {found[name] for name in BOTTLENECK} == {(bottleneck, whole + bottleneck)}


@pytest.mark.parametrize("name", [*FULL, *LORA, *BOTTLENECK])
def test_the_record_tells_everything(walk, name):
    record = walk.record(name)
    for key in ("parent", "data", "settings", "versions", "metrics", "rows", "lineage", "template", "proof", "dtype"):
        assert record[key], key
    rows = record["rows"]
    assert rows["read"] == rows["used"] + rows["held_out"] + rows["over_long"] + rows["set_aside"]
    assert record["lineage"][-1] == {k: record[k] for k in ("name", "stage", "method", "identity")}
    assert set(record["versions"]) >= {"trivium", "torch", "transformers", "python"}
    parent = record["settings"].get("from")
    if parent:
        assert record["parent"]["identity"] == walk.record(parent)["identity"]
        assert record["lineage"][:-1] == walk.record(parent)["lineage"]
        assert (walk.folder / name / record["parent"]["path"]).resolve() == (walk.folder / parent).resolve()


def test_two_branches_of_one_base(walk):
    assert walk.record("chat")["lineage"][:-1] == walk.record("tutor")["lineage"][:-1]
    assert [link["name"] for link in walk.record("again")["lineage"]] == [
        "new", "base", "chat", "aligned", "whole", "again",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*FULL, *LORA, *BOTTLENECK])
def test_every_step_is_written_down(walk, name):
    lines = (walk.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2]
    assert all(r["grad_norm"] > 0 and r["learning_rate"] > 0 and r["examples"] == 4 for r in steps)
    held_out = [r for r in rows if "eval_loss" in r]
    record = walk.record(name)
    assert held_out[0]["eval_loss"] == record["metrics"]["before_loss"]
    assert held_out[-1]["eval_loss"] == record["metrics"]["after_loss"]
    assert sum(r["tokens"] for r in steps) == record["tokens"]


@pytest.mark.parametrize("name", ["aligned", "judged", "whole"])
def test_preference_starts_at_ln_2_from_its_parent(walk, name):
    metrics = walk.record(name)["metrics"]
    assert metrics["before_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert metrics["before_accuracy"] == 0.5, "before the first step every pair is a tie"
    assert abs(metrics["after_margin"]) > 1e-4, "it learnt nothing"


@pytest.mark.parametrize("name", FULL)
def test_a_full_folder_is_the_same_in_plain_transformers(walk, name):
    folder = walk.folder / name
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(hf), logits(open_folder(str(folder)).model.hf))
    assert "auto_map" not in (folder / "config.json").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red cat"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|begin|><|user|>red cat<|end|><|assistant|>"
    assert hf.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    assert walk.record(name)["template"]["stop_ids"] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", LORA)
def test_a_lora_folder_is_the_same_in_peft(walk, name):
    from peft import PeftModel

    opened = open_folder(str(walk.folder / name))
    base = AutoModelForCausalLM.from_pretrained(opened.base)
    bare = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, str(walk.folder / name)).eval())
    assert torch.allclose(theirs, logits(opened.model.hf), atol=1e-6)
    assert not torch.allclose(theirs, bare, atol=1e-5), "the adapter does nothing"


def test_an_adapter_goes_on_as_the_same_adapter(walk):
    assert "goes on training the lora adapter" in walk.said
    assert "goes on training the bottleneck adapter" in walk.said
    for first, second in (("chat", "aligned"), ("tutor", "judged")):
        one, other = walk.record(first), walk.record(second)
        assert one["base"] == other["base"]
        assert other["base"]["identity"] == walk.record("base")["identity"]
        assert other["settings"]["method"] == one["settings"]["method"], "the method is inherited"
        assert one["trained_parameters"] == other["trained_parameters"]
        weights = [(walk.folder / n / "adapter_model.safetensors").read_bytes() for n in (first, second)]
        assert weights[0] != weights[1]


def test_full_training_of_an_adapter_merges_it_first_and_says_so(walk):
    from safetensors.torch import load_file

    assert walk.said.count("the parent's adapter is merged into its base first") == 1
    merged = open_folder(str(walk.folder / "aligned")).model.hf
    from trivium.peft.base import merge

    merge(merged)
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = load_file(walk.folder / "whole" / "model.safetensors")[name]
    base = load_file(walk.folder / "base" / "model.safetensors")[name]
    start = merged.state_dict()[name]
    assert (start - base).abs().max() > 1e-5, "the adapter moved nothing, so this test says nothing"
    assert (whole - start).abs().max() < 0.05, "two steps of at most 0.01 each from the merged weights"


def test_defaults_and_inherited_settings_are_said(walk):
    assert "from chat: device cpu, dtype auto, method lora (r 2)" in walk.said
    assert "defaults of sft:" in walk.said
    assert f"new llama: {walk.record('base')['total_parameters']:,} parameters, vocabulary" in walk.said
    assert "max_length 128, which is the model's context" in walk.said
    assert walk.said.count("proof: packed and prefix-shared = separate") == 7


def test_nothing_half_written_is_left(walk):
    names = {
        p.name for p in walk.folder.iterdir() if not p.name.endswith(".training")
    }  # where the best was not the last
    assert names == {"tokenizer", "summary.json", "measures.json", "report.html", *FULL, *LORA, *BOTTLENECK}
    assert not any(p.name.endswith((".partial", ".old", ".gone", ".lock")) for p in walk.folder.rglob("*"))


def test_the_table(walk):
    from trivium.summary import table

    lines = table(walk.summary).splitlines()
    assert len(lines) == 1 + 7
    assert max(map(len, lines)) <= 100
    after = walk.record("aligned")["metrics"]
    row = next(line for line in lines if line.startswith("aligned"))
    assert f"0.693→{after['after_loss']:.3f}" in row
    assert f"50%→{after['after_accuracy']:.0%}" in row
    assert size(walk.record("aligned")["bytes_on_disk"]) in row


def test_a_bottleneck_parent_cannot_be_merged(walk, data, trivium, write_recipe, tmp_path):
    recipe = write_recipe(
        tmp_path,
        [{"name": "x", "stage": "sft", "data": str(data / "chats.jsonl"), "method": "lora", "max_steps": 1}],
        model=str(walk.folder / "tutor"),
    )
    done = trivium("run", recipe, "--out", tmp_path / "out")
    assert done.code == 2
    assert "merge" in done.error
    assert not (tmp_path / "out" / "x").exists()
    assert not Path(tmp_path / "out" / "x.partial").exists()
