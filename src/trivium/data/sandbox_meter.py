"""What a rendering of a chat template may cost, and the meter that counts it, in bytes, and looks at the clock.
A step that could be long or large is checked before it is taken. This needs no signals, so it holds in any thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import ItemsView, KeysView, Sequence, ValuesView
from types import MethodType
from typing import Any

from jinja2 import Undefined
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Namespace

SECONDS = 1.5  # of this thread's processor time, which a busy machine does not use up
TOO_LONG = "takes more than"  # what is said then; to try once more would take as long again
CHARACTERS = 16_000_000  # printed, with 8 for every piece
MEMORY = 160 << 20  # bytes that a rendering makes in all, freed or not
SOURCE, BLOCKS = 64_000, 20  # characters of a template, loops and macros in each other; in use are 20,000 and 4
LEVEL, DEPTH = 1_000_000, 100  # entries side by side and containers in each other that are printed or compared
ENTRIES = 4096  # of a mapping that a template makes: keys can be chosen so that all of them collide
BITS = 4096  # of a whole number
LOOK = 20_000  # what is spent between two looks at the clock
SMALL = 1000  # characters of a text that no single step can make anything large of

_SCALARS = frozenset({str, int, float, bool, type(None), Undefined})
_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)


class TemplateRefused(Exception):
    """``str()`` is one short line: the template's own message, or the limit that it broke."""


class Meter:
    """What a rendering has cost so far. Every method raises TemplateRefused where that is too much."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.spent, self.look_at, self.deadline = 0, LOOK, 0.0

    def spend(self, cost: int) -> bool:
        self.spent += cost
        if self.spent > self.look_at:
            self.room(0)
            now = time.thread_time()
            self.deadline = self.deadline or now + SECONDS  # most renderings end before they look and read no clock
            if now > self.deadline:
                raise TemplateRefused(f"the template {TOO_LONG} {SECONDS:g} seconds")
            self.look_at = self.spent + LOOK
        return True

    def room(self, cost: int) -> None:
        """To be asked before a step that could make ``cost`` bytes."""
        if self.spent + cost > MEMORY:
            raise TemplateRefused(f"the template makes more than {MEMORY >> 20} MiB of text and lists")

    def keep(self, value: Any) -> Any:
        """Pays for a new text or list."""
        if isinstance(value, str):
            self.spend(sys.getsizeof(value))
        elif isinstance(value, (list, tuple)):
            self.spend(64 + 8 * len(value))
        return value

    def few(self, value: Any) -> Any:
        """Pays for a mapping of these entries."""
        self.spend(300 + 100 * len(value))
        if len(value) > ENTRIES:
            raise TemplateRefused(f"the template makes a mapping or a set of more than {ENTRIES} entries")
        return value

    def size(self, value: Any) -> tuple[int, int, int]:
        """Characters, entries and depth of a value written out: a list that holds one list twice counts it twice."""
        characters = entries = depth = 0
        level = [value]
        while level:
            entries, depth = entries + len(level), depth + 1
            self.spend(8 * len(level))
            below: list[Any] = []
            for item in level:
                characters += 64
                if isinstance(item, (str, range)):
                    characters += len(item)
                elif isinstance(item, int):
                    characters += item.bit_length() // 3
                elif isinstance(item, Macro):
                    characters += len(item.name or "")
                elif isinstance(item, MethodType):
                    below.append(item.__self__)
                elif isinstance(item, Namespace):
                    below.append(object.__getattribute__(item, "_Namespace__attrs"))
                elif isinstance(item, _CONTAINERS):
                    if len(below) + 2 * len(item) > LEVEL or depth > DEPTH:
                        raise TemplateRefused("the template prints or compares too large a list")
                    below.extend(item)
                    below.extend(item.values() if isinstance(item, dict) else ())
            level = below
        return characters, entries, depth

    def plain(self, value: Any) -> Any:
        """Pays for comparing, hashing or searching a value."""
        if type(value) is str:
            if len(value) > SMALL:
                self.spend(len(value) >> 4)
        elif type(value) not in _SCALARS:
            size = self.size(value)[0]
            self.room(40 * size)  # where it is not found, the error writes it out
            self.spend(size >> 2)
        return value

    def text(self, value: Any) -> str:
        """A value as it is printed."""
        if isinstance(value, str):
            return value
        self.room(40 * self.size(value)[0])  # at worst ten characters of four bytes for an unprintable one
        return self.keep(str(value))

    def texts(self, values: Sequence[Any]) -> list[str]:
        return [str(self.text(value)) for value in values]

    def listed(self, value: Any) -> list[Any]:
        """The entries of anything that can be looped over."""
        if hasattr(value, "__len__") and not isinstance(value, LoopContext):
            self.spend(64 + (8 if isinstance(value, (list, tuple)) else 72) * len(value))
            return list(value)
        return [item for item in value if self.spend(72)]

    def short(self, value: Any) -> Any:
        """A number as text, a path of attributes or a date's format: none is long, and the time for each is."""
        if isinstance(value, str) and len(value) > 400:
            raise TemplateRefused("the template gives a number, an attribute or a format of more than 400 characters")
        return value

    def join(self, separator: str, texts: Sequence[Any]) -> str:
        size = sum(map(len, texts)) + len(separator) * len(texts)
        self.room(4 * size)
        return self.keep(separator.join(texts))
