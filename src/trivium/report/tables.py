"""The report's tables: what each stage cost and gave, the answers side by side, settings, versions, data counts."""

from __future__ import annotations

from typing import Any

from trivium.report.figures import colours
from trivium.report.gather import RunView, StageView
from trivium.train.log import clock, size

Cell = dict[str, str]


def facts(run: RunView) -> list[tuple[str, str]]:
    """A run in a few words."""
    records = [stage.record for stage in run.stages]
    device = ", ".join(dict.fromkeys(str(r["settings"].get("device")) for r in records))
    spent = sum(sum(r[k] for k in ("seconds", "setup_seconds", "eval_seconds", "save_seconds")) for r in records)
    versions = records[-1]["versions"]
    return [
        ("parameters", f"{max(r['total_parameters'] for r in records):,}"),
        ("tokens trained on", f"{sum(r['tokens'] for r in records):,}"),
        ("time in stages", clock(spent)),
        ("peak memory", size(max(r["peak_memory_bytes"] for r in records))),
        ("on", f"{device}, {versions.get('threads', '?')} threads"),
        ("seed", str(run.seed)),
    ]


def cost_rows(runs: list[RunView]) -> dict[str, Any]:
    """The cost-and-quality table: ``head`` and ``rows`` of text; columns that no stage fills are left out."""
    head = ["stage", "method", "trained", "seconds", "tokens/s", "peak memory", "on disk"]
    head += ["held-out loss", "accuracy"]
    keys = list(dict.fromkeys(key for run in runs for stage in run.stages for key in stage.judged_keys()[:1]))
    head += [*keys, "bits per byte"]
    tints = colours(runs)
    rows = []
    for run in runs:
        for stage in run.stages:
            r, m = stage.record, stage.record["metrics"]
            share = r["trained_parameters"] / max(1, r["total_parameters"])
            cells = [
                stage.name, f"{r['stage']}, {r['method']}", f"{r['trained_parameters']:,} ({share:.1%})",
                f"{r['seconds']:,.0f}", f"{r['tokens_per_second']:,.0f}", size(r["peak_memory_bytes"]),
                size(r["bytes_on_disk"]), _change(m.get("before_loss"), m.get("after_loss")),
                _change(m.get("before_accuracy"), m.get("after_accuracy"), "%"),
            ]  # fmt: skip
            cells += [_verdict(stage, key) for key in keys]
            cells.append(_change(run.before(stage).get("bits_per_byte"), stage.measured.get("bits_per_byte")))
            if len(runs) > 1:
                cells[0] = f"{run.label}: {stage.name}"
            rows.append({"cells": cells, "colour": tints[str(run.folder), stage.name]})
    filled = [c for c in range(len(head)) if any(row["cells"][c] for row in rows)]
    return {"head": [head[c] for c in filled],
            "rows": [{**row, "cells": [row["cells"][c] for c in filled]} for row in rows]}  # fmt: skip


def _change(before: float | None, after: float | None, unit: str = "") -> str:
    if not isinstance(after, (int, float)):
        return ""
    shown = (lambda v: f"{v:.0%}") if unit == "%" else (lambda v: f"{v:.3f}")
    return f"{shown(before)} → {shown(after)}" if isinstance(before, (int, float)) else shown(after)


def _verdict(stage: StageView, key: str) -> str:
    found = stage.measured.get("judged", {}).get(key)
    if not found:
        return ""
    if "share" not in found:
        return f"{found['value']:.4g}"
    return f"{found['share']:.0%} ({found['low']:.0%}–{found['high']:.0%})"


def answers(runs: list[RunView]) -> list[dict[str, Any]]:
    """Each prompt with every model's answer: ``{"prompt", "answers": [{"name", "colour", "text"}]}``."""
    tints = colours(runs)
    found: list[dict[str, Any]] = []
    for run in runs:
        tag = f"{run.label}: " if len(runs) > 1 else ""
        models = [("the given model", "plain", run.start)] if run.start else []
        models += [(s.name, tints[str(run.folder), s.name], s.measured) for s in run.stages]
        for n, prompt in enumerate(run.prompts):
            same = next((one for one in found if one["prompt"] == prompt), None)
            if same is None:
                found.append(same := {"prompt": prompt, "answers": []})
            for name, tint, measured in models:
                texts = measured.get("answers") or []
                if n < len(texts):
                    text = texts[n] if texts[n] is not None else "(the prompt does not fit this model)"
                    same["answers"].append({"name": f"{tag}{name}", "colour": tint, "text": text})
    return found


def settings_rows(runs: list[RunView]) -> list[dict[str, Any]]:
    """For each stage: its data counts, settings, versions, proof and costs, as pairs of text."""
    found = []
    for run in runs:
        for stage in run.stages:
            r, rows = stage.record, stage.record["rows"]
            data = [(k.replace("_", " "), f"{v:,}" if isinstance(v, int) else str(v)) for k, v in rows.items()
                    if k != "reasons" and (v or k in ("read", "used", "set_aside"))]  # fmt: skip
            data += [(f"set aside: {reason}", f"{n:,}") for reason, n in rows.get("reasons", {}).items()]
            proof = r.get("proof") or {}
            proved = [(k.replace("_", " "), _said(v)) for k, v in proof.items() if v not in ((), [])]
            costs = [(k.replace("_", " "), f"{r[k]:.1f}") for k in r if k.endswith("seconds")]
            found.append({
                "name": f"{run.label}: {stage.name}" if len(runs) > 1 else stage.name,
                "identity": r["identity"],
                "groups": [
                    ("data", [("files", _said(r["data"].get("paths"))), *data]),
                    ("settings", [(k, _said(v)) for k, v in r["settings"].items() if k not in ("name", "data")]),
                    ("proof", proved), ("seconds", costs), ("versions", list(r["versions"].items())),
                ],
            })  # fmt: skip
    return found


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
