"""Renders a chat template, a program that came with a downloaded model, so that it can do nothing but print.

    template = Template(source, tokenizer.special_tokens_map)
    text = template.render(messages, add_generation_prompt=True)

The text is the one that transformers' ``apply_chat_template`` gives. A template sees the messages, the tools and the
tokenizer's special tokens, and calls only its own macros, five functions, the filters below and harmless methods of
text, lists and mappings. A meter counts what a rendering makes, in bytes, and looks at the clock now and then; a step
that could be long or large is checked before it is taken. This needs no signals, so it holds in any thread.
Takes 0.3 to 1.0 of transformers' time, and loads neither it nor torch.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import date as Date
from datetime import datetime
from functools import partial, reduce
from itertools import accumulate
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 2.0  # of this thread's processor time, which a busy machine does not use up
CHARACTERS = 16_000_000  # printed, with 8 for every piece
MEMORY = 160 << 20  # bytes that a rendering makes in all, freed or not
SOURCE, BLOCKS = 64_000, 20  # characters of a template, loops and macros in each other; in use are 20,000 and 4
LEVEL, DEPTH = 1_000_000, 100  # entries side by side and containers in each other that are printed or compared
ENTRIES = 4096  # of a mapping that a template makes: keys can be chosen so that all of them collide
BITS = 4096  # of a whole number
LOOK = 20_000  # what is spent between two looks at the clock
SMALL = 1000  # characters of a text that no single step can make anything large of

# The names under which templates know an answer's reasoning; transformers hands each under all of them.
REASONING = ("reasoning_content", "thinking", "reasoning")

_JSON = json.JSONEncoder(ensure_ascii=False)
_PERCENT = re.compile(r"%[-#0 +]*[0-9]{0,3}(?:\.[0-9]{0,3})?[diouxXeEfFgGcrs%]")
_SCALARS = frozenset({str, int, float, bool, type(None), Undefined})
_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)

# What a template can call of an object. Strips, and searches from the end, take the product of both lengths.
_SEARCHING = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"})
_SPLITTING = frozenset({"split", "rsplit", "splitlines"})
_GROWING = frozenset({"center", "ljust", "rjust", "zfill", "join", "replace"})
_OTHERS = """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isprintable isspace istitle isupper lower partition removeprefix removesuffix startswith swapcase title upper"""
_METHODS: dict[type, frozenset[str]] = {
    str: _SEARCHING | _SPLITTING | _GROWING | frozenset(_OTHERS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    LoopContext: frozenset({"changed", "cycle"}),
}
_OF_DICT = frozenset(dir(dict))


class TemplateRefused(Exception):
    """``str()`` is one short line: the template's own message, or the limit that it broke."""


class _Meter:
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
                raise TemplateRefused(f"the template takes more than {SECONDS:g} seconds")
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


class _Operations(_Meter):
    """All that a template can do, each step paid for. Filters are the methods that begin with ``do_``."""

    def __init__(self, environment: _Environment) -> None:
        super().__init__()
        self.environment = environment

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Those with a space before their names are called by the compiled template itself."""
        ours: dict[str, Callable[..., Any]] = {" joined": lambda values: self.join("", self.texts(values))}
        ours |= {" listed": self.listed, " part": self.part, " plain": self.plain, " plus": self.plus}
        ours |= {
            " few": self.few,
            " sought": self.sought,
            " tick": self.spend,
            "list": self.listed,
            "string": self.text,
        }
        ours |= {name: FILTERS[name] for name in ("abs", "count", "d", "default", "first", "last", "length")}
        ours |= {name: partial(self.method, name) for name in ("capitalize", "lower", "upper")}
        ours |= {name: partial(self.rewritten, name) for name in ("e", "escape", "safe", "title")}
        ours |= {name: partial(self.in_order, name) for name in ("max", "min", "sort", "unique")}
        ours |= {name: self.for_each(name) for name in ("map", "reject", "rejectattr", "select", "selectattr")}
        return ours | {name[3:]: getattr(self, name) for name in dir(self) if name.startswith("do_")}

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
        if name not in _METHODS[str] or (name in _GROWING and type(text) is not str):  # Markup escapes what is added
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

    def do_int(self, value: Any, default: int = 0, base: int = 10) -> int:
        return FILTERS["int"](self.short(value), default, base)

    def do_float(self, value: Any, default: float = 0.0) -> float:
        return FILTERS["float"](self.short(value), default)

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


class _Formatter(SandboxedFormatter):
    """What ``text.format`` is to a template. A width has up to five digits."""

    def __init__(self, environment: _Environment, text: str) -> None:
        super().__init__(environment)
        self._meter, self._text = environment.meter, text

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


class _Namespace(Namespace):
    """As in transformers: no attribute may begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that an attribute can be named ``self``
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise TemplateRefused(f"the template stores {name[:40]!r} in a namespace")
        super().__setitem__(name, value)


class _Dict:
    """What ``dict`` is to a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Generation(Extension):
    """``{% generation %}``: its body is printed as it is, and noted."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        environment: Any = self.environment
        text = caller()
        environment.noted.append((len(environment.pieces), len(text)))
        return text


_RUNS = (nodes.For, nodes.Macro, nodes.CallBlock)


class _Rewriter(NodeTransformer):
    """Puts the meter where Jinja calls nothing: loops, macros, ``+``, ``~``, slices, comparisons, keys, ``*args``."""

    def __init__(self) -> None:
        self.depth = self.kept = 0  # blocks around the node, and those whose text is not printed where they stand
        self.markers = self.lost_markers = self.dates = False

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        self.dates = self.dates or node.name == "strftime_now"
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._inside(node, node.recursive)
        tick = _tick(node.body)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        node.test = node.test and nodes.And(tick, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        generation = isinstance(node, nodes.CallBlock) and isinstance(node.call.node, nodes.ExtensionAttribute)
        self.markers = self.markers or generation
        self.lost_markers = self.lost_markers or (generation and self.kept > 0)
        self._inside(node)
        node.body.insert(0, nodes.ExprStmt(_tick([*node.body, *node.defaults]), lineno=node.lineno))
        return node

    def visit_AssignBlock(self, node: nodes.Node) -> nodes.Node:
        return self._inside(node)

    def _inside(self, node: nodes.Node, kept: bool = True) -> nodes.Node:
        if self.depth >= BLOCKS:
            raise TemplateSyntaxError(f"more than {BLOCKS} blocks in each other", node.lineno)
        self.depth, self.kept = self.depth + 1, self.kept + kept
        self.generic_visit(node)
        self.depth, self.kept = self.depth - 1, self.kept - kept
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        self.generic_visit(node)
        left: Any = node.left
        terms = (left.node, *left.args) if isinstance(left, nodes.Filter) and left.name == " plus" else (left,)
        return _filter("plus", *terms, node.right)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter("part", node.node, *(nodes.Const(None) if bound is None else bound for bound in bounds))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        names = ["sought" if getattr(side, "op", "") in ("in", "notin") else "plain" for side in sides]
        if names == ["plain"] * 2 and any(isinstance(side.expr, nodes.Const) for side in sides):
            return node  # to compare anything with a text or number takes no time
        for side, name in zip(sides, names, strict=True):
            parts = side.expr.items if isinstance(side.expr, (nodes.List, nodes.Tuple)) else (side.expr,)
            if not all(isinstance(part, nodes.Const) for part in parts):
                side.expr = _filter(name, side.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = node.key if isinstance(node.key, nodes.Const) else _filter("plain", node.key)
        return node

    def visit_Call(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.dyn_args = node.dyn_args and _filter("listed", node.dyn_args)
        node.dyn_kwargs = node.dyn_kwargs and _filter("few", node.dyn_kwargs)
        return node

    def visit_Block(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError(f"a chat template cannot use {type(node).__name__.lower()}", node.lineno)

    visit_CallBlock = visit_Macro
    visit_FilterBlock = visit_AssignBlock
    visit_Filter = visit_Test = visit_Call
    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_ScopedEvalContextModifier = visit_Block


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, f" {name}", list(args), [], None, None, lineno=node.lineno)


def _tick(body: Sequence[nodes.Node]) -> nodes.Filter:
    """Pays for one run of ``body``: what its nodes make at least, in bytes, and 1 for a node that makes nothing."""
    weight, below = 8, list(body)
    while below:
        node = below.pop()
        if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)):
            weight += 240 + 72 * len(node.items)  # with a small object for each entry
        elif isinstance(node, nodes.Output):
            weight += 8 * len(node.nodes)
        weight += 800 if isinstance(node, _RUNS) else 1
        # What is inside of a loop or macro is paid for there.
        below.extend(node.iter_child_nodes(exclude=("body",) if isinstance(node, _RUNS) else ()))
    return _filter("tick", nodes.Const(weight, lineno=body[0].lineno if body else 1))


class _Environment(ImmutableSandboxedEnvironment):
    """Compiles and runs one template."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        self.meter = _Operations(self)
        self.date: Date | None = None
        self.pieces: list[str] = []  # printed so far
        self.noted: list[tuple[int, int]] = []  # of each generation block the pieces before it and its characters
        extensions = (_Generation, "jinja2.ext.loopcontrols")
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=self._printed
        )
        self.filters, self.tests = self.meter.filters(), self.meter.tests()
        # Functions, as a template can read what a bound method or a partial is bound to.
        functions: dict[str, Any] = {
            "raise_exception": lambda message: self._raise(message),
            "strftime_now": lambda format: self._strftime(format),
            "range": safe_range,
        }
        self.globals = {**functions, "dict": _Dict(), "namespace": _Namespace}
        self._functions = frozenset(map(id, functions.values()))

    def _raise(self, message: Any) -> None:
        raise TemplateError(self.meter.text(message))

    def _strftime(self, form: str) -> str:
        date = self.date or Date.today()
        return self.meter.keep(datetime(date.year, date.month, date.day).strftime(self.meter.short(form)))

    def _printed(self, value: Any) -> Any:
        return value if type(value) is str else self.meter.text(value)

    def concat(self, pieces: Any) -> str:
        return self.meter.join("", pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return self.meter.calculate(operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICT:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (kind is LoopContext or kind is _Namespace) and attribute[0] != "_":
            value = getattr(obj, attribute, None)
            if value is not None:
                return value
        if kind is not dict and not isinstance(obj, str):
            return super().getattr(obj, attribute)
        if attribute in _METHODS[dict if kind is dict else str]:
            return getattr(obj, attribute)
        if kind is str and attribute == "format":
            self.meter.spend(400)
            return _Formatter(self, obj)
        known = hasattr(obj, attribute)
        return self.unsafe_undefined(obj, attribute) if known else self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) is str:
            if type(obj) is dict and argument in obj:
                return obj[argument]
            if type(obj) is dict or isinstance(obj, str):
                return self.getattr(obj, argument)
        return super().getitem(obj, self.meter.plain(argument))

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(" "):
            raise TemplateRefused(f"the template calls the filter {name[:40]!r}")
        return super().call_filter(name, *args, **kwargs)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        kind = type(obj)
        if kind is Macro:
            return obj(context.eval_ctx, *args, **kwargs)
        if kind is BuiltinMethodType or kind is MethodType:
            return self._call_method(obj, args, kwargs)
        if kind is _Dict or obj is _Namespace:
            return obj(*map(self._entries, args), **self.meter.few(kwargs))
        if id(obj) in self._functions or kind in (_Formatter, LoopContext, Undefined):
            return obj(*args, **kwargs)
        raise TemplateRefused(f"the template calls a {kind.__name__}")

    def _call_method(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner, name = method.__self__, method.__name__
        if isinstance(owner, str):
            return self.meter.call_text(method, args, kwargs)
        if type(owner) is _Generation:
            return method(**kwargs)
        if name in _METHODS.get(type(owner), ()):
            for value in args if type(owner) is dict else (*args, owner):
                self.meter.plain(value)
        elif type(owner) is _Dict and args:
            args = (self._entries(args[0]), *args[1:])
        else:
            raise TemplateRefused(f"the template calls {name} of a {type(owner).__name__}")
        return method(*args, **kwargs)

    def _entries(self, value: Any) -> Any:
        return self.meter.plain(self.meter.few(value if isinstance(value, dict) else self.meter.listed(value)))


class Template:
    """A compiled chat template. May be used from several threads, which then wait for each other.

    ``variables`` are the tokenizer's special tokens (``special_tokens_map``). Raises TemplateRefused, with the line,
    for a template that does not compile or is too long.
    """

    has_markers: bool  # it has {% generation %} blocks
    uses_date: bool  # it mentions strftime_now

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        if len(source) > SOURCE:
            raise TemplateRefused(f"the template is longer than {SOURCE:,} characters")
        self.source, self.variables = source, dict(variables)
        self._environment, self._lock = _Environment(), threading.Lock()
        rewriter, reason = _Rewriter(), ""
        try:
            self._template = self._environment.from_string(rewriter.visit(self._environment.parse(source)))
        except Exception as error:
            reason = _reason(error)
        if reason:
            raise TemplateRefused(reason)
        self.has_markers, self.uses_date = rewriter.markers, rewriter.dates
        self._lost_markers = rewriter.lost_markers

    def __reduce__(self) -> tuple[Any, ...]:
        return Template, (self.source, self.variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        date: Date | None = None,
    ) -> str:
        """The conversation as text; ``strftime_now`` gives the first moment of ``date``, of today where it is None.

        Raises TemplateRefused.
        """
        return self._run(messages, add_generation_prompt, tools, date)[0]

    def marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        date: Date | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """As ``render``, and the ``[start, end)`` characters of each ``{% generation %}`` block, in order.

        Raises TemplateRefused, also for a block in a macro or another block, which is not printed where it stands.
        """
        if self._lost_markers:
            raise TemplateRefused("the template has a {% generation %} block inside of a macro or another block")
        return self._run(messages, add_generation_prompt, tools, date)

    def _run(
        self, messages: Sequence[Mapping[str, Any]], prompt: bool, tools: Sequence[Any] | None, date: Date | None
    ) -> tuple[str, list[tuple[int, int]]]:
        if not messages:
            raise TemplateRefused("the conversation has no messages")
        environment = self._environment
        variables = {**environment.globals, **self.variables, "documents": None, "tools": tools}
        variables.update(messages=_prepared(messages), add_generation_prompt=prompt)
        with self._lock:
            environment.meter.start()
            environment.date, environment.pieces, environment.noted = date, [], []
            try:
                return self._print(environment, variables)
            except Exception as error:
                reason = _reason(error)
            finally:
                environment.pieces = []
        # Raised here, so that no traceback holds what the template has made.
        raise TemplateRefused(reason)

    def _print(self, environment: _Environment, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        pieces, size = environment.pieces, 0
        for piece in self._template.root_render_func(self._template.new_context(variables, shared=True)):
            pieces.append(piece)
            size += len(piece) + 8
            if size > CHARACTERS:
                raise TemplateRefused(f"the template prints more than {CHARACTERS:,} characters")
        if not environment.noted:
            return "".join(pieces), []
        starts = list(accumulate(map(len, pieces), initial=0))
        return "".join(pieces), [(starts[before], starts[before] + length) for before, length in environment.noted]


def _prepared(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As transformers hands them over: without what is None, and reasoning under each of its names."""
    prepared = []
    for message in messages:
        fields = {key: value for key, value in message.items() if value is not None}
        if not fields.keys().isdisjoint(REASONING):
            reasoning = next(fields[name] for name in REASONING if name in fields)
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        prepared.append(fields)
    return prepared


def _reason(error: Exception) -> str:
    """One line for whatever a template raised."""
    text = str(error) or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif isinstance(error, RecursionError):
        text = "the template nests or calls itself too deeply"
    elif not isinstance(error, (TemplateError, TemplateRefused)):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text[:1000].split())[:300]
