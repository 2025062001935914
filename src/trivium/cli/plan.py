"""``trivium plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. stages.chat.micro_batch_tokens=512")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder; left out: runs/NAME.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
) -> None:
    """What a recipe will train, hold, write and take, before any of it is done: a few steps of each stage are tried."""
    from trivium.recipe_file import read_recipe

    read = read_recipe(recipe, set_)
    from trivium.planning.plan import PLAN, plan_recipe
    from trivium.planning.told import lines

    folder = out or Path("runs") / read.name
    found = plan_recipe(read, folder, until)
    print("\n".join(lines(found)))
    print(f"\n{folder / PLAN}")
    if not all(stage.get("fits", True) for stage in found["stages"]):
        raise typer.Exit(6)
