"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import typer

from trivium.cli import data, run, talk
from trivium.errors import Interrupted, UserError

app = typer.Typer(
    name="trivium",
    help="Pretraining, supervised fine-tuning and preference tuning of a language model in one declared run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
run.add_to(app)
data.add_to(app)
talk.add_to(app)


def main() -> None:
    """Run a command; a user's mistake becomes its message and exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own progress bars; ours says what is going on
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminate)
    try:
        app(standalone_mode=True)
    except UserError as error:
        _stop(error, error.exit_code)
    except (_Stopped, KeyboardInterrupt):
        kept = "; finished stages are kept" if sys.argv[1:2] in (["run"], ["demo"]) else ""
        _stop(Interrupted(f"interrupted{kept}", "run the same command again to go on"), 75)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt, which the command-line library would answer in its own way."""


def _terminate(number: int, frame: Any) -> None:
    raise _Stopped


def _stop(error: UserError, code: int) -> None:
    print(f"{'' if not sys.stderr.isatty() else chr(13)}error: {error}", file=sys.stderr)
    sys.exit(code)
