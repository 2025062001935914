"""``compare.html``: a comparison on one page that needs nothing else, in the style of the reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.comparing.axes import Axis, Point
from trivium.comparing.plan import settings_said
from trivium.comparing.show import PARAMETERS, costs, gains, notes, quality_axis, quality_points, rows
from trivium.comparing.svg_plot import svg_plot
from trivium.files import write_text
from trivium.report.chart import Series, line_chart
from trivium.report.gather import run_view
from trivium.report.write import rendered

PAGE = "compare.html"
COLOURS = 12  # c0 to c7 of the reports' page.css, and this page's own

Json = dict[str, Any]


def write_page(found: Json, out: Path) -> Path:
    """The page of what ``compare.json`` in ``out`` holds; returns its path."""
    write_text(out / PAGE, page(found, out))
    return out / PAGE


def page(found: Json, out: Path) -> str:
    """``out`` is where the runs lie, whose curves are drawn."""
    from markupsafe import Markup

    columns = [*gains(found), *costs(found)]
    tints = {way["name"]: f"c{n % COLOURS}" for n, way in enumerate(found["ways"])}
    told = [
        {"name": row[0], "colour": tints[row[0]], "cells": row[1:] if isinstance(row, list) else [],
         "reason": "" if isinstance(row, list) else row[1]}
        for row in rows(found, columns)
    ]  # fmt: skip
    return rendered(
        "page.html",
        "trivium.comparing",
        title=f"{found['name']}: {found['stage']}, {len(found['ways'])} ways",
        facts=_facts(found),
        head=["method", *(name for name, _ in columns)],
        rows=told,
        notes=notes(found),
        figures=[{"title": t, "caption": c, "svg": Markup(svg)} for t, c, svg in _figures(found, out, tints) if svg],
        runs=[
            {**run, "settings": settings_said(way["name"], way["method"]), "rate": f"{way['learning_rate']:g}"}
            for way in found["ways"]
            for run in way["runs"]
        ],
    )


def _facts(found: Json) -> list[tuple[str, str]]:
    seeds = found["seeds"]
    return [
        ("stage", f"{found['stage']} ({found['kind']})"),
        ("from", found["from"]),
        ("seeds", ", ".join(map(str, seeds))),
        ("runs", str(sum(len(way["runs"]) for way in found["ways"]))),
    ]


def _figures(found: Json, out: Path, tints: dict[str, str]) -> list[tuple[str, str, str]]:
    """Title, caption and drawing of each figure; a drawing is empty where its numbers are not there."""
    if found["quality"] is None:
        return []
    axis, name = quality_axis(found), found["quality"]["name"]
    points = quality_points(found)
    forgot = {
        way["name"]: mean["bits_per_byte"] - mean["bits_per_byte_before"]
        for way in found["ways"]
        if "bits_per_byte_before" in (mean := way["mean"]) and "bits_per_byte" in mean
    }
    against = [Point(p.name, forgot[p.name], p.y, p.spread) for p in points if p.name in forgot]
    spread = "; lines: ± one standard deviation over the seeds" if len(found["seeds"]) > 1 else ""
    return [
        (f"{name} against what is trained", f"a mark for each way{spread}", svg_plot(points, PARAMETERS, axis, tints)),
        (f"{name} against forgetting", "further left forgets less of the general text",
         svg_plot(against, Axis("rise in bits/byte of general text"), axis, tints)),
        ("held-out loss on the way", f"seed {found['seeds'][0]}", _curves(found, out, tints)),
    ]  # fmt: skip


def _curves(found: Json, out: Path, tints: dict[str, str]) -> str:
    series = []
    for way in found["ways"]:
        for run in way["runs"][:1]:
            curve = run_view(out / run["folder"]).stages[-1].points("eval_loss")
            series.append(Series(way["name"], curve, tints[way["name"]]))
    return line_chart(series, "optimizer step", "held-out loss", "Held-out loss of every way")
