"""The account of every row: used, held out, over-long, dropped, or set aside with file:line and the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trivium.errors import DataError

SHOWN = 5  # bad rows that are shown
REASONS = 1000  # different reasons that are counted apart

# What the making of examples counts besides, and how it is told; the numbers are what it counts and the length limit.
COUNTS = {
    "split": "{0:,} row{s} longer than {1:,} tokens split into pieces, nothing lost",
    "cut": "{0:,} row{s} longer than {1:,} tokens cut to it",
    "cut_trained": "{0:,} trained token{s} lost by that",
    "rewritten": "{0:,} conversation{s} in one sequence for each turn, as the chat template rewrites earlier turns "
    "(train_on: last trains the last turn alone)",
    "died": "{0:,} time{s} a process that prepared rows died, and they were prepared again",
    "good": "{0:,} answer{s} rated good",
    "bad": "{0:,} answer{s} rated bad",
    "weighted": "{0:,} row{s} with a weight of {its} own",
    "with_margin": "{0:,} row{s} with a margin of {its} own",
    "control_as_text": "{0:,} row{s} with what looks like a control token: it stays text",
}


class BadPlace(NamedTuple):
    """A row that is not used: where it stands, why, its tokens where it is over-long, and the row as it stands."""

    file: str
    line: int
    reason: str
    tokens: int | None
    row: str

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Ledger:
    """Counts of rows, and the tokens of the rows used.

    ``read == used + held_out + dropped + over_long + set_aside``."""

    source: str = ""  # the paths read, for messages
    read: int = 0
    used: int = 0
    held_out: int = 0
    dropped: int = 0  # duplicates that are not used, on request
    over_long: int = 0
    set_aside: int = 0
    duplicates: int = 0  # rows among the good ones that had been read before
    counts: dict[str, int] = field(default_factory=dict)  # see COUNTS
    reasons: dict[str, int] = field(default_factory=dict)  # how many rows were set aside for each reason
    first_bad: list[BadPlace] = field(default_factory=list)  # the first few set aside
    first_over_long: BadPlace | None = None
    limit: int = 0  # the most tokens a row may have
    longest: int = 0  # tokens of the longest row, over-long ones included
    tokens: int = 0  # of the rows used
    trained_tokens: int = 0
    bad: Callable[[], Iterator[BadPlace]] = field(default=lambda: iter(()), repr=False)  # all set aside or over-long

    def add(self, account: dict[str, Any], file: str) -> None:
        """Enter what became of the rows of one part (see `workers.part_of`)."""
        self.read += account["read"]
        for name, n in account["counts"].items():
            self.counts[name] = self.counts.get(name, 0) + n
        for line, reason, tokens, row in account["bad"]:
            place = BadPlace(file, line, reason, tokens, row)
            if tokens is not None:
                self.over_long += 1
                self.first_over_long = self.first_over_long or place
                self.longest = max(self.longest, tokens)
                continue
            self.set_aside += 1
            if len(self.first_bad) < SHOWN:
                self.first_bad.append(place)
            kind = reason.split("; the row begins")[0]
            key = kind if kind in self.reasons or len(self.reasons) < REASONS else "other reasons"
            self.reasons[key] = self.reasons.get(key, 0) + 1

    def balance(self) -> None:
        """Every row is in exactly one place."""
        placed = self.used + self.held_out + self.dropped + self.over_long + self.set_aside
        assert self.read == placed, f"{self.read} rows were read but {placed} accounted for"

    def check(self, allowed: float = 0.01, over_long_stops: bool = False) -> None:
        """Raises DataError where nothing is left to learn from, where more than ``allowed`` of the rows are unusable,
        or where a row is over-long and nobody has said what becomes of such."""
        self.balance()
        if self.read == 0:
            raise DataError(f"no rows in {self.source}", "give a file with at least one row")
        if self.set_aside > allowed * self.read:
            raise self._too_bad()
        if over_long_stops and self.over_long:
            raise DataError(
                self._over_long_told(),
                "say what becomes of them, on_overflow: drop, truncate_left or truncate_right; or raise max_length",
            )
        if self.used:
            return
        if self.set_aside >= max(1, self.over_long):
            raise self._too_bad()
        if self.over_long:
            raise DataError(
                f"nothing to learn from in {self.source}: {self._over_long_told()}",
                f"the longest row has {self.longest} tokens: raise max_length, or split the rows",
            )
        what = f"nothing to learn from in {self.source}: every usable row is held out"
        raise DataError(what, "hold out fewer rows")

    def _over_long_told(self) -> str:
        first = self.first_over_long
        assert first is not None, "an over-long row has a place"
        return (
            f"{self.over_long} of {self.read} rows have more than {self.limit} tokens "
            f"(first {first.origin}: {first.tokens}; longest {self.longest})"
        )

    def _too_bad(self) -> DataError:
        first = self.first_bad[0]
        share = math.ceil(100 * self.set_aside / self.read) / 100
        return DataError(
            f"{first.origin}: {first.reason} ({self.set_aside} of {self.read} rows cannot be used)",
            f"mend these rows, or allow so many with bad_rows: {share:g}"
            if self.used
            else "mend these rows: no row of this data can be used",
        )

    def as_dict(self) -> dict[str, Any]:
        """All numbers, and the most frequent reasons, for a run's record."""
        names = ("read", "used", "held_out", "dropped", "over_long", "set_aside", "duplicates", "limit", "longest",
                 "tokens", "trained_tokens")  # fmt: skip
        reasons = dict(sorted(self.reasons.items(), key=lambda item: -item[1])[:20])
        return {n: getattr(self, n) for n in names} | {k: v for k, v in self.counts.items() if v} | {"reasons": reasons}

    def lines(self) -> list[str]:
        """The account as a few lines to print."""
        found = [
            f"{self.used:,} of {self.read:,} rows used: {self.tokens:,} tokens, {self.trained_tokens:,} of them trained"
        ]
        if self.held_out:
            found.append(f"{_rows(self.held_out)} held out for evaluation")
        found += [
            told.format(n, self.limit, s="s" * (n != 1), its="their" if n != 1 else "its")
            for name, told in COUNTS.items()
            if (n := self.counts.get(name, 0))
        ]
        if self.over_long and self.first_over_long:
            first = self.first_over_long
            found.append(
                f"{_rows(self.over_long)} not used, longer than {self.limit:,} tokens "
                f"(first {first.origin}: {first.tokens:,}; longest {self.longest:,})"
            )
        if self.duplicates:
            done = "left out" if self.dropped else "used all the same (duplicates: drop leaves them out)"
            found.append(f"{_rows(self.duplicates)} that stood there before, word for word: {done}")
        if self.set_aside:
            found.append(f"{_rows(self.set_aside)} set aside:")
            found += [f"  {place.origin}: {place.reason}" for place in self.first_bad]
        if self.set_aside > SHOWN:
            found.append(f"  ... and {self.set_aside - SHOWN:,} more")
        return found

    def write_quarantine(self, path: Path) -> None:
        """The rows set aside and the over-long ones, as JSON lines: ``{"origin", "reason", "row"}``."""
        with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            for place in self.bad():
                line = {"origin": place.origin, "reason": place.reason, "row": _as_it_was(place.row)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _as_it_was(row: str) -> Any:
    """A row that could be read, as the object it is; else its text."""
    try:
        value = json.loads(row)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a character is text that no file holds
    except (ValueError, RecursionError):
        return row
    return value
