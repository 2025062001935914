"""`benchmarks/gpu.py`, tried on the CPU with shapes that say nothing: all parts run, and what they say is so."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # they are scripts, not a package

import gpu
import gpu_parts
import gpu_training

SCRIPT = gpu.HERE / "gpu.py"


@pytest.fixture
def bench() -> Any:
    return gpu_parts.Bench("cpu", True, 128, 2, 1.0, 1)


def results(tmp_path) -> Any:
    return gpu.Results(tmp_path / "gpu.json", {"card": "none"})


@pytest.mark.slow
def test_the_whole_script_on_tiny_shapes(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--out", str(file), "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["ended"] == "all parts"
    rows = found["rows"]
    assert not [row for row in rows if row["part"] == "failed"]
    assert len([row for row in rows if row["part"] == "rate"]) == 3
    equality = [row for row in rows if row["part"] == "equality"]
    assert len(equality) == 6
    assert all(row["holds"] for row in equality)
    exact = [row for row in equality if row["name"].endswith("line, float32")]
    assert len(exact) == 2
    assert max(row["logprob_most"] for row in exact) < 1e-5
    trained = {row["name"]: row for row in rows if row["part"] == "training"}
    assert {"8B sft trivium", "8B dpo trivium", "8B sft trivium recompute", "8B sft trivium compiled"} <= set(trained)
    assert {"8B sft TRL", "8B dpo TRL", "8B sft TRL unpadded"} <= set(trained)
    for row in trained.values():
        assert row.get("loss_apart", 0.0) < 1e-3, row["name"]
        assert row["tokens_per_second"] > 0
    assert len(found["compared"]) == 2


def test_rows_fill_the_line_and_are_the_same_for_both_tools(bench):
    from trivium.forest import lay_out

    for step in range(3):
        docs = gpu_parts.documents(bench, step, 0)
        forest = lay_out(gpu_parts.examples_of(bench, "sft", step, 0))
        assert len(forest.tokens) == bench.line
        assert [e.sequences[0].tokens.tolist() for e in forest.examples] == [d.tolist() for d in docs]
        assert len(forest.source) == bench.line
    two = gpu_parts.examples_of(bench, "dpo", 0, 0)
    forest = lay_out(two)
    assert 0 < len(forest.tokens) <= bench.line
    alone = sum(len(s.inputs) for e in two for s in e.sequences)
    assert len(forest.tokens) < alone
    assert sum(t for t, _ in gpu_parts.rows_tokens(bench, "dpo", 0)) > alone  # of both lines of the step


def test_the_arithmetic_is_what_a_step_computes(bench):
    """The matrix products of a pass as they are recorded; attention is left out on both sides."""
    from trivium.forest import lay_out
    from trivium.profile_shares import STEP, events_of, shares_of

    model = gpu_parts.with_lora(gpu_parts.made(bench, "8B", "float32"), "float32")
    forest = lay_out(gpu_parts.examples_of(bench, "sft", 0, 0))
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    with model.laid_out("forest"), profiler, torch.profiler.record_function(STEP):
        model.logprob(forest).sum().backward()
    products = shares_of(events_of(profiler)).products
    found = sum(product.flop * count for product, count in products.items())
    expected = gpu_parts.step_flop(bench.shapes["8B"], "sft", len(forest.tokens), 0, len(forest.source))
    assert 0.85 < found / expected <= 1.0, products


def test_a_part_that_fails_or_hangs_is_a_row_and_the_others_go_on(bench, tmp_path, capsys):
    found = results(tmp_path)

    def breaks():
        yield {"part": "rate", "name": "one", "flops": 1e12}
        raise RuntimeError("CUDA error: something\nmore")

    def hangs():
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("the end of its time is no mistake of its own")
        yield {}

    def skips():
        raise gpu_parts.Skipped("trl is not installed")
        yield {}

    for name, run in (("breaks", breaks), ("hangs", hangs), ("skips", skips)):
        gpu.guarded(found, bench, name, 0.3, run)
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["part"]) for row in rows] == [
        ("one", "rate"), ("breaks", "failed"), ("hangs", "failed"), ("skips", "skipped"),
    ]  # fmt: skip
    assert rows[1]["reason"] == "RuntimeError: CUDA error: something"
    assert rows[2]["reason"].startswith("took too long")
    assert found.best == 1e12
    assert "trl is not installed" in capsys.readouterr().out


def test_a_first_loss_that_differs_is_told(bench, tmp_path, capsys):
    found = results(tmp_path)
    steps = gpu_training.Steps(bench)
    steps.warm, steps.seconds, steps.losses = [1.0, 1.0], [0.5], [5.0, 5.0, 5.0]
    row = steps.report(gpu_parts.Case("8B", "sft"), lambda n: (128, 1000, 128), 1e9)
    found.add(row)
    found.add({**row, "name": "8B sft TRL", "tool": "TRL", "losses": [5.2, 5.0, 5.0], "tokens_per_second": 1.0})
    said = capsys.readouterr().out
    assert "ITS FIRST LOSS DIFFERS by 4.0%" in said
    assert found.compared()[0].startswith("8B sft trivium : 8B sft TRL")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()
