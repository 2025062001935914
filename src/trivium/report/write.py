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

from trivium.errors import ModelError, said
from trivium.files import make_folder, write_text
from trivium.measures import MEASURES
from trivium.report.figures import charts, judged_charts, lineage_of
from trivium.report.gather import RunView, run_view
from trivium.report.tables import answers, cost_rows, duels, duels_of, facts, settings_rows
from trivium.summary import SUMMARY

REPORT = "report.html"


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """The page of one run, or one that compares several; returns its path. Raises ModelError, DiskError."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ModelError("the same run is named twice", "name each run once")
    text = page([run_view(folder) for folder in folders])
    make_folder(path.parent)
    write_text(path, text)
    return path


def rendered(name: str, package: str = "trivium.report", **values: Any) -> str:
    """A page of a package, with the style of the reports; what it includes is here."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def read(file: str) -> str:
        place = resources.files(package if file == name else "trivium.report")
        return place.joinpath(file).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(read)
    )
    return environment.get_template(name).render(style=Markup(read("page.css")), **values)


def write_judged(seen: dict[str, Any], title: str, path: Path) -> None:
    """The page of one model against its parent: ``seen`` is `Against.as_dict()` and its ``line``."""
    write_text(path, rendered("judged.html", title=title, line=seen["line"], found=duels_of(seen)))


def page(runs: list[RunView]) -> str:
    """The page of one run, or of several side by side. Raises ModelError where what their files say is damaged."""
    from jinja2 import UndefinedError

    try:
        return _page(runs)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, UndefinedError) as error:
        told = " or ".join(str(run.folder / name) for run in runs for name in (SUMMARY, MEASURES))
        remedy = "delete measures.json, and run the recipe again: finished stages are kept"
        raise ModelError(f"{told}: damaged, it cannot be shown ({said(error)})", remedy) from error


def _page(runs: list[RunView]) -> str:
    from markupsafe import Markup

    def drawn(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**one, "svg": Markup(one["svg"])} for one in found]

    several = len(runs) > 1
    return rendered(
        "page.html",
        title=runs[0].name if len(runs) == 1 else " against ".join(run.label for run in runs),
        several=several,
        runs=[{"view": run, "facts": facts(run), "lineage": Markup(lineage_of(run))} for run in runs],
        charts=drawn(charts(runs)),
        judged=drawn(judged_charts(runs)),
        costs=cost_rows(runs),
        answers=answers(runs),
        duels=duels(runs),
        settings=settings_rows(runs),
    )
