"""What a stage's folder tells about itself, and what is told at the end of a run: ``summary.json`` and the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.files import sha256_json
from trivium.planning.kept import beside
from trivium.stages import identity_settings
from trivium.terminal import size

if TYPE_CHECKING:
    from trivium.recipe import Stage
    from trivium.start import Link

SUMMARY = "summary.json"

PLACES = ("used", "held_out", "dropped", "over_long", "set_aside")  # of rows

SHOWN = (
    "name", "stage", "method", "trained_parameters", "total_parameters", "bytes_on_disk", "seconds", "setup_seconds",
    "reference_seconds", "eval_seconds", "save_seconds", "tokens", "trained_tokens", "tokens_per_second",
    "peak_memory_bytes", "metrics",
)  # fmt: skip


def stage_identity(parent: Link, data: dict[str, Any], stage: Stage) -> str:
    """A hash of all that can change a stage's result."""
    return sha256_json({"parent": parent.identity, "data": data, "settings": identity_settings(stage)})


def link_record(stage: Stage, identity: str) -> dict[str, Any]:
    """A stage's place in a lineage."""
    return {"name": stage.name, "stage": stage.stage, "method": (stage.method or {})["name"], "identity": identity}


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
    from trivium.folder import place

    own = link_record(stage, identity)
    return {
        "trivium": 1,
        **own,
        "parent": place(parent.source, parent.identity, final),
        "base": base,
        "data": data,
        "settings": stage.model_dump(by_alias=True, exclude_none=True),
        **report,
        "lineage": [*parent.lineage, own],
    }


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the run's summary says of a stage: its costs and metrics, its rows, and what happened on the way."""
    return {key: record[key] for key in (*SHOWN, "rows", "events") if key in record}


def account(summary: dict[str, Any]) -> list[str]:
    """A line for each stage: where every row went, every attempt, step left out, checkpoint rejected or spike, and
    whether it came as planned."""
    told = ((s["name"], [*_rows(s), *happened(s), *beside(s)]) for s in summary["stages"])
    return [f"{name}: {'; '.join(lines)}" for name, lines in told if lines]


def _rows(stage: dict[str, Any]) -> list[str]:
    rows = stage.get("rows")
    if not rows:
        return []
    parts = [(rows[key], key.replace("_", "-" if key == "over_long" else " ")) for key in PLACES]
    placed = " + ".join(f"{n:,} {name}" for n, name in parts if n or name == "used")
    retried = [f"{rows['died']:,} times a process died preparing them"] if rows.get("died") else []
    return [f"{rows['read']:,} rows = {placed}", *retried]


def happened(stage: dict[str, Any]) -> list[str]:
    """What happened while a stage was trained, in words; nothing where nothing did."""
    events = stage.get("events") or {}
    told = []
    if (attempts := events.get("attempts", 1)) > 1:
        after = ", ".join(map(str, events["went_on_after"]))
        told.append(f"{attempts} attempts, on after step {after}, {events['steps_repeated']:,} steps done again")
    if rejected := events.get("rejected"):
        # one that is damaged is rejected again at every start until another takes its place
        told.append(f"{len(rejected):,} rejection{'s' * (len(rejected) != 1)} of a checkpoint")
    if skipped := events.get("skipped"):
        steps = ", ".join(str(one["step"]) for one in skipped)
        told.append(f"{len(skipped)} step{'s' * (len(skipped) != 1)} left out as not finite ({steps})")
    if halvings := events.get("halvings"):
        steps = ", ".join(dict.fromkeys(str(one["step"]) for one in halvings))
        times = f"{len(halvings)} time{'s' * (len(halvings) != 1)}"
        told.append(f"memory ran out {times} (step {steps}): {halvings[-1]['tokens']:,} tokens a pass since then")
    for one in events.get("halvings_elsewhere") or ():
        told.append(f"memory ran out in process {one['process']} (step {one['step']}): {one['tokens']:,} tokens a pass")
    if spikes := events.get("spikes"):
        told.append(f"the loss jumped at step {', '.join(str(one['step']) for one in spikes)}")
    if events.get("both_fell"):
        told.append("chosen and rejected answers both became less likely")
    if files := events.get("accepted_changed_data"):
        told.append(f"went on with changed data ({', '.join(files)})")
    if (saving := events.get("checkpoints")) and saving["saved"]:
        told.append(
            f"{saving['saved']} checkpoint{'s' * (saving['saved'] != 1)} of {size(saving['bytes'])}: "
            f"{saving['seconds']:.1f} s of the training's time, {saving['seconds_beside']:.1f} s beside it"
        )
    return told


def table(summary: dict[str, Any]) -> str:
    """The end-of-run table, as plain text for a terminal."""
    head, rows = cost_table(summary["stages"])
    return aligned([head, *rows], left=2)


def cost_table(stages: list[dict[str, Any]], wide: bool = False) -> tuple[list[str], list[list[str]]]:
    """What each stage of a summary cost and gave, in words: heads, and a row per stage.

    ``wide`` has room for the kind of stage, shares of parameters, and the first verdict of a judge, which sums up the
    others. Columns that no stage fills are left out.
    """
    head = ["stage", "method", "trained", "seconds", "tokens/s", "memory", "on disk"]
    head += ["held-out loss" if wide else "eval loss", "accuracy"]
    judges = list(dict.fromkeys(key for s in stages for key in list(s.get("judged", {}))[:1])) if wide else []
    rows = []
    for s in stages:
        m, bits, judged = s["metrics"], s.get("text_bits_per_byte", {}), s.get("judged", {})
        share = f" ({s['trained_parameters'] / max(1, s['total_parameters']):.1%})" if wide else ""
        rows.append(
            [s["name"], f"{s['stage']}, {s['method']}" if wide else s["method"],
             f"{s['trained_parameters']:,}{share}", f"{s['seconds']:,.0f}", f"{s['tokens_per_second']:,.0f}",
             size(s["peak_memory_bytes"]), size(s["bytes_on_disk"]),
             _change(m.get("before_loss"), m.get("after_loss")),
             _change(m.get("before_accuracy"), m.get("after_accuracy"), ".0%"),
             *_against(s.get("against") if wide else None),
             *(_verdict(judged.get(key)) for key in judges), _change(bits.get("before"), bits.get("after"))]
        )  # fmt: skip
    head += ["KL/token", "won", *judges, "bits/byte"]
    filled = [c for c in range(len(head)) if any(row[c] for row in rows)]
    return [head[c] for c in filled], [[row[c] or "-" for c in filled] for row in rows]


def _change(before: float | None, after: float | None, form: str = ".3f") -> str:
    if after is None:
        return ""
    return f"{after:{form}}" if before is None else f"{before:{form}}→{after:{form}}"


def _against(found: dict[str, Any] | None) -> tuple[str, str]:
    """KL from the parent, and how often its answer was preferred to the parent's."""
    return ("", "") if found is None else (f"{found['kl']:.3f}", _verdict(found["won"]))


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "share" not in found:
        return f"{found['value']:.4g}"
    return f"{found['share']:.0%} ({found['low']:.0%}–{found['high']:.0%})"


def aligned(rows: list[list[str]], left: int) -> str:
    """Rows of words as columns, the first ``left`` of them to the left, the others to the right."""
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join(v.ljust(w) if c < left else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
