"""Renders a chat template, a program that came with a downloaded model, so that it can do nothing but print.
It sees messages, tools and special tokens, and calls only its own macros, five functions, known filters and methods.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import datetime
from itertools import accumulate
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, Undefined
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from trivium.data.messages import REASONING
from trivium.data.sandbox_meter import CHARACTERS, SOURCE, TemplateRefused
from trivium.data.sandbox_operations import METHODS, Formatter, Operations
from trivium.data.sandbox_rewrite import Generation, Rewriter
from trivium.errors import printable, said

__all__ = ["Template", "TemplateRefused"]

# The names under which templates know an answer's reasoning; transformers hands each under all of them.
_OF_DICT = frozenset(dir(dict))


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


class _Environment(ImmutableSandboxedEnvironment):
    """Compiles and runs one template."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        self.meter = Operations(self)
        self.date: Date | None = None
        self.pieces: list[str] = []  # printed so far
        self.noted: list[tuple[int, int]] = []  # of each generation block the pieces before it and its characters
        extensions = (Generation, "jinja2.ext.loopcontrols")
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
        if attribute in METHODS[dict if kind is dict else str]:
            return getattr(obj, attribute)
        if kind is str and attribute == "format":
            self.meter.spend(400)
            return Formatter(self, self.meter, obj)
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
        if id(obj) in self._functions or kind in (Formatter, LoopContext, Undefined):
            return obj(*args, **kwargs)
        raise TemplateRefused(f"the template calls a {kind.__name__}")

    def _call_method(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner, name = method.__self__, method.__name__
        if isinstance(owner, str):
            return self.meter.call_text(method, args, kwargs)
        if type(owner) is Generation:
            return method(**kwargs)
        if name in METHODS.get(type(owner), ()):
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

        template = Template(source, tokenizer.special_tokens_map)
        text = template.render(messages, add_generation_prompt=True)

    The text is the one that transformers' ``apply_chat_template`` gives, in 0.3 to 1.0 of its time, and without loading
    it or torch. ``variables`` are the tokenizer's special tokens. Raises TemplateRefused, with the line, for a template
    that does not compile or is too long.
    """

    has_markers: bool  # it has {% generation %} blocks
    uses_date: bool  # it mentions strftime_now

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        if len(source) > SOURCE:
            raise TemplateRefused(f"the template is longer than {SOURCE:,} characters")
        self.source, self.variables = source, dict(variables)
        self._environment, self._lock = _Environment(), threading.Lock()
        rewriter, reason = Rewriter(), ""
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
        variables |= {"messages": _prepared(messages), "add_generation_prompt": prompt}
        with self._lock:
            environment.meter.start()
            environment.date, environment.pieces, environment.noted = date, [], []
            try:
                return self._print(variables)
            except Exception as error:
                reason = _reason(error)
            finally:
                environment.pieces = []
        # Raised here, so that no traceback holds what the template has made.
        raise TemplateRefused(reason)

    def _print(self, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        pieces, size = self._environment.pieces, 0
        for piece in self._template.root_render_func(self._template.new_context(variables, shared=True)):
            pieces.append(piece)
            size += len(piece) + 8
            if size > CHARACTERS:
                raise TemplateRefused(f"the template prints more than {CHARACTERS:,} characters")
        noted = self._environment.noted
        starts = list(accumulate(map(len, pieces), initial=0)) if noted else []
        text = "".join(pieces)
        if not text.isascii() and (found := re.search("[\ud800-\udfff]", text)):
            raise TemplateRefused(f"the template prints half a character: the lone surrogate \\u{ord(found[0]):04x}")
        return text, [(starts[before], starts[before] + length) for before, length in noted]


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
    if isinstance(error, TemplateSyntaxError):
        return printable(f"line {error.lineno}: {' '.join(str(error.message).split())}", 300)
    if isinstance(error, RecursionError):
        return "the template nests or calls itself too deeply"
    return said(error, 300)
