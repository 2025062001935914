"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys

import typer

from trivium.circles import put_off
from trivium.cli import compare, data, judge, merge, plan, run, talk
from trivium.errors import DiskError, Interrupted, OutOfMemory, RecipeError, UserError
from trivium.files import NO_ROOM
from trivium.interrupt import Stopped, asked, ignore, stop_at_once
from trivium.lock import let_go
from trivium.terminal import mute, say
from trivium.train.passes import REMEDY, ran_out, reason_of
from trivium.train.processes import asked_for, current, together

WRITERS = (["run"], ["demo"], ["compare"])  # what goes on where it was

app = typer.Typer(
    name="trivium",
    help="Pretraining, supervised fine-tuning and preference tuning of a language model in one declared run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
run.add_to(app)
plan.add_to(app)
compare.add_to(app)
data.add_to(app)
talk.add_to(app)
merge.add_to(app)
judge.add_to(app)


def main() -> None:
    """Run a command; a user's mistake becomes its message and exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own progress bars; ours says what is going on
    put_off()
    stop_at_once()
    with together():
        _run()


def _run() -> None:
    try:
        if asked_for():
            _join()
        app(standalone_mode=True)
    except UserError as error:
        _stop(error)
    except BrokenPipeError:
        _close_output()
        sys.exit(0)
    except BaseException as error:
        # a library that was being imported may have made an error of its own of the interruption
        if asked() or isinstance(error, (Stopped, KeyboardInterrupt)):
            kept = "; finished stages and checkpoints are kept" if sys.argv[1:2] in WRITERS else ""
            _stop(Interrupted(f"interrupted{kept}", "run the same command again to go on"))
        if ran_out(error):
            kept = "finished stages and checkpoints are kept; " if sys.argv[1:2] in WRITERS else ""
            _stop(OutOfMemory(f"memory ran out ({reason_of(error)})", kept + REMEDY))
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            _close_output()
            what = f"the output cannot be written ({error.strerror})"
            _stop(DiskError(what, "free some space; what was made is kept, and the same command shows it again"))
        raise


def _join() -> None:
    """Find the other processes. Raises RecipeError for a command that knows nothing of them."""
    current().connect()
    if sys.argv[1:2] != ["run"]:
        what = f"trivium {' '.join(sys.argv[1:2])}: only `trivium run` can be started in several processes"
        raise RecipeError(what, "start it without torchrun")


def _close_output() -> None:
    """What is still to be printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(error: UserError) -> None:
    ignore()
    let_go()
    code, tells = current().last_words(error)
    if tells:
        mute(False)
        say(f"{'' if not sys.stderr.isatty() else chr(13)}error: {error}")
    sys.exit(code)
