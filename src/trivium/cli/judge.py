"""``trivium score`` and ``judge``: rewards for rows, and a model's answers against its parent's."""

from __future__ import annotations

import json as codec
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from trivium.cli.data import check_place, mixes
from trivium.cli.given import there
from trivium.errors import DataError

Rows = Annotated[list[str], typer.Argument(metavar="ROWS...", help="Files, folders, globs, or hf://owner/name/path.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write here instead of printing.")]


def add_to(app: typer.Typer) -> None:
    app.command("score")(score)
    app.command("judge")(judge)


def score(
    folder: Annotated[str, typer.Argument(metavar="DIR", callback=there, help="A reward model's folder.")],
    rows: Rows,
    out: Out = None,
) -> None:
    """Rewards for rows: pairs, scored lists, ratings or conversations. One JSON line each, and a sum at the end."""
    check_place(out)
    reading = mixes(rows)
    from trivium.judging import reward_model
    from trivium.ranking import Tally, scores
    from trivium.terminal import say

    tally = Tally()
    written(out, (codec.dumps(line) for line in scores(reading, reward_model(folder), tally)))
    say(tally.line())


def judge(
    new: Annotated[str, typer.Argument(metavar="NEW", callback=there, help="The model's folder.")],
    parent: Annotated[
        str, typer.Argument(metavar="PARENT", callback=there, help="The folder of the model that it was made of.")
    ],
    prompts: Annotated[list[str], typer.Option("--prompts", metavar="ROWS", help="Rows whose prompts are asked.")],
    reward: Annotated[
        str | None, typer.Option("--reward", metavar="DIR", callback=there, help="A reward model judges.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="An OpenAI-compatible endpoint judges (key: OPENAI_API_KEY)."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model to ask for behind the endpoint.")] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Prompts that are asked, at most.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 96,
    html: Annotated[Path | None, typer.Option("--html", help="Write all answers, side by side, on a page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:  # fmt: skip
    """A model against its parent: unchanged answers, length, KL, and how often its answer is preferred."""
    from trivium.recipe_file import one_judge

    asked = one_judge(reward, endpoint, model)
    check_place(html)
    asking = mixes(prompts)
    from trivium.judging import judge as judged
    from trivium.judging import preference_of
    from trivium.ranking import prompts_of
    from trivium.report.write import write_judged

    found = judged(new, parent, prompts_of(asking, most), preference_of(asked) if asked else None, max_new_tokens)
    if found is None:
        what = f"no prompt is the same tokens to both models and leaves room for {max_new_tokens:,} more"
        raise DataError(what, "lower --max-new-tokens, or compare a model with the one that it was made of")
    seen = {**found.as_dict(), "line": found.line()}
    if html is not None:
        write_judged(seen, f"{Path(new).name} against {Path(parent).name}", html)
    print(codec.dumps(seen, indent=1, ensure_ascii=False) if json else found.line())


def written(out: Path | None, lines: Iterable[str]) -> None:
    """Lines into a file, whole or not at all, or printed as they come. Raises DiskError."""
    from trivium.files import write_text

    if out is None:
        for line in lines:
            print(line, flush=True)
        return
    write_text(out, "".join(f"{line}\n" for line in lines))
