"""The account of every row: used, held out, over-long, or set aside with file:line and the reason."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.errors import DataError


@dataclass
class Ledger:
    """Counts of rows, and the tokens of the rows used. ``read == used + held_out + over_long + len(set_aside)``."""

    source: str = ""  # the paths read, for messages
    read: int = 0
    used: int = 0
    held_out: int = 0
    over_long: int = 0
    split: int = 0  # rows among those used that were split into pieces
    duplicates: int = 0  # rows among those read that had been read before; they are used
    set_aside: list[tuple[str, str]] = field(default_factory=list)  # (origin, reason)
    over_long_at: list[tuple[str, int]] = field(default_factory=list)  # (origin, tokens)
    limit: int = 0  # the most tokens a row may have
    longest: int = 0  # tokens of the longest row, over-long ones included
    tokens: int = 0  # of the rows used
    trained_tokens: int = 0

    def balance(self) -> None:
        """Every row is in exactly one place."""
        placed = self.used + self.held_out + self.over_long + len(self.set_aside)
        assert self.read == placed, f"{self.read} rows were read but {placed} accounted for"

    def check(self, allowed: float = 0.01) -> None:
        """Raises DataError where nothing is left to learn from, or more than ``allowed`` of the rows are unusable."""
        self.balance()
        if self.read == 0:
            raise DataError(f"no rows in {self.source}", "Give a file with at least one row.")
        bad = len(self.set_aside)
        if self.used and bad <= allowed * self.read:
            return
        if self.over_long > bad:
            raise DataError(
                f"nothing to learn from in {self.source}: {self.over_long} of {self.read} rows have more than "
                f"{self.limit} tokens (first {self.over_long_at[0][0]}: {self.over_long_at[0][1]})",
                f"The longest row has {self.longest} tokens: raise max_length, or split the rows.",
            )
        if not bad:
            raise DataError(
                f"nothing to learn from in {self.source}: every usable row is held out", "Hold out fewer rows."
            )
        origin, reason = self.set_aside[0]
        raise DataError(
            f"{origin}: {reason} ({bad} of {self.read} rows cannot be used)",
            f"Mend these rows, or allow so many with bad_rows: {math.ceil(100 * bad / self.read) / 100:g}."
            if self.used
            else "Mend these rows: no row of this data can be used.",
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything but the long lists, for a run's record."""
        names = ("read", "used", "held_out", "over_long", "split", "duplicates", "limit", "longest", "tokens")
        return {name: getattr(self, name) for name in names} | {
            "trained_tokens": self.trained_tokens,
            "set_aside": len(self.set_aside),
            "reasons": self.reasons(),
        }

    def reasons(self) -> dict[str, int]:
        """How many rows were set aside for each reason, the most frequent first."""
        counts: dict[str, int] = {}
        for _, reason in self.set_aside:
            counts[reason] = counts.get(reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1])[:20])

    def lines(self) -> list[str]:
        """The account as a few lines to print."""
        found = [
            f"{self.used:,} of {self.read:,} rows used: {self.tokens:,} tokens, {self.trained_tokens:,} of them trained"
        ]
        if self.held_out:
            found.append(f"{self.held_out:,} rows held out for evaluation")
        if self.split:
            found.append(f"{self.split:,} rows longer than {self.limit:,} tokens split into pieces, nothing lost")
        if self.over_long:
            origin, tokens = self.over_long_at[0]
            found.append(
                f"{self.over_long:,} rows set aside, longer than {self.limit:,} tokens "
                f"(first {origin}: {tokens:,}; longest {self.longest:,})"
            )
        if self.duplicates:
            found.append(f"{self.duplicates:,} rows were there before, word for word")
        if self.set_aside:
            found.append(f"{len(self.set_aside):,} rows set aside:")
            found += [f"  {origin}: {reason}" for origin, reason in self.set_aside[:5]]
        if len(self.set_aside) > 5:
            found.append(f"  ... and {len(self.set_aside) - 5:,} more")
        return found

    def write_quarantine(self, path: Path) -> None:
        """The rows set aside and the over-long ones, as JSON lines ``{"origin", "reason"}``."""
        over = [(o, f"{n} tokens, more than {self.limit}") for o, n in self.over_long_at]
        with path.open("w", encoding="utf-8") as stream:
            for origin, reason in [*self.set_aside, *over]:
                stream.write(json.dumps({"origin": origin, "reason": reason}, ensure_ascii=False) + "\n")
