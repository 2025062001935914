"""What a recipe can start from: given folders, adapters, GGUF files, other dtypes, bases that never saw a chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trivium.chain import run_recipe
from trivium.folder import open_folder
from trivium.recipe_file import read_recipe

PROBE = torch.tensor([[1, 70, 80, 90, 100, 75, 85]])
SHORT = {"max_steps": 1, "batch_size": 2, "eval_data": 0, "learning_rate": 1e-2}


def logits(hf: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return hf(PROBE).logits.float()


@pytest.fixture
def start(tmp_path, data, write_recipe, capsys):
    """``start(model, method)``: SFT from ``model``; returns the stage's folder and what was said."""

    def run(model: object, **more: object) -> tuple[Path, str]:
        stage = {"name": "x", "stage": "sft", "data": str(data / "chats.jsonl"), **SHORT, **more}
        recipe = write_recipe(tmp_path, [stage], model=model)
        capsys.readouterr()
        run_recipe(read_recipe(recipe), tmp_path / "out")
        return tmp_path / "out" / "x", capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def given(walk, tmp_path_factory) -> Path:
    """A folder as `transformers` writes it: no trace of where it was made, no chat template, its own EOS."""
    folder = tmp_path_factory.mktemp("given")
    AutoModelForCausalLM.from_pretrained(walk.folder / "base").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(walk.folder / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "trivium.json").read_text(encoding="utf-8"))


def test_a_base_without_template_gets_plain_markers_and_keeps_its_vocabulary(start, given):
    folder, _ = start(str(given))
    assert "plain role markers ended by <|end|>" in record(folder)["template"]["origin"]
    assert record(folder)["lineage"][0]["stage"] == "given"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False)
    assert "User:" in text
    before = load_file(given / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}


def test_a_base_with_chatml_tokens_gets_chatml(start, given, tmp_path):
    both = Path(shutil.copytree(given, tmp_path / "both"))
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(both), AutoTokenizer.from_pretrained(both)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    hf.resize_token_embeddings(len(tokenizer))
    hf.save_pretrained(both)
    tokenizer.save_pretrained(both)
    folder, _ = start(str(both), method="lora")
    assert record(folder)["template"]["origin"].startswith("ChatML")
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    assert record(folder)["template"]["stop_ids"] == sorted(ends), "a document's end stops an answer, too"


def test_added_tokens_are_trained_in_full(start, given):
    folder, said = start({"path": str(given), "add_tokens": True})
    assert "2 tokens added to the vocabulary" in said
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    before = load_file(given / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape[0] == before.shape[0] + 2
    assert len(AutoTokenizer.from_pretrained(folder)) == rows.shape[0]
    assert record(folder)["template"]["origin"].startswith("ChatML")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert hf.config.vocab_size == rows.shape[0]
    with torch.no_grad():
        assert hf(torch.tensor([[rows.shape[0] - 1]])).logits.shape[-1] == rows.shape[0]


def test_added_tokens_with_an_adapter_are_refused(given, data, trivium, write_recipe, tmp_path):
    stage = {"name": "x", "stage": "sft", "data": str(data / "chats.jsonl"), "method": "lora", **SHORT}
    recipe = write_recipe(tmp_path, [stage], model={"path": str(given), "add_tokens": True})
    done = trivium("run", recipe, "--out", tmp_path / "out")
    assert done.code == 2
    assert "model.add_tokens" in done.error
    assert "method: full" in done.error
    assert not list((tmp_path / "out").glob("x*"))


def test_overrides_change_the_config_and_the_base_is_written_with_them(start, given):
    folder, said = start(
        {"path": str(given), "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}, method="lora"
    )
    base = folder.parent / "model"
    assert "the frozen base is written to" in said
    assert json.loads((base / "config.json").read_text(encoding="utf-8"))["rope_parameters"]["rope_theta"] == 50.0
    opened = open_folder(str(folder))
    assert Path(opened.base).resolve() == base.resolve()
    assert opened.model.hf.config.rope_parameters["rope_theta"] == 50.0
    plain = AutoModelForCausalLM.from_pretrained(given)
    assert not torch.allclose(logits(opened.model.hf), logits(plain), atol=1e-4)


def test_an_unknown_override_is_named(given, data, trivium, write_recipe, tmp_path):
    stage = {"name": "x", "stage": "sft", "data": str(data / "chats.jsonl"), **SHORT}
    recipe = write_recipe(tmp_path, [stage], model={"path": str(given), "rms_norm_epz": 1})
    done = trivium("run", recipe, "--out", tmp_path / "out")
    assert done.code == 2
    assert "rms_norm_epz" in done.error


def peft_written(given: Path, folder: Path) -> torch.Tensor:
    """A LoRA by PEFT itself, with weights that do something; its logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(given)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return logits(model.eval())


def test_an_adapter_that_peft_wrote_goes_on(start, given, tmp_path):
    from peft import PeftModel

    theirs = peft_written(given, tmp_path / "lora")
    assert torch.allclose(logits(open_folder(str(tmp_path / "lora")).model.hf), theirs, atol=1e-5)
    folder, said = start(str(tmp_path / "lora"))
    assert "goes on training the lora adapter of its parent" in said
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (3, 5, ["down_proj", "q_proj"])
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "lora", folder))
    assert before.keys() == after.keys()
    moved = max((before[n] - after[n]).abs().max() for n in before)
    assert 0 < moved < 0.011, "one step of 0.01 from the weights that PEFT wrote"
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given), str(folder)).eval()
    assert torch.allclose(logits(again), logits(open_folder(str(folder)).model.hf), atol=1e-5)


def test_an_adapter_folder_goes_on_with_its_whole_lineage(start, walk):
    folder, said = start(str(walk.folder / "aligned"))
    assert "goes on training the lora adapter of its parent" in said
    assert [link["name"] for link in record(folder)["lineage"]] == ["new", "base", "chat", "aligned", "x"]
    assert Path(open_folder(str(folder)).base).resolve() == walk.folder / "base"


def test_another_rank_merges_and_writes_the_merged_base(start, walk):
    folder, said = start(str(walk.folder / "aligned"), method={"name": "lora", "r": 1})
    assert "merged into its base first" in said
    opened = open_folder(str(folder))
    assert Path(opened.base).resolve() == folder.parent / "x-base"
    merged = AutoModelForCausalLM.from_pretrained(folder.parent / "x-base").eval()
    parent = open_folder(str(walk.folder / "aligned")).model.hf
    assert torch.allclose(logits(merged), logits(parent), atol=1e-5)


def test_a_bottleneck_folder_goes_on(start, walk):
    folder, said = start(str(walk.folder / "tutor"))
    assert "goes on training the bottleneck adapter of its parent" in said
    assert record(folder)["method"] == "bottleneck"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bfloat16(start, given, tmp_path, method):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(given, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(given).save_pretrained(half)
    folder, _ = start(str(half), method=method, dtype="bfloat16", learning_rate=1e-4, max_steps=3)
    assert record(folder)["dtype"] == {"computation": "torch.bfloat16", "saved": "torch.bfloat16"}
    after = load_file(next(folder.glob("*.safetensors")))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}, "saved in the parent's dtype"
    if method == "full":
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
        before = load_file(half / "model.safetensors")
        assert any(not torch.equal(before[n], after[n]) for n in before)


def test_full_training_keeps_float32_masters_under_bfloat16(start, given, monkeypatch):
    import trivium.stage_training as runner

    seen = {}
    train = runner.train

    def spy(task, after_step, done):
        result = train(task, after_step, done)
        owned = [p for o in task.optimizers for group in o.param_groups for p in group["params"]]
        seen["weights"] = {p.dtype for p in owned}
        seen["moments"] = {v.dtype for o in task.optimizers for s in o.state.values() for v in s.values() if v.ndim}
        return result

    monkeypatch.setattr(runner, "train", spy)
    start(str(given), dtype="bfloat16")
    assert seen == {"weights": {torch.float32}, "moments": {torch.float32}}


# --- GGUF

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(folder: Path, path: Path) -> None:
    """A small llama as llama.cpp's converter writes it: rotary halves interleaved, float32."""
    import gguf

    hf = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config, writer = hf.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda pair: pair[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([3 if number in special else 1 for _, number in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for add, number in ((writer.add_pad_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(number)
    for name, tensor in hf.state_dict().items():
        values, short = tensor.numpy(), name.removeprefix("model.").removesuffix(".weight")
        if short == "lm_head":
            continue
        if short in ("embed_tokens", "norm"):
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm"}[short]
        else:
            _, layer, rest = short.split(".", 2)
            theirs = f"blk.{layer}.{GGUF_NAMES[rest]}"
            if rest.endswith(("q_proj", "k_proj")):
                n = config.num_attention_heads
                values = values.reshape(n, 2, len(values) // n // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(start, given, tmp_path, trivium):
    pytest.importorskip("gguf")
    write_gguf(given, tmp_path / "tiny.gguf")
    opened = open_folder(str(tmp_path / "tiny.gguf"))
    expected = logits(AutoModelForCausalLM.from_pretrained(given))
    assert torch.allclose(logits(opened.model.hf), expected, atol=1e-5)
    folder, said = start(str(tmp_path / "tiny.gguf"), method="lora")
    assert "the frozen base is written to" in said, "an adapter needs a base that peft can load"
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "model")
    assert torch.allclose(logits(base), expected, atol=1e-5)
    assert not hasattr(base.config, "quantization_config")
    (tmp_path / "tiny.gguf").unlink()
    assert trivium("generate", folder, "red", "--max-new-tokens", 2).code == 0


def test_a_new_model_with_a_given_tokenizer(start, given):
    sizes = {"architecture": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder, said = start({**sizes, "tokenizer": str(given)}, method="lora")
    assert "tokenizer:" not in said, "none was trained"
    assert Path(open_folder(str(folder)).base).resolve() == folder.parent / "model"
    assert json.loads((folder.parent / "model" / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3"
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(given))
