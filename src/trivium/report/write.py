"""Writes the report: ``report.html``, one file that needs nothing else, and no network.

    write_report([Path("runs/demo")], Path("runs/demo/report.html"))
    write_report([first, second], Path("x.html"))     # several runs on one page

The page has no script and forbids itself any (Content-Security-Policy): what a model has said is only ever text.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trivium.errors import ModelError
from trivium.files import make_folder, write_text
from trivium.report.figures import charts, judged_charts, lineage_of
from trivium.report.gather import RunView, run_view
from trivium.report.tables import answers, cost_rows, facts, settings_rows

REPORT = "report.html"


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """The page of one run, or one that compares several; returns its path. Raises ModelError, DiskError."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ModelError("the same run is named twice", "name each run once")
    text = page([run_view(folder) for folder in folders])
    make_folder(path.parent)
    write_text(path, text)
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
        title=runs[0].name if len(runs) == 1 else " against ".join(run.label for run in runs),
        style=style,
        several=several,
        runs=[{"view": run, "facts": facts(run), "lineage": Markup(lineage_of(run))} for run in runs],
        charts=drawn(charts(runs)),
        judged=drawn(judged_charts(runs)),
        costs=cost_rows(runs),
        answers=answers(runs),
        settings=settings_rows(runs),
    )
