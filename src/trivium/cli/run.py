"""``trivium run``, ``trivium demo`` and ``trivium report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. stages.chat.learning_rate=1e-4")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder; left out: runs/NAME.")]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("demo")(demo)
    app.command("report")(report)


def run(
    recipe: RecipeFile,
    set_: Changes = None,
    out: Out = None,
    until: Until = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; the old folder is kept aside.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="Go on with rows that changed while a stage was interrupted.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Tell where the time of a few steps of each stage goes.")
    ] = False,
) -> None:
    """Carry out a recipe; finished stages are not run again, and what was interrupted goes on."""
    from trivium.recipe_file import read_recipe

    read = read_recipe(recipe, set_)
    from trivium.chain import run_recipe  # after the recipe is read: this one takes a second
    from trivium.summary import account, table

    folder = out or Path("runs") / read.name
    summary = run_recipe(read, folder, until, None, fresh, accept_changed_data, profile)
    if not summary:  # of several processes, one that only helps
        return
    print(table(summary))
    print("", *account(summary), sep="\n")
    print(f"\n{folder / 'summary.json'}\n{folder / 'report.html'}")


def demo(
    out: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the story world and the run.")] = 0,
) -> None:
    """The three steps on an embedded story world, from random weights, on any machine."""
    from trivium.demo.show import run_demo

    run_demo(out, seed)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, as `trivium run` wrote them.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; left out: report.html in the run, or here for several.")
    ] = None,
) -> None:
    """Make a run's report.html again, or one page that compares several runs."""
    from trivium.report.write import REPORT, write_report

    print(write_report(runs, out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))))
