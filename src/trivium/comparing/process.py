"""Starts the runs of a comparison, one process after the other, and leaves none behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trivium import errors
from trivium.errors import Interrupted, UserError


def carry_out(recipe: Path, folder: Path, requests: Path | None = None) -> dict[str, Any]:
    """Carry out a recipe in a process of its own; returns what it tells (`worker`).

    An interruption here stops it after its step. Raises Interrupted, or whatever UserError ended it.
    """
    arguments = [str(recipe), str(folder), *([str(requests)] if requests else [])]
    with subprocess.Popen(
        [sys.executable, "-m", "trivium.comparing.worker", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # a file of the current folder is no library
        start_new_session=True,  # Ctrl-C is for this process, which closes the other one's input
    ) as process:
        try:
            told = _told(process)
        except BaseException:
            _stop(process)
            raise
    return told


def _told(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    text = process.stdout.read()
    code = process.wait()
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        if code < 0:
            remedy = "it may have needed more memory than there is: lower micro_batch_tokens"
            raise UserError(f"its process was killed by signal {-code}", remedy) from None
        remedy = "mend what it said last, then run the same command"
        raise UserError(f"its process ended with exit code {code}", remedy) from None
    if "error" in found:
        raise _error(found["error"])
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the run save its last step; asked again, end it. Raises Interrupted with where the run stands."""
    assert process.stdin is not None
    if process.poll() is not None:
        return
    try:
        with contextlib.suppress(OSError):
            process.stdin.close()
        _told(process)
    except Interrupted:
        raise
    except UserError:
        return
    except BaseException:
        process.kill()
        process.wait()
        raise


def _error(told: dict[str, str]) -> UserError:
    kind = getattr(errors, told["kind"])
    assert issubclass(kind, UserError), told
    found: UserError = kind(told["what"], told["remedy"])
    return found
