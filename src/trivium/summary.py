"""What is told at the end of a run: ``summary.json`` and the table."""

from __future__ import annotations

from typing import Any

from trivium.train.log import size

SHOWN = (
    "name", "stage", "method", "trained_parameters", "total_parameters", "bytes_on_disk", "seconds", "setup_seconds",
    "reference_seconds", "eval_seconds", "save_seconds", "tokens", "trained_tokens", "tokens_per_second",
    "peak_memory_bytes", "metrics",
)  # fmt: skip


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in SHOWN}


def table(summary: dict[str, Any]) -> str:
    """The end-of-run table, as plain text that fits a terminal of 100 columns."""
    head = ("stage", "method", "trained", "seconds", "tokens/s", "memory", "on disk", "held-out loss", "accuracy")
    rows = [head]
    for s in summary["stages"]:
        m = s["metrics"]

        def change(name: str, m: dict[str, float] = m) -> str:
            if f"after_{name}" not in m:
                return "-"
            return f"{m[f'before_{name}']:.3f} -> {m[f'after_{name}']:.3f}"

        rows.append(
            (s["name"], s["method"], f"{s['trained_parameters']:,}", f"{s['seconds']:.0f}",
             f"{s['tokens_per_second']:,.0f}", size(s["peak_memory_bytes"]), size(s["bytes_on_disk"]),
             change("loss"), change("accuracy"))
        )  # fmt: skip
    widths = [max(len(r[c]) for r in rows) for c in range(len(head))]
    left = (0, 1)
    lines = [
        "  ".join(v.ljust(w) if c in left else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
