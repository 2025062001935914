"""`benchmarks/growth.py`, tried with shapes that say nothing: what it writes, and the arithmetic behind its curves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # they are scripts, not a package

import growth

# one layer: q 4x4, k and v 4x2, o 4x4, gate and up 4x8, down 8x4: 144 weights, of which q, k and v are 32
SIZES = {
    "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 8,
}  # fmt: skip
T, K, R, PAIRS = 6, 3, 2, 21  # six tokens of one sequence see 1 + 2 + ... + 6
HEAD, SCORES = 2 * 2 * K * 4 * 10, 2 * 4 * PAIRS
IN, OUT = 4 + 4 + 4 + 4 + 4 + 4 + 8, 4 + 2 + 2 + 4 + 8 + 8 + 4


def counted(layers: int, top: int | None = None) -> int:
    return growth.step_flop(SIZES, growth.Point((T,), layers, 10, R, top), T, K, PAIRS)


def test_one_layer_by_hand() -> None:
    base = 2 * T * 144 + 2 * T * (144 - 32)  # nothing flows on below q, k and v
    thin = 2 * T * R * (2 * IN + 3 * OUT) + 2 * T * R * (IN - 12)
    assert counted(1) == base + thin + 7 * SCORES + HEAD


def test_a_frozen_layer_below_the_lowest_costs_its_forward_alone() -> None:
    assert counted(3, top=1) - counted(2, top=1) == 2 * T * 144 + 2 * SCORES
    assert counted(2, top=2) == counted(2)
    assert counted(3) - counted(2) == 2 * 2 * T * 144 + 2 * T * R * (3 * IN + 3 * OUT) + 7 * SCORES


@pytest.mark.parametrize("name", ["answers", "layers"])
def test_the_arithmetic_is_what_a_step_computes(name: str) -> None:
    """The products as they are recorded; attention is left out on both sides."""
    from trivium.forest import lay_out
    from trivium.profile_shares import STEP, events_of, shares_of

    curve = growth.CURVES[name]
    point = curve.point(growth.QUICK, curve.quick[0] + 1)
    model, forest = growth.model_of(growth.QUICK.sizes, point), lay_out(growth.examples_of(point))
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    with model.laid_out("forest"), profiler, torch.profiler.record_function(STEP):
        model.logprob(forest).sum().backward()
    products = shares_of(events_of(profiler)).products
    found = sum(product.flop * count for product, count in products.items())
    expected = growth.step_flop(growth.QUICK.sizes, point, len(forest.tokens), len(forest.source), 0)
    assert 0.95 < found / expected < 1.05, products


def test_the_steps_are_as_long_as_their_curves_say() -> None:
    from trivium.forest import lay_out

    def line(name: str, at: int) -> tuple[int, int]:
        forest = lay_out(growth.examples_of(growth.CURVES[name].point(growth.FULL, at)))
        return len(forest.tokens), len(forest.source)

    assert line("length", 8192) == (8192, 4096)
    assert line("pass", 64) == (64, 32)
    assert line("pass", 4096) == (4096, 2048)
    assert line("answers", 16) == (400 + 16 * 50, 16 * 50)
    assert line("vocabulary", 1024) == (512, 512)


def test_a_point_off_the_curve_is_not_explained() -> None:
    points: list[dict[str, Any]] = [{"at": n, "flop": n, "seconds": [9.0, n, 0.0]} for n in (1, 2, 4)]
    points.append({"at": 8, "flop": 8, "seconds": [11.0]})
    found = growth.explain(points)
    assert [p["explained"] for p in found] == [True, True, True, False]
    assert [p["expected"] for p in found] == [1, 2, 4, 8]
    assert found[-1]["ratio"] == pytest.approx(11 / 8)


def test_two_curves_of_the_whole_script(tmp_path: Path) -> None:
    command = [sys.executable, growth.__file__, "--quick", "--curves=rank,layers", "--threads=1", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert list(found["curves"]) == ["rank", "layers"]
    for name, curve in found["curves"].items():
        assert [p["at"] for p in curve["points"]] == list(growth.CURVES[name].quick)
        assert all(len(p["seconds"]) == 3 and p["bytes"] > 0 for p in curve["points"])
    text = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert text.count("| ratio |") == 2
    assert (tmp_path / "growth.png").exists() == ("growth.png" in text)
    assert (tmp_path / "growth.png").exists() or "no picture" in done.stdout


def test_a_curve_whose_process_fails_says_why(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(growth, "points_of", lambda *_: ([], "MemoryError: none is left"))
    assert growth.main(["--curves=rank", f"--out={tmp_path}"]) == 1
    assert "ended there: MemoryError: none is left" in capsys.readouterr().out
