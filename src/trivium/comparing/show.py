"""What a comparison has found, in words: the tables, the plot, and the lines that say what is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.comparing.axes import Axis, Point
from trivium.comparing.plan import Plan, settings_said
from trivium.comparing.text_plot import text_plot
from trivium.summary import aligned
from trivium.terminal import size

PARAMETERS = Axis("trained parameters", log=True)

Json = dict[str, Any]
Column = tuple[str, Callable[[Json], str]]  # its head, and what it says of a way


def plan_lines(plan: Plan) -> list[str]:
    """What is about to be trained: the stage, and every way with its settings and learning rate."""
    start = f"from {plan.stage.from_}" if plan.stage.from_ else "from the given model"
    seeds = f"seed {plan.seeds[0]}" if len(plan.seeds) == 1 else f"seeds {plan.seeds[0]} to {plan.seeds[-1]}"
    told = [["method", "settings", "learning rate"]]
    told += [[way.name, settings_said(way.name, way.method), f"{way.learning_rate:g}"] for way in plan.ways]
    return [
        f"{plan.stage.name} ({plan.stage.stage}) {start}, {len(plan.ways)} ways, {seeds}:",
        *(f"  {line}" for line in aligned(told, left=2).splitlines()),
    ]


def costs(found: Json) -> list[Column]:
    """The columns of what a way costs."""
    return [
        ("trained", lambda m: f"{m['trained_parameters']:,.0f}"),
        ("share", lambda m: f"{m['trained_parameters'] / max(1, m['total_parameters']):.2%}"),
        ("per task", lambda m: size(m["bytes_on_disk"])),
        (f"{found['tasks']} tasks", lambda m: size(m["bytes_of_tasks"])),
        ("memory", lambda m: size(m["peak_memory_bytes"])),
        ("seconds", lambda m: f"{m['seconds']:,.1f}"),
        ("tokens/s", lambda m: f"{m['tokens_per_second']:,.0f}"),
    ]


def gains(found: Json) -> list[Column]:
    """The columns of what a way gives, means with their spread over the seeds; those that none fills are left out."""
    quality = found["quality"] or {}
    means = [way["mean"] for way in found["ways"]]
    columns: list[Column] = [
        ("rate", lambda m: f"{m['learning_rate']:g}"),
        ("held-out loss", lambda m: _change(m, "loss", ".3f")),
        ("bits/byte", lambda m: _change(m, "bits_per_byte", ".3f")),
        ("merged", lambda m: f"{m['merge_difference']:.0e}" if "merge_difference" in m else "-"),
    ]
    if quality.get("share"):
        columns.insert(1, (quality["name"], lambda m: _change(m, quality["key"], ".1%")))
    keys = {"held-out loss": "loss", "bits/byte": "bits_per_byte", "merged": "merge_difference"}
    return [c for c in columns if c[0] not in keys or any(keys[c[0]] in mean for mean in means)]


def _change(mean: Json, key: str, form: str) -> str:
    """``before→after``, and how far it spreads where there were several seeds."""
    if key not in mean:
        return "-"
    before = f"{mean[f'{key}_before']:{form}}→" if f"{key}_before" in mean else ""
    spread = mean["spread"].get(key)
    return f"{before}{mean[key]:{form}}" + (f" ±{spread:{form}}" if spread is not None else "")


def rows(found: Json, columns: Sequence[Column]) -> list[list[str] | tuple[str, str]]:
    """For each way its cells, the name first; or its name and why it was not trained."""
    told: list[list[str] | tuple[str, str]] = []
    for way in found["ways"]:
        mean = {**way["mean"], "learning_rate": way["learning_rate"], "spread": way["spread"]}
        if way["runs"]:
            told.append([way["name"], *(say(mean) for _, say in columns)])
        else:
            told.append((way["name"], reason(way)))
    return told


def reason(way: Json) -> str:
    """Why a way was not trained to its end."""
    error: Mapping[str, Any] = way.get("error") or {"what": "not yet trained", "remedy": ""}
    return " ".join(f"{error['what']}; {error['remedy']}".strip("; ").split())


def table(found: Json, columns: Sequence[Column]) -> str:
    """Aligned for a terminal; a way that was not trained has its reason in its row."""
    told = rows(found, columns)
    head = ["method", *(name for name, _ in columns)]
    lines = aligned([head, *(row for row in told if isinstance(row, list))], left=1).splitlines()
    width = max(len("method"), *(len(row[0]) for row in told if isinstance(row, list)), 0)
    whole = iter(lines[1:])
    return "\n".join([lines[0], *(next(whole) if isinstance(r, list) else f"{r[0]:<{width}}  {r[1]}" for r in told)])


def quality_points(found: Json) -> list[Point]:
    """Quality against trained parameters."""
    quality = found["quality"]
    if quality is None:
        return []
    return [
        Point(w["name"], w["mean"]["trained_parameters"], w["mean"][quality["key"]], w["spread"].get(quality["key"], 0))
        for w in found["ways"]
        if quality["key"] in w["mean"]
    ]


def quality_axis(found: Json) -> Axis:
    quality = found["quality"]
    better = "higher" if quality["higher_is_better"] else "lower"
    return Axis(f"{quality['name']} ({better} is better)", "%" if quality["share"] else "")


def lines(found: Json) -> list[str]:
    """All that is told at the end: what it costs, what it gives, the plot, what holds for all."""
    trained = {**found, "ways": [way for way in found["ways"] if way["runs"]]}
    told = [table(found, costs(found)), "", table(trained, gains(found)), ""]
    points = quality_points(found)
    told += [text_plot(points, PARAMETERS, quality_axis(found)), ""] if points else []
    return told + notes(found)


def notes(found: Json) -> list[str]:
    """What the tables' words mean, and what holds for all ways."""
    told = [
        f"rows: {found['same_rows']}",
        f"{found['tasks']} tasks: one base ({size(found['base_bytes'])}) and an adapter each, or a whole model each",
    ]
    if found["quality"] is None:
        told.append("no row was held out (eval_data), so that nothing tells which way is better")
    if any("bits_per_byte" in way["mean"] for way in found["ways"]):
        told.append("bits/byte: general text before→after; a rise is forgetting")
    else:
        told.append("forgetting was not measured: the recipe names no eval_text and has no pretraining stage")
    if any("merge_difference" in way["mean"] for way in found["ways"]):
        told.append("merged: how far a logit moves once the adapter is folded into its base (-: it is not)")
    if len(found["seeds"]) > 1:
        told.append(f"±: the standard deviation over {len(found['seeds'])} seeds")
    failed = [way for way in found["ways"] if way["runs"] and "error" in way]
    return told + [f"{w['name']}: {len(w['runs'])} of {len(found['seeds'])} seeds; {reason(w)}" for w in failed]
