"""Which charts a report has: each stage's loss, what a judge saw along the way and at the end, the lineage."""

from __future__ import annotations

from typing import Any

from trivium.report.chart import Bar, Series, interval_chart, line_chart
from trivium.report.gather import RunView, StageView
from trivium.report.lineage import Box, lineage

COLOURS = 8  # c0 ... c7 in page.css


def colour(number: int) -> str:
    return f"c{number % COLOURS}"


def colours(runs: list[RunView]) -> dict[tuple[str, str], str]:
    """Each stage's colour: by its place in one run; where runs are compared, by its run."""
    if len(runs) == 1:
        return {(str(runs[0].folder), s.name): colour(n) for n, s in enumerate(runs[0].stages)}
    return {(str(run.folder), s.name): colour(n) for n, run in enumerate(runs) for s in run.stages}


def charts(runs: list[RunView]) -> list[dict[str, Any]]:
    """What was judged along the way; then the loss of every stage, with the held-out loss on it. Stages of one name
    are on one chart."""
    found: list[dict[str, Any]] = []
    tints = colours(runs)
    stages = [(run, stage) for run in runs for stage in run.stages]
    for name in dict.fromkeys(stage.name for _, stage in stages):
        alike = [(run, stage) for run, stage in stages if stage.name == name]
        series: list[Series] = []
        for run, stage in alike:
            tint, tag = tints[str(run.folder), name], f"{run.label}: " if len(runs) > 1 else ""
            series.append(Series(f"{tag}training", stage.points("loss"), tint, faint=True))
            series.append(Series(f"{tag}held-out", stage.points("eval_loss"), tint))
        record = alike[0][1].record
        what = "loss per pair" if "after_accuracy" in record["metrics"] else "loss per token (nats)"
        found.append(_figure(name, alike[0][1].title, line_chart(series, "optimizer step", what, f"Loss of {name}")))
        if any(stage.points("eval_accuracy") for _, stage in alike):
            series = [Series(run.label if len(runs) > 1 else "held-out", stage.points("eval_accuracy"),
                             tints[str(run.folder), name]) for run, stage in alike]  # fmt: skip
            svg = line_chart(series, "optimizer step", "pairs ranked right", f"Accuracy of {name}", "%")
            found.append(_figure(name, "share of held-out pairs whose chosen answer gained more", svg))
        found += _of_answers(name, alike, tints, len(runs) > 1)
    return [f for f in [*_along_the_way(stages, tints, len(runs) > 1), *found] if f["svg"]]


def _of_answers(name: str, alike: list[tuple[RunView, StageView]], tints: Any, several: bool) -> list[dict[str, Any]]:
    """How likely held-out answers are on the way: both falling is how preference tuning is known to go wrong."""
    series = [
        Series(f"{run.label}: {side}" if several else side, stage.points(f"eval_logprob_{side}"),
               tints[str(run.folder), name], faint=side == "rejected")
        for run, stage in alike for side in ("chosen", "rejected")
    ]  # fmt: skip
    if not any(one.points for one in series):
        return []
    svg = line_chart(series, "optimizer step", "log-probability (nats)", f"Held-out answers of {name}")
    return [_figure(name, "log-probability of held-out answers, rejected ones faint; both falling is a warning", svg)]


def _along_the_way(stages: list[tuple[RunView, StageView]], tints: Any, several: bool) -> list[dict[str, Any]]:
    """What a judge saw during training: its first verdict, which sums up the others. A chart per kind of stage."""
    first = next((key for _, stage in stages for key in stage.judged), None)
    if first is None:
        return []
    share = "%" if all("share" in stage.judged.get(first, {"share": 0}) for _, stage in stages) else ""
    found = []
    for kind in dict.fromkeys(stage.record["stage"] for _, stage in stages):
        series = [
            Series(
                f"{run.label}: {stage.name}" if several else stage.name,
                stage.points(f"eval_{first}"),
                tints[str(run.folder), stage.name],
            )
            for run, stage in stages
            if stage.record["stage"] == kind
        ]
        title = f"{first} against steps, {kind}"
        svg = line_chart(series, "optimizer step", first, title, share, whole=bool(share))
        found.append(_figure(f"{first} against steps", f"{kind}; a sample of requests, answered during training", svg))
    return found


def judged_charts(runs: list[RunView]) -> list[dict[str, Any]]:
    """What a judge saw on each finished model, with 95% intervals."""
    found = []
    tints = colours(runs)
    for run in runs:
        for stage in run.stages:
            verdicts = {k: v for k, v in stage.judged.items() if "share" in v}
            bars = [
                Bar(name, v["share"], v["low"], v["high"],
                    f"{v['met']} of {v['of']}; 95% interval {v['low']:.1%} to {v['high']:.1%}")
                for name, v in verdicts.items()
            ]  # fmt: skip
            if bars:
                title = f"{run.label}: {stage.name}" if len(runs) > 1 else stage.name
                svg = interval_chart(bars, f"Judged answers of {title}", tints[str(run.folder), stage.name])
                found.append(_figure(title, stage.title, svg))
    return found


def _figure(title: str, caption: str, svg: str) -> dict[str, Any]:
    return {"title": title, "caption": caption, "svg": svg}


def lineage_of(run: RunView) -> str:
    """The run's models as a drawing, from what it started with."""
    first = run.stages[0].record["lineage"]
    tints = colours([run])
    above = first[:-1]  # what the run started from, and where that came from
    boxes = [
        Box(link["identity"], above[n - 1]["identity"] if n else None, str(link["name"]).rstrip("/").split("/")[-1],
            (str(link["stage"]), link["identity"][:12]), "plain")
        for n, link in enumerate(above)
    ]  # fmt: skip
    for stage in run.stages:
        parent = stage.record["lineage"][-2]["identity"] if len(stage.record["lineage"]) > 1 else None
        trained = f"{stage.record['trained_parameters']:,} trained"
        tint = tints[str(run.folder), stage.name]
        boxes.append(Box(stage.record["identity"], parent, stage.name, (stage.title, trained), tint))
    return lineage(boxes, f"Lineage of {run.name}")
