"""A run's folder made by hand, as small as one can be that has everything a report shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trivium.summary import SHOWN

PARENT = {"base": None, "chat": "base", "aligned": "chat"}
EVIL = "<script>alert('x')</script> & \"quotes\" <img src=https://example.com/x.png>"


def record(name: str, stage: str, lineage: list[dict[str, Any]], accuracy: bool) -> dict[str, Any]:
    own = {"name": name, "stage": stage, "method": "lora" if name != "base" else "full", "identity": f"{name}-id" * 4}
    metrics = {"before_loss": 2.5, "after_loss": 1.25}
    if accuracy:
        metrics |= {"before_accuracy": 0.5, "after_accuracy": 0.75}
    numbers = {key: 1000.0 for key in SHOWN if key not in ("name", "stage", "method", "metrics")}
    return {
        **numbers, **own, "trained_parameters": 12345, "total_parameters": 67890, "tokens": 4321, "metrics": metrics,
        "lineage": [*lineage, own], "settings": {"device": "cpu", "learning_rate": 0.001, "method": {"name": "full"}},
        "rows": {"read": 10, "used": 8, "set_aside": 2, "over_long": 0, "reasons": {EVIL: 2}},
        "versions": {"torch": "2.13.0", "threads": "2"}, "data": {"paths": "rows.jsonl"},
        "proof": {"layout": "forest", "refused": []},
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run("name")`` writes a run of three stages into a folder and returns it."""

    def write(path: Path, value: Any) -> None:
        path.write_text(json.dumps(value), encoding="utf-8")

    def make(folder: str = "run", judged: bool = True, steps: int = 30) -> Path:
        out = tmp_path / folder
        lineage = [{"name": "new", "stage": "random weights", "method": None, "identity": "new-id"}]
        stages, models = [], {}
        for name, parent in PARENT.items():
            kind = {"base": "pretrain", "chat": "sft", "aligned": "preference"}[name]
            made = record(name, kind, lineage, name == "aligned")
            lineage = made["lineage"]
            (out / name).mkdir(parents=True)
            write(out / name / "trivium.json", made)
            rows = [{"step": 0, "eval_loss": 2.5, "eval_met": 0.1, "eval_accuracy": 0.5}]
            rows += [{"step": n, "loss": 2.5 - n / steps} for n in range(1, steps + 1)]
            rows += [{"step": steps, "eval_loss": 1.25, "eval_met": 0.8, "eval_accuracy": 0.75}]
            text = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n"
            (out / name / "metrics.jsonl").write_text(text, encoding="utf-8")
            share = {"share": 0.8, "low": 0.74, "high": 0.85, "met": 160, "of": 200}
            seen = {"judged": {"met": share, "length": {"value": 12.5}}} if judged else {}
            bits = {"text_bits_per_byte": {"before": 2.75, "after": 1.5}} if judged else {}
            stages.append({**{key: made[key] for key in SHOWN}, "from": parent, **seen, **bits})
            models[name] = {"identity": made["identity"], "answers": [f"{name} says {EVIL}", None], **seen}
        write(out / "summary.json", {"name": "try", "seed": 7, "stages": stages})
        write(out / "measures.json", {"key": "k", "prompts": [EVIL, "second"], "texts": 3, "models": models})
        return out

    return make
