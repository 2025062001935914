"""Every method as a user meets it: in a recipe, through SFT and preference tuning, in folders that load again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import trivium as package
from trivium.folder import round_to
from trivium.peft import METHODS, folder
from trivium.peft.settings import PRESETS

SHORT = {"max_steps": 2, "batch_size": 4, "eval_data": 0.2}
SIZES = {"prompt": {"num_virtual_tokens": 5}, "prefix": {"num_virtual_tokens": 5}, "top_layers": {"layers": 1},
         "compacter": {"r": 4}}  # fmt: skip
NAMES = [name for name in (*METHODS, *PRESETS) if name not in ("full", "lora", "bottleneck")]
ONE = {"lora": {"name": "lora", "r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}}


@pytest.fixture
def sft(data):
    return {"stage": "sft", "data": str(data / "chats.jsonl"), **SHORT}


@pytest.fixture
def dpo(data):
    return {"stage": "preference", "data": str(data / "pairs.jsonl"), **SHORT}


@pytest.mark.parametrize("name", [*NAMES, *ONE])
def test_through_all_steps(trivium, walk, write_recipe, tmp_path, sft, dpo, name):
    """From a whole model; on with the same adapter; and preference tuning at once."""
    method = ONE.get(name) or {"name": name, **SIZES.get(name, {})}
    recipe = write_recipe(
        tmp_path,
        [
            {"name": "chat", **sft, "method": method},
            {"name": "aligned", **dpo, "from": "chat"},
            {"name": "direct", **dpo, "method": method, "max_steps": 1},
        ],
        model=str(walk.folder / "base"),
        prompts=[],
    )
    done = trivium("run", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    elsewhere = name in ("prompt", "prefix")
    assert done.err.count("dpo(beta=0.1) starts at 0.693147") == 2
    assert done.err.count("the method itself starts elsewhere") == (1 if elsewhere else 0)
    assert "goes on training the" in done.err
    assert done.err.count("proof: packed and prefix-shared = separate") == 3
    record = json.loads((tmp_path / "run" / "chat" / "trivium.json").read_text())
    assert record["metrics"]["after_loss"] < record["metrics"]["before_loss"]
    # what is measured is what the folder holds
    model = package.load(tmp_path / "run" / "aligned")
    trained = sum(p.numel() for p in model.hf.parameters() if p.requires_grad)
    assert trained == record["trained_parameters"]
    again = trivium("run", recipe, "--out", tmp_path / "run")
    assert again.err.count("done before") == 3


def test_a_quantised_chain_is_merged_into_a_model_of_its_own(trivium, walk, write_recipe, tmp_path, sft, dpo):
    stages = [
        {"name": "chat", **sft, "method": {"name": "qlora", "r": 2}},
        {"name": "aligned", **dpo, "from": "chat"},
        {"name": "other", **dpo, "from": "chat", "method": {"name": "houlsby", "r": 4}},
        {"name": "eight", **sft, "method": {"name": "pfeiffer", "r": 4, "quantize": "int8"}},
    ]
    recipe = write_recipe(tmp_path, stages, model=str(walk.folder / "base"), prompts=[])
    done = trivium("run", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert done.err.count("the frozen layers are held in nf4") == 2
    assert done.err.count("the frozen layers are held in int8") == 1
    assert "another method than its parent's" in done.err
    assert folder.quantization_of(tmp_path / "run" / "aligned") == "nf4"
    merged = trivium("merge", tmp_path / "run" / "aligned", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        one, other = (package.load(tmp_path / p).hf(ids).logits for p in ("merged", "run/aligned"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_missing_is_said_before_anything_is_loaded(trivium, write_recipe, tmp_path, monkeypatch, sft):
    import trivium.checks as checks

    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    recipe = write_recipe(tmp_path, [{"name": "chat", **sft, "method": "qlora"}], model="nowhere")
    done = trivium("run", recipe, "--out", tmp_path / "run")
    assert done.code == 2
    assert 'pip install "trivium[qlora]"' in done.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("dorra", "did you mean 'dora'"),
        ({"name": "qlora", "quantize": "int8"}, "qlora means quantize: nf4"),
        ({"name": "top_layers", "layers": 9}, "layers is 9, the model has 2"),
        ({"name": "lora", "modules_to_save": ["embed_token"]}, "did you mean 'embed_tokens'"),
        ({"name": "lora", "target_parameters": ["experts"]}, "matches no parameter outside linear modules"),
        ({"name": "lora", "target_modules": ["lm_head"]}, "reaches the output head lm_head"),
        ({"name": "ia3", "target_modules": ["k_prj"]}, "did you mean 'k_proj'"),
        ({"name": "houlsby", "skip_layers": 2}, "the model has 2 layers"),
        ({"name": "pissa", "r": 64}, "r is 64, more than a weight"),
        ({"name": "layer_norms", "quantize": "nf4"}, "no setting 'quantize'"),
        ({"name": "qlora", "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}, "is held in nf4"),
        (
            {"name": "prefix", "num_virtual_tokens": 5000},
            "5000 virtual tokens leave nothing of",
        ),
        ({"name": "lora", "alpha": 1e300}, "alpha is 1e+300"),
        ({"name": "houlsby", "reduction_factor": 1e-300}, "reduction_factor is 1e-300"),
    ],
)
def test_mistakes_in_a_method(trivium, walk, write_recipe, tmp_path, sft, method, said):
    recipe = write_recipe(tmp_path, [{"name": "chat", **sft, "method": method}], model=str(walk.folder / "base"))
    done = trivium("run", recipe, "--out", tmp_path / "run")
    assert (done.code, said in done.error) == (2, True), done.err
    assert len(done.error.strip().splitlines()) <= 3


@pytest.mark.parametrize("chain", [("houlsby", "lora", "non-linear"), ("prompt", "full", "virtual tokens")])
def test_a_chain_that_cannot_be_merged_is_said_at_once(trivium, walk, write_recipe, tmp_path, sft, dpo, chain):
    first, then, said = chain
    stages = [{"name": "chat", **sft, "method": first}, {"name": "next", **dpo, "from": "chat", "method": then}]
    done = trivium("run", write_recipe(tmp_path, stages, model=str(walk.folder / "base")), "--out", tmp_path / "run")
    assert (done.code, "stages.next.method: chat's adapter would have to be merged first" in done.error) == (2, True)
    assert said in done.error
    assert not (tmp_path / "run" / "chat").exists()


def test_what_does_not_fit_into_memory_is_said(walk, monkeypatch):
    monkeypatch.setattr("trivium.train.machine.free_memory", lambda device: 10_000)
    with pytest.raises(package.UserError, match=r"the method's weights take .* and 10.0 kB are free"):
        package.load(walk.folder / "base").attach("lora", r=100)


def test_rounding_to_the_bases_dtype_takes_nothing_from_what_is_as_large_as_it(tmp_path, walk):
    """PiSSA, OLoRA and DoRA hold numbers as large as the weights: they are kept in float32."""
    for name in ("pissa", "olora", "dora"):
        model = package.load(walk.folder / "base")
        model._opened.model.saved_dtype = torch.bfloat16
        model.attach(name, r=2)
        ids = torch.arange(5, 40)[None]
        before = model.hf(ids).logits
        round_to(model.hf, torch.bfloat16)
        assert torch.equal(model.hf(ids).logits, before)
        model.save(tmp_path / name)
        assert {t.dtype for t in load_file(tmp_path / name / folder.WEIGHTS).values()} == {torch.float32}


def test_virtual_tokens_take_their_part_of_the_context(trivium, walk, write_recipe, tmp_path, sft, dpo):
    method = {"name": "prefix", "num_virtual_tokens": 100}
    stage = {"name": "chat", **sft, "method": method, "max_length": 64}
    done = trivium("run", write_recipe(tmp_path, [stage], model=str(walk.folder / "base")), "--out", tmp_path / "run")
    assert "max_length: 64 is more than the model's context less 100 virtual tokens: 28" in done.error
    del stage["max_length"]
    done = trivium("run", write_recipe(tmp_path, [stage], model=str(walk.folder / "base")), "--out", tmp_path / "run")
    assert done.code == 0, done.err  # rows of up to 28 tokens are what is left, and these are shorter
    record = json.loads((tmp_path / "run" / "chat" / "trivium.json").read_text())
    assert record["rows"]["over_long"] == 0
    method["num_virtual_tokens"] = 108  # the longest rows have 21
    done = trivium("run", write_recipe(tmp_path, [stage], model=str(walk.folder / "base")), "--out", tmp_path / "more")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "more" / "chat" / "trivium.json").read_text())["rows"]["over_long"] > 0
