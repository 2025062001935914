"""Folders that are no model, damaged, or hostile; data with nothing to learn; prompts that cannot be answered."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trivium.cli.main import main

STAGE = {"name": "x", "stage": "sft", "max_steps": 1, "batch_size": 2, "eval_data": 0}


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes the key away."""
    value = json.loads(path.read_text(encoding="utf-8"))
    value = {k: v for k, v in {**value, **changes}.items() if v is not None}
    path.write_text(json.dumps(value), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def evil(folder: Path, model_type: str) -> None:
    """A config that asks for code of the folder's own; running it would leave a file."""
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": "evil.Tokenizer"}
    rewrite(folder / "config.json", model_type=model_type, auto_map=auto)
    code = f"open({str(folder / 'it_ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")


def outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "other.safetensors").touch()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


# name: (what is done to a sound folder, what the message has to hold)
MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "without weights": (lambda f: (f / "model.safetensors").unlink(), ["without weights", "config.json"]),
    "with a pickle only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["only as pytorch_model.bin", "can run code", "save_pretrained"],
    ),
    "without a config": (lambda f: (f / "config.json").unlink(), ["no config.json", "it has: "]),
    "with weights cut off": (lambda f: cut(f / "model.safetensors"), ["model.safetensors", "speaks of", "restore"]),
    "with weights of nothing": (lambda f: (f / "model.safetensors").write_bytes(b""), ["not a safetensors file"]),
    "with a header that lies": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8 + (f / "model.safetensors").read_bytes()[8:]),
        ["not a safetensors file", "its header is longer than the file"],
    ),
    "with a config that is not JSON": (
        lambda f: (f / "config.json").write_text('{"a":\n !}', encoding="utf-8"),
        ["config.json:2: not JSON"],
    ),
    "with a config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["no model_type"]),
    "with a config nested without end": (lambda f: (f / "config.json").write_text("[" * 99999), ["config.json"]),
    "with a config that is not text": (lambda f: (f / "config.json").write_bytes(b"\xff"), ["not UTF-8"]),
    "of an unknown kind": (lambda f: rewrite(f / "config.json", model_type="llamba"), ["model_type", "pip install -U"]),
    "of a kind that is a number": (lambda f: rewrite(f / "config.json", model_type=5), ["model_type"]),
    "that does not write": (lambda f: rewrite(f / "config.json", model_type="t5"), ["not a causal language model"]),
    "with code of its own": (lambda f: evil(f, "mine"), ["code of its own"]),
    "with other shapes": (lambda f: rewrite(f / "config.json", vocab_size=100), ["do not have the shapes"]),
    "with a layer missing": (lambda f: rewrite(f / "config.json", num_hidden_layers=3), ["lack 9 tensors", "layers.2"]),
    "with an index that leads out": (outside, ["index.json", "not in this folder"]),
    "without a tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ["no tokenizer"]),
    "with a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["cannot be loaded"]),
    "with a broken template": (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), ["chat template"]),
    "with a hostile template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
        ["chat template", "unsafe"],
    ),
}  # fmt: skip
ADAPTERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "whose base is gone": (
        lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path="/gone/base"),
        ["its base model is not at /gone/base", "put the base back"],
    ),
    "that names no base": (lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path=None), ["no base"]),
    "that is its own base": (
        lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path="."),
        ["is itself an adapter"],
    ),
    "without weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "with weights cut off": (lambda f: cut(f / "adapter_model.safetensors"), ["adapter_model.safetensors"]),
    "with settings that are not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), ["adapter_config"]),
    "with settings nested without end": (lambda f: (f / "adapter_config.json").write_text("[" * 99999), ["adapter_"]),
}  # fmt: skip


def check(done: Any, *says: str) -> None:
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert done.error.strip().count("\n") == 1, f"one line of what, one of remedy: {done.error}"
    for text in says:
        assert text in done.error, f"{text!r} is not in {done.error!r}"


@pytest.fixture
def refused(trivium, write_recipe, data, tmp_path):
    """A folder is refused by ``run`` and by ``generate``, and nothing is left behind."""

    def run(folder: Path, says: list[str]) -> None:
        check(trivium("generate", folder, "hello"), *says)
        recipe = write_recipe(tmp_path, [{**STAGE, "data": str(data / "chats.jsonl")}], model=str(folder))
        done = trivium("run", recipe, "--out", tmp_path / "out")
        check(done, *says)
        assert "step 1/" not in done.err
        assert not list(tmp_path.glob("out/*"))
        assert not (folder / "it_ran").exists()

    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder(name, walk, tmp_path, refused):
    damage, says = MODELS[name]
    folder = Path(shutil.copytree(walk.folder / "base", tmp_path / "given"))
    (folder / "trivium.json").unlink()
    damage(folder)
    refused(folder, says)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("kind", ["chat", "tutor"])
def test_an_adapter_folder(name, kind, walk, tmp_path, refused):
    damage, says = ADAPTERS[name]
    folder = Path(shutil.copytree(walk.folder / kind, tmp_path / "given"))
    (folder / "trivium.json").unlink()
    damage(folder)
    refused(folder, says)


def test_code_in_the_folder_of_a_known_model_is_not_run(walk, tmp_path, trivium):
    folder = Path(shutil.copytree(walk.folder / "base", tmp_path / "given"))
    evil(folder, "llama")
    done = trivium("generate", folder, "hello", "--max-new-tokens", 1)
    assert done.code == 0, done.err
    assert not (folder / "it_ran").exists()


@pytest.mark.parametrize("kind", ["chat", "tutor"])
def test_an_adapter_for_another_base(kind, walk, tmp_path, refused, write_recipe, data):
    from trivium.chain import run_recipe
    from trivium.recipe_file import read_recipe

    sizes = {"architecture": "llama", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    stage = {"name": "other", "stage": "pretrain", "data": str(data / "text.jsonl"), "max_steps": 1, "batch_size": 2}
    recipe = write_recipe(tmp_path, [stage], model={**sizes, "vocab_size": 320, "max_position_embeddings": 128})
    run_recipe(read_recipe(recipe), tmp_path / "wide")
    folder = Path(shutil.copytree(walk.folder / kind, tmp_path / "given"))
    (folder / "trivium.json").unlink()
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "wide" / "other"))
    refused(folder, ["given", "this model"])


def test_an_adapter_whose_base_was_trained_again(walk, tmp_path, trivium):
    run = Path(shutil.copytree(walk.folder, tmp_path / "run"))
    rewrite(run / "base" / "trivium.json", identity="0" * 64)
    done = trivium("generate", run / "chat", "hello")
    check(done, "an adapter for another base", "has changed since", "train the adapter again")


@pytest.mark.parametrize(
    "record", ["[]", "{}", '{"identity": 5, "lineage": []}', '{"identity": "x", "lineage": [3]}', "[" * 9999]
)
def test_a_record_that_is_none(record, walk, tmp_path, trivium):
    folder = Path(shutil.copytree(walk.folder / "base", tmp_path / "given"))
    (folder / "trivium.json").write_text(record, encoding="utf-8")
    check(trivium("inspect", folder), "trivium.json")


@pytest.mark.parametrize("what", ["nowhere", "file.txt", "empty", "cut.gguf", "no.gguf"])
def test_what_is_no_model(what, walk, tmp_path, trivium):
    (tmp_path / "file.txt").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "no.gguf").write_bytes(b"nope")
    check(trivium("generate", tmp_path / what, "hello"), what)
    check(trivium("chat", tmp_path / what), what)
    if what != "cut.gguf":  # inspect reads no more of a GGUF file than its first bytes
        check(trivium("inspect", tmp_path / what), what)


def test_a_hub_id_without_a_network(trivium, write_recipe, data, tmp_path):
    check(trivium("generate", "nobody/nothing", "hello"), "nobody/nothing", "network")
    recipe = write_recipe(tmp_path, [{**STAGE, "data": str(data / "chats.jsonl")}], model="nobody/nothing")
    check(trivium("run", recipe, "--out", tmp_path / "out"), "nobody/nothing", "HF_HUB_OFFLINE")


# --- data

GOOD = "".join(json.dumps({"prompt": f"red {n}", "completion": "cat"}) + "\n" for n in range(10))


@pytest.mark.promise(8)
@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("\n \n", ["no rows in", "rows.jsonl"]),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', ["rows.jsonl:1", "no assistant turn", "1 of 1 rows"]),
        (GOOD + '{"prompt": "x", "completion": " "}\n', ["rows.jsonl:11", "empty answer", "1 of 11", "bad_rows"]),
        ("hello\nworld\n", ["rows.jsonl:1", "not JSON", "2 of 2 rows"]),
        ('{"text": "once"}\n' * 3, ["rows.jsonl:1", "pretraining", "messages"]),
        (GOOD + '{"prompt": "x", "comp', ["rows.jsonl:11", "cut off"]),
        (json.dumps({"prompt": "x", "completion": "cat " * 400}) + "\n", ["rows.jsonl:1", "128", "max_length"]),
    ],
)
def test_data_with_nothing_to_learn(rows, says, walk, tmp_path, trivium, write_recipe):
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    recipe = write_recipe(tmp_path, [{**STAGE, "data": "rows.jsonl"}], model=str(walk.folder / "base"))
    done = trivium("run", recipe, "--out", tmp_path / "out")
    check(done, *says)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.promise(7, 19)
def test_rows_set_aside_are_told_and_written_down(walk, tmp_path, trivium, write_recipe):
    (tmp_path / "rows.jsonl").write_text(GOOD + '{"prompt": "x", "completion": ""}\nnonsense\n', encoding="utf-8")
    stage = {**STAGE, "data": "rows.jsonl", "bad_rows": 0.2}
    recipe = write_recipe(tmp_path, [stage], model=str(walk.folder / "base"))
    done = trivium("run", recipe, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "2 rows set aside" in done.err
    assert "rows.jsonl:12" in done.err
    rows = [json.loads(r) for r in (tmp_path / "out/x/quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["origin"].rsplit(":", 1)[1] for r in rows] == ["11", "12"]
    record = json.loads((tmp_path / "out/x/trivium.json").read_text(encoding="utf-8"))
    assert (record["rows"]["read"], record["rows"]["used"], record["rows"]["set_aside"]) == (12, 10, 2)


def test_a_token_that_the_model_has_no_embedding_for(walk, tmp_path, trivium, write_recipe):
    """A tokenizer of more tokens than the model reads is taken, and a text with such a token refused where it is."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(walk.folder / "base", tmp_path / "given"))
    (folder / "trivium.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(folder)
    says = ["'<beyond>'", f"number {len(tokenizer) - 1}", f"embeddings of {len(tokenizer) - 1}", "came with"]
    check(trivium("generate", folder, "red <beyond>", "--raw"), *says)
    assert trivium("generate", folder, "red cat", "--raw", "--max-new-tokens", "1").code == 0
    rows = tmp_path / "rows.jsonl"
    recipe = write_recipe(tmp_path, [{**STAGE, "data": "rows.jsonl", "max_steps": 6}], model=str(folder))
    rows.write_text(GOOD + '{"prompt": "x <beyond>", "completion": "cat"}\n', encoding="utf-8")
    check(trivium("run", recipe, "--out", tmp_path / "out"), "rows.jsonl:11", *says)
    rows.write_text(GOOD, encoding="utf-8")
    assert trivium("run", recipe, "--out", tmp_path / "out").code == 0


def test_a_word_of_the_vocabulary_that_the_model_has_no_embedding_for(walk, tmp_path, trivium, write_recipe):
    """The vocabulary has no more words than the model reads, and one of them a number beyond."""
    folder = Path(shutil.copytree(walk.folder / "base", tmp_path / "given"))
    (folder / "trivium.json").unlink()
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    whole["model"]["vocab"]["c"] = 500
    whole["model"]["merges"] = []  # so that "cat" is read by its letters
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    check(trivium("generate", folder, "cat", "--raw"), "'c' as number 500")
    (tmp_path / "rows.jsonl").write_text(GOOD, encoding="utf-8")
    recipe = write_recipe(tmp_path, [{**STAGE, "data": "rows.jsonl"}], model=str(folder))
    check(trivium("run", recipe, "--out", tmp_path / "out"), "rows.jsonl:", "'c' as number 500")


# --- prompts


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cat " * 200], ["the model's context is 128", "shorten"]),
        (["cat " * 200, "--raw"], ["the model's context is 128", "shorten"]),
        (["  "], ["the prompt is empty"]),
        (["\udcff"], ["not UTF-8"]),
    ],
)
def test_a_prompt_that_cannot_be_answered(arguments, says, walk, trivium):
    check(trivium("generate", walk.folder / "base", *arguments), *says)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "nan"],
        ["--temperature", "-1"],
        ["--max-new-tokens", "0"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--bogus"],
    ],
)
def test_an_option_out_of_range(arguments, walk, trivium):
    done = trivium("generate", walk.folder / "base", "hello", *arguments)
    assert done.code == 2
    assert arguments[0] in done.err
    assert "Traceback" not in done.err


# --- the disk


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


DISK = {
    "weights": ["transformers.PreTrainedModel.save_pretrained", "trivium.peft.folder.save_file"],
    "tokenizer": ["transformers.PreTrainedTokenizerBase.save_pretrained"],
    "record": ["pathlib.Path.replace"],
    "fsync": ["os.fsync"],
    "rename": ["pathlib.Path.rename"],
}


@pytest.mark.promise(3)
@pytest.mark.parametrize("method", ["full", "lora", "bottleneck"])
@pytest.mark.parametrize("at", DISK)
def test_a_full_disk_leaves_nothing_half_written(at, method, walk, data, tmp_path, trivium, write_recipe, monkeypatch):
    stage = {**STAGE, "data": str(data / "chats.jsonl"), "method": method}
    recipe = write_recipe(tmp_path, [stage], model=str(walk.folder / "base"))
    with monkeypatch.context() as broken:
        for place in DISK[at]:
            broken.setattr(place, full_disk)
        done = trivium("run", recipe, "--out", tmp_path / "out")
    assert done.code == 3, done.err
    assert "the disk is full" in done.error
    assert re.search(r"\d\S* [kMG]?B free\)", done.error)
    left = [p.name for p in (tmp_path / "out").rglob("*")]
    assert not any(name.endswith((".partial", ".old", ".gone")) for name in left), left
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {f"{stage['name']}.training"}
    assert trivium("run", recipe, "--out", tmp_path / "out").code == 0, "the same command goes on"


def test_our_own_mistake_is_a_traceback_with_exit_code_1(monkeypatch, walk):
    """A bug must not look like the user's mistake."""
    import trivium.inspect

    def bug(_: str) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(trivium.inspect, "described", bug)
    monkeypatch.setattr(sys, "argv", ["trivium", "inspect", str(walk.folder / "base")])
    with pytest.raises(KeyError):
        main()
