"""The report's tables: what each stage cost and gave, the answers side by side, settings, versions, data counts."""

from __future__ import annotations

from typing import Any

from trivium.planning.kept import beside
from trivium.report.figures import colours
from trivium.report.gather import RunView
from trivium.summary import cost_table, happened
from trivium.terminal import clock, size


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
    """The cost-and-quality table: its ``head``, and ``rows`` of cells with their stage's colour."""
    tints = colours(runs)
    stages = [(run, stage) for run in runs for stage in run.stages]
    named = [{**s.summary, "name": f"{run.label}: {s.name}" if len(runs) > 1 else s.name} for run, s in stages]
    head, rows = cost_table(named, wide=True)
    shown = [
        {"cells": row, "colour": tints[str(run.folder), s.name]} for (run, s), row in zip(stages, rows, strict=True)
    ]
    return {"head": head, "rows": shown}


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


def duels(runs: list[RunView]) -> list[dict[str, Any]]:
    """Of each preference stage its answers against its parent's: ``{"name", "line", "duels"}``, see `duels_of`."""
    found = []
    for run in runs:
        for stage in run.stages:
            if isinstance(seen := stage.measured.get("against"), dict):
                name = f"{run.label}: {stage.name}" if len(runs) > 1 else stage.name
                found.append({"name": name, "line": str(seen["line"]), "duels": duels_of(seen)})
    return found


def duels_of(seen: dict[str, Any]) -> list[dict[str, str]]:
    """Each prompt with both answers and the verdict, what differs first: ``{"prompt", "old", "new", "won"}``."""
    verdicts = (seen.get("won") or {}).get("verdicts") or [None] * len(seen["duels"])
    words = {1.0: "new", 0.5: "a tie", 0.0: "old", None: ""}
    told = [
        {"prompt": _conversation(duel["prompt"]), "old": str(duel["old"]), "new": str(duel["new"]),
         "won": "unchanged" if duel["old"] == duel["new"] else words[verdict]}
        for duel, verdict in zip(seen["duels"], verdicts, strict=True)
    ]  # fmt: skip
    return sorted(told, key=lambda duel: duel["won"] == "unchanged")


def _conversation(messages: Any) -> str:
    said = [(str(m["role"]), str(m.get("content") or "")) for m in messages]
    return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {text}" for role, text in said)


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
                    ("on the way", [("", told) for told in happened(r)]),
                    ("the plan", [("", told) for told in beside(stage.summary)]),
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
