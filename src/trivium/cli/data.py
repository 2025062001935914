"""``trivium data check``, ``show``, ``template``, ``rank``: to look at data before spending on it, and to make it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trivium.cli.given import there
from trivium.errors import DataError, DiskError, ModelError, nearest

if TYPE_CHECKING:
    from trivium.data.check import Asked
    from trivium.data.rows import Mix

group = typer.Typer(help="Look at data before spending on it.", no_args_is_help=True, rich_markup_mode=None)

Files = Annotated[list[str], typer.Argument(help="Files, folders, globs, or hf://owner/name/path.")]
Model = Annotated[str | None, typer.Option("--model", metavar="DIR", help="The model whose tokenizer reads them.")]
Length = Annotated[int | None, typer.Option("--max-length", min=2, help="As in a recipe; else the model's context.")]
Overflow = Annotated[
    Literal["error", "drop", "truncate_left", "truncate_right", "split"] | None,
    typer.Option("--on-overflow", help="What becomes of longer rows, as in a recipe."),
]
Stage = Annotated[
    Literal["pretrain", "sft", "preference", "reward"] | None,
    typer.Option("--stage", help="The stage that they are for."),
]
TrainOn = Annotated[Literal["assistant", "last", "all"], typer.Option("--train-on", help="Which turns are trained.")]
Field = Annotated[
    list[str] | None, typer.Option("--field", metavar="OURS=THEIRS", help="What a field is called, e.g. prompt=ask.")
]


def add_to(app: typer.Typer) -> None:
    for command in (check, show, template, rank):
        group.command(command.__name__)(command)
    app.add_typer(group, name="data")


def rank(
    files: Files,
    reward: Annotated[
        str, typer.Option("--reward", metavar="DIR", callback=there, help="The reward model that ranks them.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The file of pairs (.jsonl) to write.")],
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample", metavar="DIR", callback=there, help="A model that answers the prompts, instead of theirs."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", min=2, help="Answers drawn to each prompt (4).")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Of the answers that are drawn (0.8).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one, at most (256).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the answers that are drawn (0).")] = None,
    every: Annotated[bool, typer.Option("--all", help="All answers with rewards, not best and worst.")] = False,
    field: Field = None,
) -> None:
    """Rank the answers of rows by a reward model: pairs (or scored answers) for a preference stage."""
    from trivium.terminal import say

    check_place(out)
    drawing = {"-n": n, "--temperature": temperature, "--max-new-tokens": max_new_tokens, "--seed": seed}
    if sample is None and (idle := [name for name, value in drawing.items() if value is not None]):
        raise DataError(f"{idle[0]} is for answers that are drawn", "add --sample DIR, a model that draws them")
    asked = _asked(None, None, None, None, "assistant", field)
    read = [mix if not asked.fields else type(mix)(mix.source, None, asked.fields) for mix in mixes(files)]
    from trivium.judging import reward_model, sampler
    from trivium.ranking import write_ranked

    draws = None
    if sample is not None:
        draws = sampler(sample, n or 4, temperature or 0.8, max_new_tokens or 256, seed or 0)
    for line in write_ranked(read, reward_model(reward), draws, out, every):
        say(line)


def check(
    files: Files,
    model: Model = None,
    max_length: Length = None,
    on_overflow: Overflow = None,
    stage: Stage = None,
    train_on: TrainOn = "assistant",
    field: Field = None,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON, every bad row included.")] = False,
) -> None:
    """Formats, bad rows with file:line, lengths, what is trained; exit code 2 if anything would stop a run."""
    from trivium.data import check as checks

    read = mixes(files)
    asked = _asked(model, max_length, on_overflow, stage, train_on, field)
    found = checks.check(read, asked)
    if json:
        import json as codec

        print(codec.dumps(checks.as_json(found), indent=1, ensure_ascii=False))
    else:
        for one in found:
            print("\n".join(checks.lines(one)))
    stops = [one.stops for one in found if one.stops is not None]
    if stops:
        what, _, remedy = stops[0].partition("\n")
        raise DataError(what, remedy.strip())


def show(
    files: Files,
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="The model that is to see them.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 3,
    max_length: Length = None,
    on_overflow: Overflow = None,
    stage: Stage = None,
    train_on: TrainOn = "assistant",
    field: Field = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page instead.")] = None,
) -> None:
    """Rows as the model sees them: what is trained, control tokens, what is shared."""
    from trivium.data import check as checks
    from trivium.data.encoder import Encoder
    from trivium.data.show import as_html, as_text, branches
    from trivium.files import write_text
    from trivium.terminal import say

    check_place(html)
    asked = _asked(model, max_length, on_overflow, stage, train_on, field)
    encoder = Encoder.of(asked.tokenizer)
    rows = []
    for one in checks.check(mixes(files), asked):
        if one.prepared is None or not len(one.prepared.examples):
            raise DataError(*(one.stops or "no row to show\ngive other files").split("\n", 1))
        ledger = one.ledger
        if ledger.set_aside or ledger.over_long:
            say("\n".join(["not shown:", *(f"  {line}" for line in ledger.lines()[1:])]))
        for example in one.prepared.examples[:n]:
            tokens = sum(len(s.tokens) for s in example.sequences)
            about = f"{example.origin}  {tokens:,} tokens, {example.trained_tokens:,} trained"
            rows.append((about, branches(example, encoder)))
    if html is not None:
        write_text(html, as_html(rows, ", ".join(files)))
        print(html)
        return
    for about, shown in rows:
        print(as_text(shown, about, _colour()) + "\n")


def template(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A model, adapter or tokenizer folder, or a hub id.")],
) -> None:
    """The chat template in use: where it came from, how its turns end, whether it rewrites earlier ones."""
    from trivium.data.formats import RowError
    from trivium.data.show import as_text, branches
    from trivium.data.templates import chat_template, rewrites
    from trivium.folder import reading_of, trained_template
    from trivium.forest import Example

    tokenizer, _ = reading_of(folder)
    found = chat_template(tokenizer)
    prints = found.jinja
    again = rewrites(found)
    preserving = f"no, not for {again}: each is a sequence of its own" if again else "yes"
    stops = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(found.stop_ids))
    lines = {
        "template": found.origin,
        "sha256": found.sha256 + _compared(found.sha256, trained_template(folder)),
        "prefix-preserving": preserving,
        "an answer ends with": repr(found.stop_text.strip()),
        "generation stops at": stops,
        "begins with a BOS": "the tokenizer adds it, once" if found.encoder.bos_id is not None else "as it prints it",
        "asks for the date": "yes (date in the recipe)" if prints.uses_date else "no",
        "generation markers": "yes" if prints.has_markers else "no, and none are needed",
    }
    print("\n".join(f"{name + ':':22}{value}" for name, value in lines.items()) + "\n")
    said = (("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3 + 3?"), ("assistant", "6."))
    messages = [{"role": role, "content": text} for role, text in said]
    try:
        example = Example(tuple(found.encode(messages)), "an example")
    except RowError as error:
        raise ModelError(f"{folder}: {error}", "use a template that renders a conversation of two turns") from None
    title = "a conversation of two turns, what is trained marked:"
    print(as_text(branches(example, found.encoder), title, _colour()))


def check_place(path: Path | None) -> None:
    """A file can be written there; raises DiskError."""
    if path is not None and not path.absolute().parent.is_dir():
        raise DiskError(f"{path}: there is no folder {path.parent}", "make it, or choose another place")
    if path is not None and path.is_dir():
        raise DiskError(f"{path}: a folder, where a file is to be written", "give the file's name, too")


def _colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _compared(now: str, then: str | None) -> str:
    if then is None:
        return ""
    return " (the one it was trained with)" if now == then else f" (NOT the one it was trained with, {then[:12]})"


def mixes(files: list[str]) -> list[Mix]:
    from trivium.data.hub import local
    from trivium.data.rows import Mix

    if "" in files:
        raise DataError("a path is empty", "name a file, a folder or a glob")
    return [Mix(local(file)) for file in files]


def _asked(
    model: str | None,
    max_length: int | None,
    on_overflow: Any,
    stage: str | None,
    train_on: Any,
    fields: list[str] | None,
) -> Asked:
    """What the command line asks for; the tokenizer and template are read. Raises ModelError, DataError."""
    from trivium.data.check import Asked
    from trivium.data.formats import FIELDS

    kind = None
    if stage is not None:
        from trivium.stages import STAGES

        kind = STAGES[stage].rows
    pairs = [tuple(field.split("=", 1)) for field in fields or []]
    if wrong := [field for field in fields or [] if "=" not in field]:
        raise DataError(f"--field {wrong[0]}: not OURS=THEIRS", "e.g. --field prompt=question_text")
    for ours, theirs in pairs:
        if ours not in FIELDS or not theirs:
            what = f"--field {ours}={theirs}: no format has a field '{ours}'{nearest(ours, FIELDS)}"
            raise DataError(what if theirs else f"--field {ours}=: it names no field", f"ours are: {', '.join(FIELDS)}")
    if on_overflow == "split" and stage not in (None, "pretrain"):
        raise DataError("--on-overflow split: only text can be split", "use drop, truncate_left or truncate_right")
    told: dict[str, Any] = {
        "max_length": max_length, "on_overflow": on_overflow, "kind": kind, "train_on": train_on,
        "fields": tuple(sorted(pairs)),
    }  # fmt: skip
    if model is None:
        if max_length is not None or on_overflow is not None:
            named = "--max-length" if max_length is not None else "--on-overflow"
            raise DataError(f"{named} counts tokens, and there is no tokenizer to count with", "add --model DIR")
        return Asked(**told)
    from trivium.data.templates import chat_template
    from trivium.folder import reading_of

    tokenizer, context = reading_of(model)
    if max_length and context and max_length > context:
        raise DataError(f"--max-length {max_length} is more than the model's context of {context}", f"use {context}")
    return Asked(tokenizer=tokenizer, template=chat_template(tokenizer), context=context or 2**20, **told)
