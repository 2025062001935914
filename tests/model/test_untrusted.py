"""What is looked at of a folder before a library opens it; whole hostile folders are in `tests/hostile`."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from trivium.data.tokenizer import train_tokenizer
from trivium.errors import ModelError
from trivium.folder import load_tokenizer, reading_of
from trivium.model.headers import check_gguf
from trivium.model.load import load_base, shape_of
from trivium.model.untrusted import can_hang, check_folder

pytestmark = pytest.mark.promise(18)

SHA = "0123456789abcdef0123456789abcdef01234567"
# ruff: noqa: E501 (patterns are not cut)
# As they stand in tokenizers that are in use.
IN_USE = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "digits from the right": r"\d{1,3}(?=(?:\d{3})*\b)",
    "deepseek": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    "spaces": " {2,}",
    "a literal": r"\(a+\)+",
}  # fmt: skip


@pytest.mark.parametrize("name", IN_USE)
def test_patterns_in_use_are_no_danger(name):
    assert not can_hang(IN_USE[name])


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a*)*$", "(?:a+)*b", "((a+)b?)+", "(?:(?:a|aa)*)*$", "(x[]a]+)+", "(.*){3,}", "(?i:\\w+)*", "a" * 5000],
)
def test_patterns_that_may_never_end(pattern):
    assert can_hang(pattern)


def test_such_a_pattern_does_not_end():
    """What is refused is a danger: Python's own engine, as others, takes twice as long for every further sign."""
    seconds = []
    for length in (16, 20):
        started = time.perf_counter()
        re.search("(a+)+$", "a" * length + "b")
        seconds.append(time.perf_counter() - started)
    assert seconds[1] > 4 * seconds[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(["red cat"], 270)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the hub's client keeps it after a download, links into ``blobs``; returns the snapshot."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / SHA
    for made in (repository / "refs", repository / "blobs", snapshot):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:064}")
    return snapshot


def replace(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**value, **changes}))


def test_a_model_of_the_hub_is_read_from_its_cache(cached, folder):
    ours, theirs = (load_base(source, "float32", "cpu") for source in (str(folder), "someone/tiny"))
    for name, tensor in ours.hf.state_dict().items():
        assert torch.equal(tensor, theirs.hf.state_dict()[name])
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert reading_of("someone/tiny")[1] == reading_of(str(folder))[1]
    assert load_tokenizer(Path("someone/tiny")).get_vocab() == ours.tokenizer.get_vocab()
    assert shape_of("someone/tiny").config.hidden_size == 32
    check_folder(cached)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}, "code of its own"),
        ({"attn_implementation": "owner/kernel"}, "attn_implementation"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_a_model_of_the_hub_is_looked_at_as_any(changes, says, cached):
    replace(cached / "config.json", **changes)
    with pytest.raises(ModelError, match=says):
        load_base("someone/tiny", "float32", "cpu")


def test_an_adapter_of_the_hub_does_not_name_another_model(cached):
    (cached / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    for look in (reading_of, shape_of, lambda source: load_base(source, "float32", "cpu")):
        with pytest.raises(ModelError, match="someone/tiny: an adapter"):
            look("someone/tiny")


def test_pickled_weights_of_the_hub(cached):
    (cached / "model.safetensors").rename(cached / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no weights as safetensors"):
        load_base("someone/tiny", "float32", "cpu")


def test_a_link_out_of_the_cache_is_refused(cached, tmp_path):
    (cached / "config.json").unlink()
    (cached / "config.json").symlink_to(tmp_path / "model" / "config.json")
    with pytest.raises(ModelError, match="a link out of its folder"):
        load_base("someone/tiny", "float32", "cpu")


def test_a_folder_that_is_itself_a_link_is_no_danger(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "x.safetensors")
    (folder / "model.safetensors").symlink_to(Path("weights") / "x.safetensors")
    assert load_base(str(tmp_path / "link"), "float32", "cpu").parameters() > 0


def test_a_sound_gguf_header_passes(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_context_length(128)
    writer.add_token_list([f"token {n}" for n in range(300)])
    writer.add_token_scores([0.5] * 300)
    writer.add_bool("some.switch", True)
    writer.add_float64("some.number", 0.5)
    writer.add_tensor("token_embd.weight", torch.zeros(300, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(tmp_path / "x.gguf")


def test_looking_costs_milliseconds(folder, shared):
    for place in (folder, shared / "weights" / "stories260K-hf"):
        check_folder(place)
        started = time.process_time()
        check_folder(place)
        assert time.process_time() - started < 0.05
