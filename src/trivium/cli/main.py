"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys

import typer

from trivium.cli import data, run, talk
from trivium.errors import Interrupted, UserError
from trivium.interrupt import Stopped, stop_at_once
from trivium.terminal import say

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
    stop_at_once()
    try:
        app(standalone_mode=True)
    except UserError as error:
        _stop(error, error.exit_code)
    except (Stopped, KeyboardInterrupt):
        kept = "; finished stages are kept" if sys.argv[1:2] in (["run"], ["demo"]) else ""
        _stop(Interrupted(f"interrupted{kept}", "run the same command again to go on"), 75)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _stop(error: UserError, code: int) -> None:
    say(f"{'' if not sys.stderr.isatty() else chr(13)}error: {error}")
    sys.exit(code)
