"""Writes the report: ``report.html``, one file that needs nothing else, and no network.

    write_report(Path("runs/demo"))                    # runs/demo/report.html
    write_comparison([first, second], Path("x.html"))  # several runs on one page

The page has no script and forbids itself any (Content-Security-Policy): what a model has said is only ever text.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trivium.files import write_text
from trivium.report.figures import charts, judged_charts, lineage_of
from trivium.report.gather import RunView, run_view
from trivium.report.tables import answers, cost_rows, facts, settings_rows

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Make the report of one run in its folder; returns its path. Raises ModelError, DiskError."""
    path = folder / REPORT
    write_text(path, page([run_view(folder)]))
    return path


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """One page that compares several runs."""
    write_text(path, page([run_view(folder) for folder in folders]))
    return path


def page(runs: list[RunView]) -> str:
    """The page of one run, or of several side by side."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = resources.files("trivium.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    style = Markup(here.joinpath("page.css").read_text(encoding="utf-8"))

    def drawn(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**one, "svg": Markup(one["svg"])} for one in found]

    several = len(runs) > 1
    return template.render(
        title=" against ".join(names(runs)),
        style=style,
        several=several,
        runs=[{"view": run, "facts": facts(run), "lineage": Markup(lineage_of(run))} for run in runs],
        charts=drawn(charts(runs)),
        judged=drawn(judged_charts(runs)),
        costs=cost_rows(runs),
        answers=answers(runs),
        settings=settings_rows(runs),
    )


def names(runs: list[RunView]) -> list[str]:
    """A name for each run that tells it from the others: its own, or its folder's."""
    own = [run.name for run in runs]
    return own if len(set(own)) == len(own) else [str(run.folder) for run in runs]
