"""What a stage's folder tells about itself, and what is told at the end of a run: ``summary.json`` and the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.files import sha256_json
from trivium.stages import identity_settings
from trivium.train.log import size

if TYPE_CHECKING:
    from trivium.recipe import Stage
    from trivium.start import Link

SUMMARY = "summary.json"

SHOWN = (
    "name", "stage", "method", "trained_parameters", "total_parameters", "bytes_on_disk", "seconds", "setup_seconds",
    "reference_seconds", "eval_seconds", "save_seconds", "tokens", "trained_tokens", "tokens_per_second",
    "peak_memory_bytes", "metrics",
)  # fmt: skip


def stage_identity(parent: Link, data: dict[str, Any], stage: Stage) -> str:
    """A hash of all that can change a stage's result."""
    return sha256_json({"parent": parent.identity, "data": data, "settings": identity_settings(stage)})


def stage_record(
    stage: Stage,
    parent: Link,
    final: Path,
    identity: str,
    base: dict[str, Any] | None,
    data: dict[str, Any],
    report: dict[str, Any],
) -> dict[str, Any]:
    """``trivium.json`` of the folder ``final``; ``report`` is what the stage tells of its training."""
    from trivium.folder import relative

    own = {"name": stage.name, "stage": stage.stage, "method": (stage.method or {})["name"], "identity": identity}
    return {
        "trivium": 1,
        **own,
        "parent": {
            "path": relative(parent.source, final) if Path(parent.source).exists() else parent.source,
            "source": parent.source,
            "identity": parent.identity,
        },
        "base": base,
        "data": data,
        "settings": stage.model_dump(by_alias=True, exclude_none=True),
        **report,
        "lineage": [*parent.lineage, own],
    }


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in SHOWN}


def table(summary: dict[str, Any]) -> str:
    """The end-of-run table, as plain text for a terminal; columns that would be empty are left out."""
    head = ("stage", "method", "trained", "seconds", "tokens/s", "memory", "on disk", "eval loss", "accuracy",
            "bits/byte")  # fmt: skip
    rows = [head]
    for s in summary["stages"]:
        m = s["metrics"]
        known = s.get("text_bits_per_byte") or {}
        rows.append(
            (s["name"], s["method"], f"{s['trained_parameters']:,}", f"{s['seconds']:.0f}",
             f"{s['tokens_per_second']:,.0f}", size(s["peak_memory_bytes"]), size(s["bytes_on_disk"]),
             _change(m.get("before_loss"), m.get("after_loss")),
             _change(m.get("before_accuracy"), m.get("after_accuracy"), ".0%"),
             _change(known.get("before"), known.get("after")))
        )  # fmt: skip
    filled = [c for c in range(len(head)) if any(row[c] != "-" for row in rows[1:])]
    return aligned([[row[c] for c in filled] for row in rows], left=2)


def _change(before: float | None, after: float | None, form: str = ".3f") -> str:
    if after is None:
        return "-"
    return f"{after:{form}}" if before is None else f"{before:{form}}→{after:{form}}"


def aligned(rows: list[list[str]], left: int) -> str:
    """Rows of words as columns, the first ``left`` of them to the left, the others to the right."""
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join(v.ljust(w) if c < left else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
