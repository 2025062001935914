"""The lineage as a drawing: every model a box, every stage an arrow from the model it started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 158, 58, 34, 14


@dataclass(frozen=True)
class Box:
    """``key`` is its name in ``parent`` of others; ``lines`` are written under its name."""

    key: str
    parent: str | None
    name: str
    lines: tuple[str, ...]
    colour: str


def lineage(boxes: Sequence[Box], title: str) -> str:
    """Roots to the left; a box stands beside its first child, later children below."""
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    free = 0
    by_parent: dict[str | None, list[Box]] = {}
    known = {b.key for b in boxes}
    for box in boxes:
        by_parent.setdefault(box.parent if box.parent in known else None, []).append(box)

    def put(box: Box, column: int) -> None:
        nonlocal free
        rows[box.key], columns[box.key] = free, column
        children = by_parent.get(box.key, [])
        for child in children:
            put(child, column + 1)
        if not children:
            free += 1

    for root in by_parent.get(None, []):
        put(root, 0)
    width = (max(columns.values()) + 1) * (BOX_WIDTH + GAP_X) - GAP_X + 2
    height = free * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2

    def corner(key: str) -> tuple[int, int]:
        return 1 + columns[key] * (BOX_WIDTH + GAP_X), 1 + rows[key] * (BOX_HEIGHT + GAP_Y)

    parts = [f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" class="lineage" role="img" '
             f'aria-label="{escape(title)}">']  # fmt: skip
    for box in boxes:
        if box.parent in known:
            (x0, y0), (x1, y1) = corner(str(box.parent)), corner(box.key)
            x0, y0, y1 = x0 + BOX_WIDTH, y0 + BOX_HEIGHT // 2, y1 + BOX_HEIGHT // 2
            bend = x0 + GAP_X // 2
            parts.append(f'<path class="arrow" d="M{x0} {y0}C{bend} {y0} {bend} {y1} {x1 - 5} {y1}"/>'
                         f'<path class="head" d="M{x1} {y1}l-7 -4v8z"/>')  # fmt: skip
    for box in boxes:
        x, y = corner(box.key)
        where = f'x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}"'
        parts.append(f'<rect class="box {box.colour}" {where} rx="6"/>')
        parts.append(f'<text class="name" x="{x + 10}" y="{y + 18}">{escape(_short(box.name, 20))}</text>')
        for n, line in enumerate(box.lines[:2]):
            parts.append(f'<text class="small" x="{x + 10}" y="{y + 34 + 15 * n}">{escape(_short(line, 25))}</text>')
    return "".join([*parts, "</svg>"])


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
