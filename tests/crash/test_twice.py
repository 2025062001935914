"""Promise 15: the same seed gives the same run, to the last bit, and another seed another."""

from __future__ import annotations

import pytest
from tests.crash.process import CELLS, Process, result

QUICK = ("sft-bottleneck", "preference-lora")


@pytest.mark.promise(15)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CELLS])
def test_the_same_seed_is_the_same_run(name, cell, tried):
    """In two processes and two folders: weights, moments, random state, each step's numbers and the file written."""
    recipes = [cell(name), cell(name), cell(name, seed=2)]
    for recipe in recipes:
        ended = Process(recipe).wait()
        assert ended.code == 0, ended.said
    one, two, other = map(result, recipes)
    assert one == two
    assert one["rows"] != other["rows"]
    assert one["state"]["weights.safetensors"] != other["state"]["weights.safetensors"]
    tried(pairs_of_runs=1, steps_compared=len(one["rows"]))
