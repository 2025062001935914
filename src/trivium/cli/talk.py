"""``trivium generate``, ``chat`` and ``inspect``: to use and look at what was trained."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from trivium.cli.given import there
from trivium.errors import ModelError

Folder = Annotated[
    str, typer.Argument(metavar="DIR", callback=there, help="A model or adapter folder, a .gguf file, or a hub id.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")]
Most = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after so many tokens.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")]


def add_to(app: typer.Typer) -> None:
    for command in (generate, chat, inspect):
        app.command(command.__name__)(command)


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to answer, or with --raw to continue; - reads standard input.")],
    temperature: Temperature = 0.0,
    max_new_tokens: Most = 256,
    seed: Seed = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.")
    ] = False,
    best_of: Annotated[int, typer.Option("--best-of", min=1, help="Draw so many answers, print the best.")] = 1,
    reward: Annotated[
        str | None, typer.Option("--reward", metavar="DIR", callback=there, help="The reward model that says so.")
    ] = None,
) -> None:
    """Answer one prompt."""
    if (best_of > 1) != (reward is not None):
        raise ModelError("--best-of and --reward go together", "give both, or none")
    if best_of > 1 and (temperature == 0 or raw):
        given = "--raw" if raw else "--temperature 0"
        raise ModelError(f"--best-of with {given}: there is nothing to choose from", "e.g. --temperature 0.8, no --raw")
    from trivium.talk import Talker

    prompt = _text(sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
    if not prompt.strip() and not raw:
        raise ModelError("the prompt is empty", "give a prompt, or --raw to let the model begin by itself")
    talker = Talker.open(folder)
    if reward is not None:
        from trivium.judging import best_answer

        print(best_answer(talker, prompt, reward, best_of, max_new_tokens, temperature, seed))
        return
    ids = talker.raw_prompt(prompt) if raw else talker.prompt([{"role": "user", "content": prompt}])
    for piece in talker.stream(ids, max_new_tokens, temperature, seed):
        print(piece, end="", flush=True)
    print()


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "save it as UTF-8"
        raise ModelError(f"the prompt is not UTF-8 text (byte 0x{data[error.start]:02x})", remedy) from None


def chat(
    folder: Folder,
    temperature: Temperature = 0.7,
    max_new_tokens: Most = 512,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends."""
    from trivium.talk import Talker

    talker = Talker.open(folder)
    messages = [{"role": "system", "content": system}] if system else []
    print("(an empty line ends)", file=sys.stderr)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except UnicodeDecodeError:
            raise ModelError("what was said is not UTF-8 text", "set the terminal to UTF-8") from None
        if not said:
            break
        messages.append({"role": "user", "content": said})
        answer = ""
        for piece in talker.stream(talker.prompt(messages), max_new_tokens, temperature, seed):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
        seed += 1


def inspect(
    folder: Folder,
    modules: Annotated[
        bool, typer.Option("--modules", help="Its modules with their shapes, and what each method would train there.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What a folder is: kind, parameters, bytes, and its whole lineage; or its modules."""
    if modules:
        from trivium.modules import modules_of as described
        from trivium.modules import shown
    else:
        from trivium.inspect import described, shown

    found = described(folder)
    if json:
        import json as codec

        print(codec.dumps(found, indent=1, ensure_ascii=False))
    else:
        print(shown(found))
