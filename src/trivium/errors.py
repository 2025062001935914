"""Everything that a user can be told went wrong, in one tree.

    UserError               what happened, and where; what to do about it           exit code
    ├── RecipeError         the recipe: a key, a value, a contradiction             2
    ├── DataError           the data: a file, a row, nothing to learn from          2
    ├── ModelError          a model, tokenizer, template or adapter folder          2
    ├── BusyError           another run has the folder                              2
    ├── DiskError           no room, no permission, not writable                    3
    ├── CheckpointError     what was saved is damaged, and nothing else is there    4
    ├── NonFiniteError      a loss or gradient that is not a number                 5
    ├── OutOfMemory         it does not fit into memory                             6
    └── Interrupted         stopped by a person or the system; run again            75

A user's mistake gets a UserError: one line of what and where, one line of remedy, never a traceback.
Our own mistake is an ``assert`` with a message, ends in a traceback and exit code 1.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. ``what`` says what was got and where, ``remedy`` what to do."""

    exit_code = 2

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = printable(what), printable(remedy)
        super().__init__(self.what, self.remedy)

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}"


class RecipeError(UserError):
    """The recipe names something that is not there, or contradicts itself."""


class DataError(UserError):
    """A data file or row cannot be used, or leaves nothing to learn."""


class ModelError(UserError):
    """A model, tokenizer, chat template or adapter folder cannot be used."""


class BusyError(UserError):
    """Another process is at work in the folder."""


class DiskError(UserError):
    """Something durable could not be written."""

    exit_code = 3


class CheckpointError(UserError):
    """What was saved is not as it was written, and there is nothing whole to go on from."""

    exit_code = 4


class NonFiniteError(UserError):
    """A loss or gradient was NaN or infinite; no weight was touched."""

    exit_code = 5


class OutOfMemory(UserError):
    """It does not fit into the memory of the device, or of the machine."""

    exit_code = 6


class Interrupted(UserError):
    """Stopped before the end; the same command goes on."""

    exit_code = 75


MOST = 700  # characters of a line that is told
# What steers a terminal, hides or turns round what follows, or is half a character.
_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, most: int = MOST) -> str:
    """``text`` on one line of at most ``most`` characters, as any terminal can show it: it may quote anybody's file."""
    text = " ".join(line.strip() for line in text.splitlines()) if "\n" in text else text
    if len(text) > most:
        text = f"{text[: most - 105]} ... {text[-100:]}"
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def said(error: BaseException, most: int = 160) -> str:
    """What a library raised, in words and on one line: names of Python's classes say nothing to a person."""
    text = " ".join(str(error)[:2000].split())
    if isinstance(error, KeyError):
        text = f"no {text}"
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"\b[A-Z]\w*(?:Error|Exception)\b:? ?", "", text).strip()
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return printable(text[:most] or name)


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` when one of ``names`` is close to ``name``, else ``""``."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


def listed(names: Iterable[str], most: int = 12) -> str:
    """The names there are, for an error line: ``a, b, c`` and how many were left out."""
    names = sorted(names)
    more = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def beside(path: Path) -> str:
    """``"; in runs there is: base, chat"``: what there is instead of ``path``; ``""`` where it exists, or nothing."""
    readable = not path.exists() and path.parent.is_dir() and os.access(path.parent, os.R_OK)
    names = [p.name for p in path.parent.iterdir()] if readable else []
    return f"; in {path.parent} there is: {listed(names)}" if names else ""
