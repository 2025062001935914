"""A proof is remembered by all that it depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.model.test_families import config_of, pair

from trivium import proven as proven_module
from trivium.data.cache import cache_folder
from trivium.forest import Example, TokenSequence
from trivium.proven import proven


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """How often it was really proved."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    calls: list[int] = []
    prove = proven_module.prove

    def counting(model, rows):
        calls.append(len(rows))
        return prove(model, rows)

    monkeypatch.setattr(proven_module, "prove", counting)
    return calls


def rows(seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example((TokenSequence(rng.integers(0, 90, n), np.ones(n, np.float32)),)) for n in (12, 30)]


def test_it_is_made_once(counted):
    model, _ = pair(config_of("llama"))
    first, before = proven(model, rows(), ["parent", {"r": 4}, 0])
    assert not before
    again, before = proven(model, rows(), ["parent", {"r": 4}, 0])
    assert before
    assert again == first
    assert counted == [2]


def test_whatever_is_otherwise_is_proved_anew(counted, monkeypatch):
    model, _ = pair(config_of("llama"))
    proven(model, rows(), ["parent", {"r": 4}, 0])
    assert not proven(model, rows(1), ["parent", {"r": 4}, 0])[1], "other rows"
    assert not proven(model, rows(), ["another", {"r": 4}, 0])[1], "other weights"
    assert not proven(model, rows(), ["parent", {"r": 8}, 0])[1], "another method"
    assert not proven(model, rows(), None)[1], "weights that nobody can name"
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert not proven(model, rows(), ["parent", {"r": 4}, 0])[1], "another sum of the same numbers"
    monkeypatch.undo()


def test_other_code_proves_anew(counted, monkeypatch):
    model, _ = pair(config_of("llama"))
    proven(model, rows(), ["parent"])
    monkeypatch.setattr(proven_module, "_code", lambda: "edited")
    assert not proven(model, rows(), ["parent"])[1]


def test_a_damaged_one_is_not_believed(counted):
    model, _ = pair(config_of("llama"))
    proven(model, rows(), ["parent"])
    (file,) = cache_folder("proofs").glob("*/proof.json")
    file.write_text(file.read_text().replace("forest", "single"))
    found, before = proven(model, rows(), ["parent"])
    assert not before
    assert found.layout == "forest"
