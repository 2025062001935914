"""All that a chat template can do to values, each step paid for: operators, methods of text, filters, tests, formats.
No step takes long or makes much before the meter has been asked.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

from jinja2 import Undefined, pass_context
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS

from trivium.data.sandbox_meter import BITS, SMALL, Meter, TemplateRefused

_JSON = json.JSONEncoder(ensure_ascii=False)
_PERCENT = re.compile(r"%[-#0 +]*[0-9]{0,3}(?:\.[0-9]{0,3})?[diouxXeEfFgGcrs%]")

# What a template can call of an object. Strips, and searches from the end, take the product of both lengths.
_SEARCHING = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"})
_SPLITTING = frozenset({"split", "rsplit", "splitlines"})
_GROWING = frozenset({"center", "ljust", "rjust", "zfill", "join", "replace"})
_OTHERS = """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isprintable isspace istitle isupper lower partition removeprefix removesuffix startswith swapcase title upper"""
METHODS: dict[type, frozenset[str]] = {
    str: _SEARCHING | _SPLITTING | _GROWING | frozenset(_OTHERS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    LoopContext: frozenset({"changed", "cycle"}),
}


class Operations(Meter):
    """The steps, and the meter that they pay. Filters are the methods that begin with ``do_``, and some more."""

    def __init__(self, environment: SandboxedEnvironment) -> None:
        super().__init__()
        self.environment = environment

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Those with a space before their names are called by what ``sandbox_rewrite`` puts into the template alone."""
        inner = ("few", "joined", "listed", "part", "plain", "plus", "sought", "spend")
        return {
            **{f" {name}": getattr(self, name) for name in inner},
            **{name[3:]: getattr(self, name) for name in dir(self) if name.startswith("do_")},
            **{name: FILTERS[name] for name in ("abs", "count", "d", "default", "first", "last", "length")},
            **{name: partial(self.method, name) for name in ("capitalize", "lower", "upper")},
            **{name: partial(self.number, name) for name in ("float", "int")},
            **{name: partial(self.rewritten, name) for name in ("e", "escape", "safe", "title")},
            **{name: partial(self.in_order, name) for name in ("max", "min", "sort", "unique")},
            **{name: self.for_each(name) for name in ("map", "reject", "rejectattr", "select", "selectattr")},
            "list": self.listed,
            "string": self.text,
        }

    def tests(self) -> dict[str, Any]:
        free = "boolean callable defined escaped false float integer iterable mapping none number sameas sequence"
        ours: dict[str, Any] = {name: TESTS[name] for name in (*free.split(), "string", "true", "undefined")}
        compared = "== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le"
        for name in compared.split():
            ours[name] = lambda value, other, test=TESTS[name]: test(self.plain(value), self.plain(other))
        for name in ("divisibleby", "even", "odd"):  # they use %, which would format a text
            ours[name] = lambda value, *args, test=TESTS[name]: isinstance(value, (int, float)) and test(value, *args)
        ours["in"] = lambda value, other: self.plain(value) in self.sought(other)
        ours["lower"] = lambda value: self.plain(self.text(value)).islower()
        ours["upper"] = lambda value: self.plain(self.text(value)).isupper()
        return ours

    # --- operators

    def plus(self, *parts: Any) -> Any:
        """``a + b + ...``: most often texts, which are put together in one step."""
        size = 0
        for part in parts:
            if type(part) is not str:
                return reduce(partial(self.calculate, "+"), parts)
            size += len(part)
        if size > SMALL:
            return self.join("", parts)
        self.spent += 64 + 4 * size
        return "".join(parts)

    def joined(self, values: Sequence[Any]) -> str:
        return self.join("", self.texts(values))

    def calculate(self, operator: str, left: Any, right: Any) -> Any:
        operate = self.environment.binop_table[operator]
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if operator == "**" and isinstance(left, int) and left.bit_length() * right > BITS:
                raise OverflowError("too large a power")
            self.spend(32)
            return self.bounded(operate(self.bounded(left), self.bounded(right)))
        if operator == "%" and type(left) is str:
            return self.percent(left, right)
        if operator == "*" and isinstance(right, (str, list, tuple)):
            left, right = right, left
        if isinstance(left, (str, list, tuple)) and operator == "*" and isinstance(right, int):
            self.room(8 * len(left) * right)
        elif isinstance(left, (str, list, tuple)) and operator == "+" and isinstance(right, (str, list, tuple)):
            self.room(20 * (len(left) + len(right)))  # Markup escapes what is added to it
        elif not isinstance(left, Undefined) and not isinstance(right, Undefined):
            raise TypeError(f"{type(left).__name__} {operator} {type(right).__name__}")
        return self.keep(operate(left, right))

    def bounded(self, number: Any) -> Any:
        if isinstance(number, int) and number.bit_length() > BITS:
            raise OverflowError(f"a number of more than {BITS} bits")
        return number

    def percent(self, text: str, args: Any) -> str:
        """``text % args`` without named values and stars, and with widths of up to three digits."""
        if (count := len(_PERCENT.findall(text))) > SMALL or "%" in _PERCENT.sub("", text):
            raise TemplateRefused("the template formats with % in a way that is not allowed")
        self.room(4 * (len(text) + 2000 * count) + 40 * self.size(args)[0])
        return self.keep(text % args)

    def part(self, value: Any, *bounds: Any) -> Any:
        return self.keep(value[slice(*bounds)])

    def sought(self, value: Any) -> Any:
        return value if type(value) is dict else self.plain(value)

    # --- methods of text

    def call_text(self, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        text, name, size = method.__self__, method.__name__, len(method.__self__)
        if name not in METHODS[str] or (name in _GROWING and type(text) is not str):  # Markup escapes what is added
            raise TemplateRefused(f"the template calls {name} of a {type(text).__name__}")
        other = args[0] if args else kwargs.get("sep")
        if size < SMALL and name not in _GROWING and (other is None or (type(other) is str and len(other) < SMALL)):
            value = method(*args, **kwargs)
            self.spend(64 + 4 * size + (72 * len(value) if isinstance(value, (list, tuple)) else 0))
            return value
        self.spend(64 + (size >> 4))
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, (str, tuple)):
                self.spend(len(arg) + (size * len(arg) >> 2 if name in _SEARCHING else 0))
        if name in _SPLITTING:
            self.room(72 * (text.count(other) + 1 if isinstance(other, str) and other else size))
        elif name == "replace" and len(args) > 1 and isinstance(other, str) and isinstance(args[1], str):
            self.room(4 * (size + text.count(other) * len(args[1])))
        elif name == "join" and args:
            return self.join(text, self.listed(other))
        elif name in _GROWING:
            self.room(4 * other if isinstance(other, int) else 0)
        else:
            self.room(12 * size)  # in upper case a letter can become three
        value = method(*args, **kwargs)
        self.spend(sys.getsizeof(text) + 72 * len(value) if isinstance(value, (list, tuple)) else 0)
        return self.keep(value)

    def method(self, name: str, value: Any, *args: Any) -> str:
        return self.call_text(getattr(self.text(value), name), args, {})

    def rewritten(self, name: str, value: Any) -> str:
        text = self.text(value)
        self.room(40 * len(text))
        return self.keep(FILTERS[name](text))

    # --- filters

    def number(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        return FILTERS[name](self.short(value), *args, **kwargs)

    def do_trim(self, value: Any, chars: str | None = None) -> str:
        if chars is None and type(value) is str and len(value) < SMALL:
            self.spent += 4 * len(value)
            return value.strip()
        return self.method("strip", value, chars)

    def do_replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        value, old, new = self.texts((value, old, new))
        return self.call_text(value.replace, (old, new, -1 if count is None else count), {})

    def do_join(self, value: Any, separator: Any = "", attribute: Any = None) -> str:
        values = self.listed(value)
        if attribute is not None:
            values = list(map(make_attrgetter(self.environment, self.short(attribute)), values))
        return self.join(str(self.text(separator)), self.texts(values))

    def do_indent(self, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        self.room(72 * len(value))
        lines, step = 1 + len(value.splitlines()), len(width) if isinstance(width, str) else width
        self.room(4 * (len(value) + lines * step))
        return self.keep(FILTERS["indent"](value, width, first, blank))

    def do_format(self, value: Any, *args: Any) -> str:
        return self.percent(self.text(value), args)

    def do_items(self, value: Any) -> Iterator[Any]:
        if not isinstance(value, (dict, Undefined)):
            raise TypeError("items is for mappings")
        return iter(value.items() if isinstance(value, dict) else ())

    def do_reverse(self, value: Any) -> Any:
        return self.keep(value[::-1]) if isinstance(value, str) else reversed(self.listed(value))

    def do_dictsort(self, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        self.spend(4 * self.size(value)[0])
        return self.keep(FILTERS["dictsort"](value, *args, **kwargs))

    def do_tojson(self, value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        characters, entries, depth = self.size(value)
        self.room(24 * characters)  # a control character becomes six, of four bytes each beside one beyond the BMP
        if not ensure_ascii and indent is None and not options:
            return self.keep(_JSON.encode(value))
        if not options.keys() <= {"separators", "sort_keys"}:
            raise TypeError(f"tojson has no option {', '.join(options)}")
        step = indent if isinstance(indent, int) else len(indent or "")
        step = step * depth + sum(map(len, options.get("separators") or ()))
        self.room(entries * (4 * step + 512))  # with an indent, Python's encoder is slow
        return self.keep(json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options))

    def for_each(self, name: str) -> Callable[..., Any]:
        """``map``, ``select`` and their like. Jinja's are lazy: the work would be done where nothing counts it."""

        @pass_context
        def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            self.plain((args, kwargs))
            self.short(args[0] if args else kwargs.get("attribute"))
            values = self.listed(value) if value else value
            return iter(self.listed(FILTERS[name](context, values, *args, **kwargs)))

        return run

    def in_order(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """``sort``, ``unique``, ``min`` and ``max``."""
        values = self.listed(value)
        self.spend(4 * self.size(values)[0])
        for arg in (*args, *kwargs.values()):
            self.short(arg)
        if name != "unique":
            return self.keep(FILTERS[name](self.environment, values, *args, **kwargs))
        return iter(self.listed(FILTERS[name](self.environment, self.few(values), *args, **kwargs)))


class Formatter(SandboxedFormatter):
    """What ``text.format`` is to a template. A width has up to five digits."""

    def __init__(self, environment: SandboxedEnvironment, meter: Meter, text: str) -> None:
        super().__init__(environment)
        self._meter, self._text = meter, text

    def __call__(self, /, *args: Any, **kwargs: Any) -> str:
        self._meter.spend(32 * len(self._text))
        return self.vformat(self._text, args, kwargs)

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        self._meter.spend(64 * (1 + len(field_name)))
        return super().get_field(field_name, args, kwargs)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._meter.room(40 * self._meter.size(value)[0])
        return self._meter.keep(super().convert_field(value, conversion))

    def format_field(self, value: Any, format_spec: str) -> Any:
        if len(format_spec) > 64 or sum(map(str.isdigit, format_spec)) > 5:
            raise TemplateRefused("the template formats to too great a width")
        value = value if isinstance(value, (int, float)) else self._meter.text(value)
        return self._meter.keep(super().format_field(value, format_spec))
