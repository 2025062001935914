"""Where the names of marks stand in a plot, on a grid of cells, so that no two of them overlap.

    labels = placed([Mark(10, 4, "lora"), Mark(11, 4, "dora")], columns=60, rows=20)

A name stands beside its mark, or above or below it with a leader. Marks in one cell share their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A point of the plot in the cell (``column``, ``row``), rows counted from the top."""

    column: int
    row: int
    name: str


@dataclass(frozen=True)
class Label:
    """The name of the marks in a cell begins at (``column``, ``row``)."""

    mark: Mark
    column: int
    row: int

    @property
    def side(self) -> str:
        """Where from its mark: left or right."""
        return "right" if self.column > self.mark.column else "left"


def merged(marks: Sequence[Mark]) -> list[Mark]:
    """One mark for each cell, with all its names."""
    names: dict[tuple[int, int], list[str]] = {}
    for mark in marks:
        names.setdefault((mark.column, mark.row), []).append(mark.name)
    return [Mark(column, row, ", ".join(found)) for (column, row), found in names.items()]


def placed(marks: Sequence[Mark], columns: int, rows: int, reach: int = 0) -> list[Label]:
    """A label for every mark that `merged` gives; a name that finds no place at all is left out.

    ``reach``: how many rows above and below its own a name takes, where rows are lower than letters.
    """
    marks = merged(marks)
    taken = {cell for m in marks for cell in _block(m.row, m.column, m.column, reach)}
    beside = {(column + d, row) for column, row in taken for d in (-1, 1)}  # free of other marks' names
    found: list[Label] = []
    for mark in sorted(marks, key=lambda m: -_near(m, marks)):  # those with the least room choose first
        own = _block(mark.row, mark.column - 1, mark.column + 1, reach)
        for label in _places(mark, rows, reach):
            end = label.column + len(mark.name)
            name, line = _block(label.row, label.column - 1, end, reach), set(leader(label)) - own
            if label.column >= 0 and end <= columns and not (name - own) & (taken | beside) and not line & taken:
                taken |= name | line
                found.append(label)
                break
    return found


def _block(row: int, first: int, last: int, reach: int) -> set[tuple[int, int]]:
    return {(column, r) for column in range(first, last + 1) for r in range(row - reach, row + reach + 1)}


def _near(mark: Mark, marks: Sequence[Mark]) -> int:
    return sum(abs(mark.column - m.column) < 14 and abs(mark.row - m.row) < 2 for m in marks)


def _places(mark: Mark, rows: int, reach: int) -> Iterator[Label]:
    """From the best place to the worst."""
    for away in (0, *range(1 + reach, rows)):
        for row in dict.fromkeys((mark.row - away, mark.row + away)):
            if reach <= row < rows - reach or not away:
                for shift in (0, 3, 6) if away else (0,):
                    yield Label(mark, mark.column + 2 + shift, row)
                    yield Label(mark, mark.column - 1 - shift - len(mark.name), row)


def leader(label: Label) -> list[tuple[int, int]]:
    """The cells from a mark to a name above or below it: straight up or down, then across."""
    mark = label.mark
    if label.row == mark.row:
        return []
    step = 1 if label.row > mark.row else -1
    edge = label.column - 1 if label.side == "right" else label.column + len(mark.name)
    across = range(*((mark.column, edge) if edge > mark.column else (edge + 1, mark.column + 1)))
    return [*((mark.column, row) for row in range(mark.row + step, label.row, step)), *((c, label.row) for c in across)]
