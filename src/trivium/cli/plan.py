"""``trivium plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trivium.cli.run import Changes, Out, RecipeFile, Until
from trivium.errors import RecipeError

if TYPE_CHECKING:
    from trivium.recipe import Recipe


def add_to(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    recipe: RecipeFile,
    set_: Changes = None,
    out: Out = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="24GB", help="Of a device that is not here: reckoned, not tried.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", min=0.001, help="Its rate in bfloat16, in TFLOP a second.")
    ] = None,
    until: Until = None,
) -> None:
    """What a recipe will train, hold, write and take, before any of it is done: a few steps of each stage are tried."""
    from trivium.recipe_file import read_recipe

    read = read_recipe(recipe, set_)
    from trivium.planning.told import lines

    if memory is not None or tflops is not None:
        found = _elsewhere(read, until, memory, tflops)
        print("\n".join(lines(found)))
    else:
        from trivium.planning.plan import PLAN, plan_recipe

        folder = out or Path("runs") / read.name
        found = plan_recipe(read, folder, until)
        print("\n".join(lines(found)), f"\n{folder / PLAN}", sep="\n")
    if not all(stage.get("fits", True) for stage in found["stages"]):
        raise typer.Exit(6)


def _elsewhere(read: Recipe, until: str | None, memory: str | None, tflops: float | None) -> dict[str, Any]:
    """On a device that is not here."""
    import tempfile

    from trivium.planning.elsewhere import plan_elsewhere
    from trivium.train.budget import in_bytes

    if memory is None:
        raise RecipeError("--tflops without --memory", "say how much memory the device has, as in --memory 24GB")
    try:
        there = in_bytes(memory)
    except ValueError as error:
        raise RecipeError(f"--memory: {str(error).split(': ')[0]}", "write it as 24GB or 900MB") from None
    with tempfile.TemporaryDirectory() as scratch:
        return plan_elsewhere(read, until, there, tflops * 1e12 if tflops else None, Path(scratch))
