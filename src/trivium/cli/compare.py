"""``trivium compare``: one stage trained several ways on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEMO = "demo"


def add_to(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; or demo: the story world.")],
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B,...", help="e.g. full,lora,dora,ia3; lora@1e-3 is at that rate."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, from the recipe's own on.")] = 1,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Which stage; left out: the first that fine-tunes, SFT before others.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. stages.chat.max_steps=50")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder; left out: runs/NAME-compare.")] = None,
) -> None:
    """Train a stage each way on the same rows; one table and one plot of what it costs and what it gives."""
    from trivium.comparing.demo import STAGE, demo_world
    from trivium.recipe_file import read_recipe

    requests = None
    if recipe == DEMO:
        out = out or Path("runs/demo-compare")
        read, requests = demo_world(out, set_ or [])
        stage = stage or STAGE
    else:
        read = read_recipe(Path(recipe), set_)
    from trivium.comparing.comparison import NUMBERS, compare
    from trivium.comparing.page import PAGE
    from trivium.comparing.show import lines

    out = out or Path("runs") / f"{read.name}-compare"
    names = methods.split(",") if methods is not None else None
    print("\n".join(lines(compare(read, out, names, seeds, stage, requests))))
    print(f"\n{out / NUMBERS}\n{out / PAGE}")
