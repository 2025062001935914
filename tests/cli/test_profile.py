"""``trivium run --profile``: a table for each stage that is trained, and the same run."""

from __future__ import annotations

import json
import re

from tests.cli.conftest import LORA, SHORT

STAGES = [
    {"name": "base", "stage": "pretrain", "data": "text.jsonl", **SHORT},
    {"name": "chat", "stage": "sft", "from": "base", "data": "chats.jsonl", "method": LORA, **SHORT, "max_steps": 6},
]
KINDS = [
    "matrix products", "attention", "log-probabilities", "element-wise", "optimizer", "data", "Python and dispatch",
]  # fmt: skip


def test_profile_tells_where_the_time_goes_and_changes_nothing(data, tmp_path, trivium, write_recipe):
    stages = [{**stage, "data": str(data / stage["data"])} for stage in STAGES]
    recipe = write_recipe(tmp_path, stages, prompts=[])
    assert trivium("run", recipe, "--out", tmp_path / "plain").code == 0
    done = trivium("run", recipe, "--out", tmp_path / "out", "--profile")
    assert done.code == 0, done.err
    for name, steps in (("base", "steps 1 to 2"), ("chat", "steps 3 to 5")):
        assert f"  where the time of {steps} went (" in done.err
        found = json.loads((tmp_path / "out" / f"profile-{name}.json").read_text(encoding="utf-8"))
        assert list(found["seconds_by_kind"]) == KINDS
        records = [json.loads((tmp_path / run / name / "trivium.json").read_text()) for run in ("plain", "out")]
        assert records[0]["identity"] == records[1]["identity"]
        weights = [next((tmp_path / run / name).glob("*.safetensors")).read_bytes() for run in ("plain", "out")]
        assert weights[0] == weights[1]
    for kind in KINDS:
        assert len(re.findall(rf"^    {kind} +\d+\.\d%  +\d+\.\d+ s$", done.err, re.MULTILINE)) == 2
    assert (
        len(re.findall(r"^    the products alone, replayed: \d+\.\d+ s = \d+% of steps", done.err, re.MULTILINE)) == 2
    )
    assert "profiler_start" not in done.err
    again = trivium("run", recipe, "--out", tmp_path / "out", "--profile")
    assert again.err.count("not run again, so there is nothing to profile") == 2
    assert not list((tmp_path / "plain").glob("profile*"))
