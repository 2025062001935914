"""``trivium merge``: adapters into a standalone model, or several LoRAs into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivium.cli.given import there
from trivium.errors import RecipeError
from trivium.terminal import say


def add_to(app: typer.Typer) -> None:
    app.command("merge")(merge)


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", callback=there, help="Adapter folders; several: LoRAs.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder of the merged model.")],
    how: Annotated[
        str, typer.Option("--how", help="How several become one: cat, linear, svd, ties, dare, dare_ties.")
    ] = "cat",
    weights: Annotated[str | None, typer.Option("--weights", help="One for each, e.g. 0.7,0.3.")] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="The share of each update that is kept: ties, dare, dare_ties.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of the result: svd, ties, dare, dare_ties.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what dare drops.")] = 0,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the combined LoRA, not a merged model.")] = False,
) -> None:
    """Merge an adapter into its base; refused where the merged model would not be the same."""
    from trivium.merging import Combination
    from trivium.merging import merge as merge_folders

    asked = {"--how": how != "cat", "--weights": weights, "--density": density, "--rank": rank, "--seed": seed}
    if len(adapters) == 1 and (given := [name for name, value in asked.items() if value]):
        raise RecipeError(f"{given[0]} is for several adapters", "give several, or leave it out")
    combination = None
    if len(adapters) > 1:
        combination = Combination(how, None if weights is None else _numbers(weights), rank, density, seed)
    gate = merge_folders(adapters, out, combination, adapter)
    if gate is not None:
        say(f"proof: {gate.line()}")
    print(out)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"--weights {text}: not numbers", "e.g. --weights 0.7,0.3") from None
