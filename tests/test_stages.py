"""The table of stages: what is filled in, what is inherited, and what makes a stage another stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trivium.errors import RecipeError
from trivium.recipe import Recipe, Stage
from trivium.recipe_file import parse_recipe
from trivium.stages import STAGES, identity_settings, resolve

KINDS = {"pretrain": "text", "sft": "conversation", "preference": "pair", "reward": "pair"}


def recipe(stage: str = "sft", **more: Any) -> Recipe:
    import json

    value = {
        "name": "x",
        "seed": 5,
        "model": "owner/name",
        "stages": [{"name": "a", "stage": stage, "data": "d", **more}],
    }
    return parse_recipe(json.dumps(value), Path("/r.yaml"))


def resolved(stage: str = "sft", parent: dict[str, Any] | None = None, **more: Any) -> tuple[Stage, list[str]]:
    one = recipe(stage, **more)
    return resolve(one.stages[0], one, parent, "before")


def test_the_rows_of_each_stage():
    assert {name: kind.rows for name, kind in STAGES.items()} == KINDS


@pytest.mark.parametrize("stage", KINDS)
def test_everything_that_is_left_out_is_filled_in_and_said(stage):
    full, lines = resolved(stage)
    assert full.method == {"name": "full"}
    assert full.seed == 5
    for key, value in STAGES[stage].defaults.items():
        assert getattr(full, key) == value
        assert any(f"{key} " in line for line in lines), f"{key} is not said"
    assert lines[-1].startswith(f"defaults of {stage}:")


def test_what_is_given_is_neither_replaced_nor_said():
    full, lines = resolved("sft", learning_rate=3e-3, max_steps=7, batch_tokens=99, seed=9, device="cpu")
    assert (full.learning_rate, full.max_steps, full.batch_tokens, full.seed) == (3e-3, 7, 99, 9)
    assert full.epochs is None
    assert full.batch_size is None
    said = " ".join(lines)
    assert not any(f" {key} " in said for key in ("learning_rate", "epochs", "batch_size", "device"))


def test_a_stage_inherits_what_goes_with_the_model():
    method = {"name": "lora", "r": 4}
    parent = {"method": method, "dtype": "bfloat16", "device": "cpu", "learning_rate": 0.5, "epochs": 9.0}
    full, lines = resolved("sft", parent)
    assert full.method == method
    assert full.dtype == "bfloat16"
    assert full.epochs == STAGES["sft"].defaults["epochs"], "only what goes with the model is inherited"
    assert lines[0].startswith("from before:")
    assert "method lora (r 4)" in lines[0]


def test_naming_the_parents_method_goes_on_with_its_settings():
    parent = {"method": {"name": "lora", "r": 4}}
    assert resolved("sft", parent, method="lora")[0].method == {"name": "lora", "r": 4}
    assert resolved("sft", parent, method={"name": "lora", "r": 8})[0].method == {"name": "lora", "r": 8}
    assert resolved("sft", parent, method="full")[0].method == {"name": "full"}


def test_an_adapters_default_rate_is_higher():
    rates = [resolved("sft", method=m)[0].learning_rate for m in ("full", "lora", "bottleneck")]
    assert rates[1] == rates[2] == pytest.approx(10 * rates[0])
    assert resolved("sft", method="lora", learning_rate=1e-5)[0].learning_rate == 1e-5


def test_muon_is_for_full_training():
    with pytest.raises(RecipeError, match=r"stages\.a\.optimizer: muon"):
        resolved("pretrain", {"method": {"name": "lora"}}, optimizer="muon")
    assert resolved("pretrain", optimizer="muon")[0].optimizer == "muon"


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ({"learning_rate": 0.1}, True), ({"max_steps": 3}, True), ({"seed": 6}, True), ({"method": "lora"}, True),
        ({"max_length": 9}, True), ({"train_on": "all"}, True), ({"eval_data": 0.3}, True), ({"dropout": 0.1}, True),
        ({"dtype": "bfloat16"}, True), ({"batch_size": 3}, True),
        ({"data": "elsewhere"}, False), ({"name": "b"}, False), ({"device": "cpu"}, False), ({"eval_every": 3}, False),
        ({"micro_batch_tokens": 77}, False), ({"recompute": "layers"}, False), ({"bad_rows": 0.5}, False),
        ({"eval_data": 0.05}, False), ({"seed": 5}, False),
    ],
)  # fmt: skip
def test_what_makes_a_stage_another_one(change, another):
    plain = identity_settings(resolved("sft")[0])
    assert (identity_settings(resolved("sft", **change)[0]) != plain) == another
