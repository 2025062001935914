"""The benchmarks' own arithmetic: what the limit counts, whose turn it is, what counts as the same rows."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # they are scripts, not a package

import bench
import environments
import limit
import results
import rows
import shared
import table
from jobs import JOBS, SETTINGS, job_of

# one layer: q 4x4, k and v 4x2, o 4x4, gate and up 4x8, down 8x4: 4*4 + 2*4*2 + 4*4 + 3*4*8 = 144 weights; 10 words
TINY = {
    "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8,
    "num_hidden_layers": 1, "vocab_size": 10,
}  # fmt: skip
T, K, R = 6, 3, 2


def counted(trained: str, kind: str = "sft", layers: int = 1) -> int:
    return limit.flop(limit.products({**TINY, "num_hidden_layers": layers}, T, K, trained, R, kind))


def test_full_training_needs_three_products_of_every_matrix() -> None:
    assert counted("full") == 3 * 2 * T * 144 + 3 * 2 * K * 4 * 10


def test_lora_needs_no_gradient_of_frozen_weights_nor_below_its_lowest_module() -> None:
    head = 2 * 2 * K * 4 * 10
    lowest = 4 * 4 + 2 * 4 * 2  # q, k and v of the first layer: nothing is trained below them
    base = 2 * T * 144 + 2 * T * (144 - lowest)
    narrow, wide = 4 + 4 + 4 + 4 + 4 + 4 + 8, 4 + 2 + 2 + 4 + 8 + 8 + 4  # widths in and out of the seven
    # both thin matrices forward and their gradients, between them, and onward from all but q, k and v
    thin = 2 * T * R * (narrow + wide + wide + wide + narrow) + 2 * T * R * (narrow - 12)
    assert counted("lora") == base + thin + head
    second = 2 * 2 * T * 144 + 2 * T * R * (3 * narrow + 3 * wide)
    assert counted("lora", layers=2) == base + thin + second + head
    assert counted("qlora") == counted("lora")


def test_a_bottleneck_needs_nothing_of_the_first_layer_but_forward() -> None:
    thin = 5 * 2 * T * 4 * R  # the last of the six would flow on below
    assert counted("bottleneck") == 2 * T * 144 + thin + 2 * 2 * K * 4 * 10


def test_dpo_needs_one_more_forward_for_its_reference() -> None:
    assert counted("lora", "dpo") - counted("lora") == 2 * T * 144 + 2 * K * 4 * 10


def test_the_limit_is_replayed() -> None:
    task = {"config": TINY, "passes": [[(T, K)], [(2 * T, K), (T, K)]], "trained": "lora", "r": R, "kind": "dpo"}
    found = limit.limit(task)
    assert found["seconds"] > 0
    wider = limit.flop(limit.products(TINY, 2 * T, K, "lora", R, "dpo"))
    assert found["gflop"] * 1e9 == pytest.approx(2 * counted("lora", "dpo") + wider)


def test_every_other_round_goes_the_other_way() -> None:
    assert list(shared.in_turns("abc", 3)) == [(0, c) for c in "abc"] + [(1, c) for c in "cba"] + [
        (2, c) for c in "abc"
    ]


def test_after_the_first_round_the_fastest_and_the_leanest_setting_of_a_peer_take_turns_with_ours() -> None:
    job = replace(job_of("sft-lora"), peers={"trl": ("padded", "single", "single lean")})
    everyone = bench.entrants_of(job, ["trl"], quick=False)
    cost = {"": (1, 1), "padded": (9, 9), "single": (3, 5), "single lean": (4, 2)}
    found = {one: results.Found() for one in everyone}
    turns = []
    for number, one in bench.rounds(job, everyone, found, 2):
        turns.append((number, one.name if one else "limit"))
        if one:
            found[one].runs.append(dict(zip(("seconds", "peak_bytes"), cost[one.how], strict=True)))
    first = [(0, n) for n in ("trivium", "trl, padded", "trl, single", "trl, single lean", "limit")]
    assert turns == first + [(1, n) for n in ("trl, single lean", "trl, single", "limit", "trivium")]


def test_rows_are_the_same_whatever_their_order_and_others_are_not() -> None:
    a, b = {"ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"ids": [4, 5], "labels": [-100, 5]}
    assert bench.rows_digest([[a], [b]]) == bench.rows_digest([[b, a]])
    assert bench.rows_digest([[a]]) != bench.rows_digest([[{**a, "labels": [-100, -100, 3]}]])
    ready = rows.Prepared(Path(), "m", [[a], [b]], [[(2, 2)], [(1, 1)]], [1.0, 0.5], "", {})
    bench.check_tokens(results.Entrant("trl", "single"), {"sha256": bench.rows_digest([[b], [a]])}, ready)
    bench.check_tokens(results.Entrant("trivium"), {"counts": [[2, 2], [1, 1]]}, ready)
    for told in ({"sha256": bench.rows_digest([[a]])}, {"counts": [[2, 2], [1, 2]]}):
        with pytest.raises(shared.Failed, match="other tokens"):
            bench.check_tokens(results.Entrant("trl", "single"), told, ready)


def test_a_peer_that_cannot_be_had_does_not_end_the_benchmark(monkeypatch: Any, tmp_path: Path) -> None:
    def no_way(*_: Any, **more: Any) -> Any:
        raise shared.Failed("trl cannot be installed: no network")

    monkeypatch.setattr(bench, "python_of", no_way)
    monkeypatch.setattr(bench, "limit_of", lambda *_: {"seconds": 1.0, "gflop": 1.0, "gflops": 1.0})
    ready = rows.Prepared(tmp_path, "m", [[{"ids": [1], "labels": [1]}]], [[(1, 1)]], [1.0], "", {})
    asked = argparse.Namespace(peers=["trl"], quick=False, runs=2, threads=1)
    told = bench.measured(job_of("sft-lora"), ready, asked, tmp_path)
    assert {t["error"] for t in told["tools"]} == {"trl cannot be installed: no network"}
    assert "trl, single | trl cannot be installed" in table.markdown([told])


def test_losses_are_compared_step_by_step_or_on_average() -> None:
    assert results.apart([2.0, 1.0], [2.0, 1.1], on_average=False) == pytest.approx(0.1)
    assert results.apart([2.0, 1.0], [1.0, 2.0], on_average=True) == 0
    assert results.apart([2.0, 1.0], [2.0], on_average=False) == 1


def test_the_readme_gets_the_table_between_its_marks() -> None:
    before = "# a\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nrest\n"
    after = table.put_into(before, "| new |\n")
    assert after == "# a\n\n<!-- bench -->\n\n| new |\n\n<!-- /bench -->\n\nrest\n"
    assert table.put_into(after, "| new |\n") == after
    with pytest.raises(shared.Failed, match="no place"):
        table.put_into("# a\n", "| new |\n")


def told(**more: Any) -> dict[str, Any]:
    value = {"median": 2.0, "least": 1.5, "most": 2.5}
    return {"setting": "", "ours": True, "seconds": value, "peak_bytes": {k: v * 1e9 for k, v in value.items()},
            "losses": [1.0, 0.5], "loss_difference": 0.0, "agrees": True, "versions": {}, **more}  # fmt: skip


def test_a_peer_that_failed_is_a_row_with_its_reason() -> None:
    tools = [
        told(tool="trivium"),
        told(tool="trl", setting="single", ours=False, agrees=False, loss_difference=0.1),
        {"tool": "litgpt", "setting": "single", "ours": False, "error": "cannot be installed"},
    ]
    job = {
        "job": "sft-lora", "aim": "≥ 2×", "shown": "seconds", "processor": "P", "threads": 2, "date": "2026-01-01",
        "model": "m", "steps": 2, "rows_in_step": 4, "tokens": 9, "tools": tools,
        "limit": {"seconds": 1.0, "gflop": 5.0, "gflops": 5.0},
    }  # fmt: skip
    text = table.markdown([job])
    assert "| sft-lora | trivium | 2.0 (1.5–2.5) | 50% |" in text
    assert "1.00× faster, 1.00× the memory (aim: ≥ 2×)" in text
    assert "(differs by 10.0%)" in text
    assert "| | litgpt, single | cannot be installed |" in text


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_job_is_complete(job: Any) -> None:
    assert job.aim
    assert job.ours
    assert job.rows % job.batch == 0
    assert job.data in rows.SOURCES
    assert job.trained in results.TOLERANCE
    sides = Path(bench.__file__).parent / "sides"
    assert all((sides / f"{peer}_side.py").is_file() for peer in ("trivium", *job.peers))
    assert all(peer in environments.ENVIRONMENTS for peer in job.peers)
    assert all(setting in SETTINGS for settings in job.peers.values() for setting in settings)
    assert bench.entrants_of(job, list(job.peers), quick=True)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_recipes_of_all_jobs_are_recipes(job: Any, tmp_path: Path) -> None:
    from trivium.recipe import Recipe

    for ours in job.ours.values():
        Recipe(**rows.recipe_of(job, ours, "model", tmp_path, 2))


def test_what_a_failed_process_said_last_is_its_reason() -> None:
    assert shared.last_words("a\nerror: no room\n  free some\nb\n", 3) == "error: no room free some"
    assert shared.last_words("Traceback\nValueError: x\n", 1) == "ValueError: x"
    assert shared.last_words("", 9) == "exit code 9"
