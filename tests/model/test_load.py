"""Where models come from, and what is asked of the network before it is waited for."""

from __future__ import annotations

import socket

import pytest

from trivium.errors import ModelError
from trivium.model.load import load_base, locate, offline_where_unreachable


@pytest.fixture
def online(monkeypatch):
    """The hub's client as it is where nobody asked for offline use."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return constants


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The names looked up; none has an address."""
    names: list[str] = []

    def unknown(host: str, *_: object) -> None:
        names.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return names


def test_a_hub_without_an_address_is_not_waited_for(online, asked):
    assert locate("owner/name") == ("owner/name", {})
    assert asked == ["huggingface.co"]
    assert online.HF_HUB_OFFLINE
    offline_where_unreachable()
    assert len(asked) == 1, "asked once"


def test_a_proxy_may_know_what_this_machine_does_not(online, asked, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    offline_where_unreachable()
    assert asked == []
    assert not online.HF_HUB_OFFLINE


def test_a_folder_asks_nobody(online, asked, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate(str(tmp_path))
    for place in ("./nowhere", "/nowhere/at/all", "nowhere.gguf", "nowhere", "a/b/c"):
        with pytest.raises(ModelError, match="no such model folder"):
            locate(place)
    assert asked == []


@pytest.fixture
def folder(tmp_path):
    """A tiny model in bfloat16 with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trivium.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["red cat"], 270)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_is_read_in_the_dtype_asked_for_and_remembers_its_own(folder):
    import torch

    model = load_base(str(folder), "float32", "cpu")
    assert model.dtype == torch.float32
    assert {p.dtype for p in model.hf.parameters()} == {torch.float32}
    assert model.saved_dtype == torch.bfloat16
    assert not model.hf.training


def test_overrides_change_what_the_config_has_and_nothing_else(folder):
    model = load_base(str(folder), "float32", "cpu", {"rms_norm_eps": 0.5})
    assert model.hf.config.rms_norm_eps == 0.5
    assert model.hf.model.norm.variance_epsilon == 0.5
    with pytest.raises(ModelError, match="has no 'rms_norm_epz'"):
        load_base(str(folder), "float32", "cpu", {"rms_norm_epz": 0.5})


def test_reading_gguf_shows_no_bar_and_leaves_the_library_as_it_was(capsys):
    from transformers import modeling_gguf_pytorch_utils as gguf

    from trivium.model.load import quiet

    bar = gguf.tqdm
    with quiet():
        assert list(gguf.tqdm(range(3), desc="reading")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert gguf.tqdm is bar
