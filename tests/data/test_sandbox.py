"""Chat templates: rendered as transformers renders them, and unable to do anything else, or to do it for ever."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from trivium.data import sandbox
from trivium.data.sandbox import Template, TemplateRefused
from trivium.data.templates import CHATML

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # type: ignore[union-attr, arg-type]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where, 'é' <>&"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": ["integer", "null"], "items": {"type": "string"}},
    },
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": SCHEMA}}]
ARGUMENTS = {"city": "Zürich", "unit": "C", "n": 3, "list": [1, 2, {"a": None}]}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call_abcdefg", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
}
TOLD = {"role": "tool", "name": "weather", "tool_call_id": "call_abcdefg", "content": '{"t": 21}'}
USER = {"role": "user", "content": "What is 2+2? <é>"}
ANSWER = {"role": "assistant", "content": " It is 4.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
REASONED = {"role": "assistant", "reasoning_content": "2+2 is 4", "content": "4", "reasoning": None}
THOUGHT = {"role": "assistant", "thinking": "Hm\nhm", "content": "Yes"}
INLINE = {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"}
SEEN = {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image"}]}
SAID = {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]}

CONVERSATIONS: list[tuple[list[dict[str, Any]], list[Any] | None]] = [
    ([USER], None),
    ([USER, ANSWER], None),
    ([SYSTEM, USER, ANSWER, USER], None),
    ([SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "6"}], None),
    ([USER, CALL, TOLD, ANSWER], TOOLS),
    ([USER, CALL, TOLD], TOOLS),
    ([USER, {**CALL, "content": None}, TOLD, ANSWER], None),
    ([USER, REASONED, USER, THOUGHT], None),
    ([USER, INLINE, USER, {"role": "assistant", "content": "<think>x</think>5"}], TOOLS),
    ([SEEN, SAID], None),
    ([ANSWER, ANSWER], None),
    ([{"role": "developer", "content": "d"}, USER, USER], None),
]

WRITTEN = {
    "chatml": CHATML,
    "scopes": "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{%- if m.role == 'system' %}{% continue %}{% endif %}{% if ns.n > 4 %}{% break %}{% endif %}"
    "{% set ns.s = ns.s ~ loop.index ~ loop.last ~ (loop.previtem.role if loop.previtem) %}"
    "{% else %}none{% endfor %}{{ ns.s }}{{ ns.n }}",
    "macros": "{% macro m(a, b=2) %}{{ a }}-{{ b }}{{ caller() if caller }}{{ varargs }}{{ kwargs }}{% endmacro %}"
    "{{ m(1) }}{{ m(1, 2, 3, x=4) }}{% call m('q') %}{{ messages | length }}{% endcall %}"
    "{% set t %}{{ m(*[5, 6], **{'y': 7}) }}{% endset %}{{ t | upper }}{% filter trim %} {{ t }} {% endfilter %}",
    "recursive": "{% for k, v in {'a': {'b': {}}}.items() recursive %}{{ loop.depth }}{{ k }}{{ loop(v.items()) }}"
    "{% endfor %}{% for m in messages if m.role != 'user' %}{{ loop.cycle('x', 'y') }}{{ loop.changed(m.role) }}"
    "{{ loop.length }}{{ loop.revindex0 }}{% endfor %}{% with a = 1 %}{{ a }}{% endwith %}",
    "blanks": "  {% if true %}\n  a\n  {%- endif %}  \n{# note #}\n{% raw %}{{ x }}{% endraw %}\n\n",
}

EXPRESSIONS = r"""
1 + 2 * 3 - 4 / 2 ;; 7 // 2 ;; 7 % 3 ;; 2 ** 10 ;; 2 ** -1 ;; -3 ;; (+2) ;; 1.5 + true ;; 3 | abs ;; 2 > 1
'a' + 'b' + ('c' + 'd') ;; 1 ~ none ~ [1, 'x', 1.5] ~ true ~ {'a': ('é', '\n')} ;; 'a' + 'b' * 2 ;; 2 * 'ab'
[1] * 2 + [2] ;; (1, 2) + (3,) ;; ('a' + 'b') * 2 ;; [] + messages ;; messages[0].content + '' + messages[1].content
'%s-%02d-%.2f-%x%%' % ('a', 3, 1.5, 255) ;; '%s' % [1] ;; '%d' % 3 ;; '%s|%s' | format('a', none) ;; '%s' % nope
'{}-{:>4}'.format('a', 3) ;; '{0}{0!r:4}{a[b]}{1:.2f}'.format('é', 1, a={'b': 1}) ;; '{{}}{}'.format([1])
'{:{}}'.format(1, 5) ;; messages[0].content[1:-1] ;; messages[::-1][0].role ;; 'abc'[::-1] ;; 'abc'[1]
messages[:1] ;; [1, 2, 3][1:][0] ;; 'a' < 'b' < 'c' ;; 1 != 2 ;; messages[0] == messages[0] ;; 'x' in 'xy'
'role' in messages[0] ;; 3 not in [1] ;; [3, 1, 2] | sort | join(',') ;; ['b', 'A'] | sort(reverse=true)
[1, 1, 2] | unique | list ;; [3, 1] | max ;; [3, 1] | min ;; messages | map(attribute='role') | join('/')
messages | selectattr('role', 'equalto', 'user') | list | length ;; messages | sort(attribute='content')
messages | map(attribute='x', default=1) | list ;; messages | map('length') | list
['a', 'B'] | map('upper') | list ;; [1, 2, 3] | select('odd') | list ;; [0, 1] | reject | list
nope | map('x') | list ;; messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | list
messages | join('', attribute='role') ;; {'b': 1, 'a': 2} | dictsort ;; {'b': 1} | items | list
{'a': 1}.get('b', 3) ;; {'a': 1}.keys() | list ;; {1: 2}[1] ;; '  x ' | trim ;; 'xax' | trim('x') ;; 'a b' | title
'ab' | capitalize ;; 'AB' | lower ;; 'aXa' | replace('a', 'b', 1) ;; messages | tojson
messages | tojson(indent=2) ;; ['é<\x01'] | tojson(ensure_ascii=true, separators=(',', ':'))
{'b': 1, 'a': none} | tojson(sort_keys=true) ;; 'é' | tojson ;; 1.5 | tojson ;; {1: [true]} | tojson(indent='-')
'<a>' | e ;; ('<a>' | safe) + '<b>' ;; '<b>' + ('<a>' | safe) ;; ('<i>' | safe).strip() ;; ('<i>' | safe)[1:]
'<' | escape | string ;; 'a\nb\n\nc' | indent(2) ;; 'a\nb' | indent('>', true) ;; '12' | int + 1 ;; 'x' | int(7)
'ff' | int(0, 16) ;; '1.5' | float ;; 'a,b'.split(',') ;; ' a  b'.split() ;; 'a-b-c'.rsplit('-', 1)
'a\nb'.splitlines() ;; 'a=b'.partition('=') ;; 'a'.find('b') ;; 'ab'.center(6) ;; 'ab'.ljust(4) ;; '7'.zfill(3)
','.join(['a', 'b']) ;; 'aa'.replace('a', 'b') ;; 'ab'.startswith(('a',)) ;; 'ß'.upper()
('ab' * 2000).strip('a') | length ;; ('ab ' * 2000).split() | length ;; ('ab' * 2000).replace('a', '') | length
'abc' | first ;; [1, 2] | last ;; [1, 2] | reverse | list ;; 'abc' | reverse ;; 'ab' | list ;; nope | default('d')
'' | d(1, true) ;; nope ;; nope | length ;; nope | list ;; nope is defined ;; none is none ;; 1 is odd
4 is divisibleby(2) ;; 1 is number ;; 'a' is string ;; {} is mapping ;; 'a' is iterable ;; [] is sequence
'a' is lower ;; 1 is eq(1) ;; 1 is in([1]) ;; 1 is ge 2 ;; dict(a=1, b=2) ;; dict([('a', 1)])
dict.fromkeys(['a'], 1) ;; range(5) | list ;; range(1, 9, 3) | list ;; namespace(a=1).a ;; tools ;; documents
add_generation_prompt ;; bos_token ;; missing is defined ;; messages[0]['content'] ;; messages[0].nope
""".strip().split("\n")
REFUSED = """
nope.x
nope + 1
'a' + 1
[1] + 'a'
messages.nope.nope
raise_exception('no ' ~ 'way')
1 / 0
'a' | nosuchfilter
'a' is nosuchtest
[1] | sum(start='')
''.join([1])
messages.append(1)
messages[0].update({})
'a'()
1.5 | tojson(x=1)
""".strip().split("\n")


def theirs(source: str, messages: list[dict[str, Any]], tools: Any, prompt: bool, marked: bool) -> tuple[str, Any]:
    chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
    texts, marks = render_jinja_template(
        conversations=[chat],
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marked,
        **VARIABLES,
    )
    return texts[0], marks[0] if marks else []


@functools.cache
def compiled(source: str) -> Template | None:
    try:
        return Template(source, VARIABLES)
    except TemplateRefused:
        return None


def same(source: str, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> bool:
    """Rendered alike (True), or refused by both (False)."""
    template = compiled(source)
    try:
        expected = theirs(source, messages, tools, prompt, template is not None and template.has_markers)
    except Exception:
        assert template is None or refused(template, messages, tools=tools, add_generation_prompt=prompt)
        return False
    assert template is not None
    assert template.marked(messages, tools=tools, add_generation_prompt=prompt) == expected
    assert template.render(messages, tools=tools, add_generation_prompt=prompt) == expected[0]
    return True


def refused(template: Template, messages: list[dict[str, Any]], **settings: Any) -> str:
    with pytest.raises(TemplateRefused) as caught:
        template.render(messages, **settings)
    reason = str(caught.value)
    assert reason
    assert "\n" not in reason
    assert len(reason) <= 300
    return reason


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.jinja")))
def test_the_templates_in_use_are_rendered_as_transformers_renders_them(name: str) -> None:
    source = (FOLDER / name).read_text(encoding="utf-8")
    results = [same(source, *conversation, prompt) for conversation in CONVERSATIONS for prompt in (False, True)]
    assert sum(results) >= 2


@pytest.mark.parametrize("name", WRITTEN)
def test_statements_are_rendered_as_transformers_renders_them(name: str) -> None:
    for messages, tools in CONVERSATIONS:
        same(WRITTEN[name], messages, tools)
    assert same(WRITTEN[name], [USER, ANSWER])


@pytest.mark.parametrize("line", EXPRESSIONS)
def test_expressions_are_rendered_as_transformers_renders_them(line: str) -> None:
    assert same("|".join("{{ " + expression + " }}" for expression in line.split(" ;; ")), [USER, ANSWER])


@pytest.mark.parametrize("expression", REFUSED)
def test_what_transformers_refuses_is_refused(expression: str) -> None:
    assert not same("{{ " + expression + " }}", [USER, ANSWER])


# --- limits

BIG = "{% set x = 'a' * 4000000 %}"
TWICE = "{% set ns = namespace(s=START) %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s | length }}"
# Two lists of 2 ** 60 entries each, and a tuple in tuples, 100,000 deep.
DAGS = (
    "{% set n = namespace(l=['x']) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}"
    "{% set m = namespace(l=['x']) %}{% for i in range(60) %}{% set m.l = [m.l, m.l] %}{% endfor %}"
)
TUPLES = "{% set n = namespace(l=('x',)) %}{% for i in range(60) %}{% set n.l = (n.l, n.l) %}{% endfor %}"
DEEP = "{% set n = namespace(l=('x',)) %}{% for i in range(100000) %}{% set n.l = (n.l,) %}{% endfor %}"
FOREVER = "{% for i in range(100000) %}{% for j in range(100000) %}BODY{% endfor %}{% endfor %}"
COLLIDING = (  # whole numbers with one hash
    "{% set p = '2305843009213693951' | int %}{% set x %}{% for i in range(COUNT) %}{{ p * (i + 1) }},{% endfor %}"
    "{% endset %}{% set k = x.split(',') | map('int') | list %}"
)


def twice(start: str, step: str) -> str:
    return TWICE.replace("START", start).replace("STEP", step)


def kept(value: str) -> str:
    """Keeps all that it makes, as each holds the one before."""
    body = "{% set ns.l = " + value + " %}"
    return "{% set ns = namespace(l=[]) %}" + BIG + FOREVER.replace("BODY", body)


ATTACKS = {
    # time
    "loops": FOREVER,
    "loops that set": FOREVER.replace("BODY", "{% set c = 1 %}"),
    "loops without a body": "{% for z in range(1000) %}{% for a in range(100000) if false %}{% endfor %}{% endfor %}",
    "a range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a range as a list": "{{ range(10 ** 9) | list }}",
    "macros that call themselves": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros as a tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "callers as a tree": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% macro k(n) %}{% if n %}{% call m() %}{{ k(n - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ k(60) }}",
    "recursive loops": "{% for a in [[1]] recursive %}{{ loop([a]) }}{{ loop([a]) }}{% endfor %}",
    "lazy filters": "{% set ns = namespace(l=range(100000)) %}{% for i in range(1000) %}"
    "{% set ns.l = ns.l | map('default') %}{% endfor %}{{ ns.l | list | length }}",
    "searches": "{% set x = 'a' * 16000000 %}" + "{{ 'zz' in x }}" * 3500,
    "searches of a range": "{% set r = range(100000) %}" + "{{ 'a' in r }}" * 3500,
    "many prefixes": "{% set t = ('b',) * 1000000 %}" + "{{ 'a'.startswith(t) }}" * 2000,
    "rfind": BIG + "{{ x.rfind('ab' + 'a' * 2000000) }}",
    "rsplit": BIG + "{{ x.rsplit(sep='ab' + 'a' * 2000000) | length }}",
    "strip": BIG + "{{ x.strip('b' * 4000000 + 'a') | length }}",
    "trim": BIG + "{{ x | trim('b' * 4000000 + 'a') | length }}",
    "sort": "{% set x = 'a' * 1000000 %}{{ ([x] * 100000) | sort | length }}",
    "a number in decimal": "{{ ('9' * 1000000) | int }}",
    "a number in hexadecimal": "{{ ('f' * 1000000) | int(0, 16) }}",
    "a path of attributes": "{{ [{}] | map(attribute='a.' * 5000000) | list }}",
    "a path to sort by": "{{ [{}] | sort(attribute='a.' * 5000000) }}",
    "a path in a format": "{{ ('{0' + '.a' * 3000000 + '}').format({}) }}",
    "formats": "{{ ('{{' * 8000000).format(1) }}",
    "colliding keys": COLLIDING.replace("COUNT", "20000") + "{{ dict.fromkeys(k) | length }}",
    "colliding entries": COLLIDING.replace("COUNT", "20000") + "{{ k | unique | list | length }}",
    "colliding keys again": COLLIDING.replace("COUNT", "4000")
    + FOREVER.replace("BODY", "{% set d = dict.fromkeys(k) %}"),
    "dates": "{{ strftime_now('%Y' * 5000000) }}",
    # size
    "times": "{{ 'x' * 10 ** 9 }}",
    "times a list": "{{ 10 ** 9 * [1] }}",
    "a power": "{{ 2 ** (10 ** 9) }}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "squares": twice("3", "ns.s * ns.s"),
    "digits": "{{ 5 | round(-1000000000) }}",
    "twice by +": twice("'x'", "ns.s + ns.s"),
    "twice by ~": twice("'x'", "ns.s ~ ns.s"),
    "twice by + of lists": twice("[1]", "ns.s + ns.s"),
    "twice by format": twice("'x'", "'{0}{0}'.format(ns.s)"),
    "twice by %": twice("'x'", "'%s%s' % (ns.s, ns.s)"),
    "twice by a join": twice("'x'", "[ns.s, ns.s] | join"),
    "twice by a method": twice("'x'", "''.join([ns.s, ns.s])"),
    "twice by a sum": twice("[1]", "[ns.s, ns.s] | sum(start=[])"),
    "twice by a quotation": twice("'\"'", "ns.s | tojson"),
    "twice by a replacement": twice("'&'", "ns.s | replace('&', '&&')"),
    "twice as safe text": twice("'&' | safe", "ns.s + ns.s"),
    "twice by a macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}" + twice("'x'", "d(ns.s)"),
    "twice by a block": twice("'x'", "ns.s %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t"),
    "kept texts": kept("[ns.l, x + 'b']"),
    "kept slices": kept("[ns.l, x[1:]]"),
    "kept splits": kept("[ns.l, x.split('b'), (x + 'b').split('a', 1), x.partition('a'), x.rsplit('b')]"),
    "kept entries": kept("[ns.l, ({'a': ns.l}).items() | list, {'a': 1, 'b': 2} | items | list]"),
    "kept arguments": "{% set d = dict.fromkeys(('ab ' * 4000).split()) %}{% macro m() %}{{ ns.l }}{% endmacro %}"
    + kept("ns.l %}{% macro n() %}{% set ns.l = (ns.l, kwargs) %}{% endmacro %}{{ n(**d) }}{% set y = 1"),
    "kept lists": kept("[ns.l]"),
    "kept mappings": kept("{'a': ns.l}"),
    "kept namespaces": kept("namespace(a=ns.l)"),
    "kept methods": kept("(ns.l, 'a'.format, 'a'.strip, nope, {}.items())"),
    "kept numbers": kept("(ns.l, i + 1000, i + 2000, i + 3000)"),
    "kept iterators": kept("[ns.l] | reverse"),
    "kept macros": kept("ns.l %}{% macro f() %}{{ j }}{% endmacro %}{% set ns.l = (ns.l, f)"),
    "kept small texts": kept("[ns.l, 'é' * 900, ('é' * 900).split(), 'é' * 900 | upper, (' ' + 'é' * 900) | trim]"),
    "prints": FOREVER.replace("BODY", "a"),
    "prints numbers": FOREVER.replace("BODY", "{{ i * 1000 }}"),
    "prints texts": BIG + FOREVER.replace("BODY", "{{ x }}"),
    "prints in a macro": "{% macro m() %}" + FOREVER.replace("BODY", "a") + "{% endmacro %}{{ m() }}",
    "prints texts in a macro": BIG + "{% macro m() %}" + FOREVER.replace("BODY", "{{ x }}") + "{% endmacro %}{{ m() }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "rjust": "{{ 'x'.rjust(10 ** 9) }}",
    "center": "{{ 'x'.center(10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "translate": "{{ ('a' * 1000).translate({97: 'b' * 1000000}) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "the center filter": "{{ 'x' | center(1000000000) }}",
    "indent": "{{ 'x\ny' | indent(1000000000) }}",
    "indent by a text": "{{ ('x\n' * 1000) | indent('a' * 1000000) }}",
    "wordwrap": "{{ 'x' | wordwrap(10 ** 9) }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list }}",
    "format": "{{ '%999999999d' | format(1) }}",
    "%": "{{ '%999999999d' % 1 }}",
    "% with a star": "{{ '%*d' % (10 ** 9, 1) }}",
    "% with places": "{{ '%.999999999f' % 1 }}",
    "% with a name": "{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}",
    "% many times": "{{ ('%999d' * 100000) % ((1,) * 100000) }}",
    "% in a test": "{% if '%999999999d' is odd or '%999999999d' is divisibleby(3) %}{% endif %}{{ nope.x }}",
    "{}": "{{ '{:>999999999}'.format(1) }}",
    "{} in {}": "{{ '{:>{}}'.format(1, 10 ** 9) }}",
    "{} with places": "{{ '{:.999999999f}'.format(1.5) }}",
    "{} with other digits": "{{ '{:>٩٩٩٩٩٩٩٩٩}'.format(1) }}",
    "{} many times": BIG + "{{ ('{0}' * 1000).format(x) }}",
    "join": BIG + "{{ ([x] * 1000) | join }}",
    "join with a text": BIG + "{{ range(1000) | join(x) }}",
    "join of a method": BIG + "{{ x.join(['a'] * 1000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "sum": "{{ ([[1] * 10000] * 10000) | sum(start=[]) | length }}",
    "split": "{{ ('ab ' * 5000000).split() | length }}",
    "splitlines": "{{ ('ab\n' * 5000000).splitlines() | length }}",
    "list": "{{ ('a' * 16000000) | list | length }}",
    "arguments": "{% macro m() %}{{ varargs | length }}{% endmacro %}{{ m(*('a' * 16000000)) }}",
    "tojson with an indent": "{{ [1] | tojson(indent=10 ** 9) }}",
    "tojson with separators": "{{ ([1] * 100000) | tojson(separators=('a' * 100000, 'b')) }}",
    "a macro's name": "{% macro " + "a" * 20000 + "() %}{% endmacro %}{{ [" + "a" * 20000 + "] * 30000 }}",
    "a method's text": "{% set x = ('a' * 1000000) | safe %}{{ [x.strip] * 1000 }}",
    "an error's text": "{% set x = 'a' * 1000000 %}{% set t = (x,) * 600 %}{{ {}[t].foo }}",
    "an index's text": "{% set x = 'a' * 1000000 %}{% set t = (x,) * 600 %}{{ [1].index(t) }}",
    # lists whose written form is endless, and tuples in tuples that would crash Python where they are hashed
    **{
        f"list {use}": DAGS + "{{ " + use + " }}"
        for use in (
            *("n.l", "n", "n.l | string", "n.l | tojson", "n.l ~ ''", "'%s' % n.l", "'{}'.format(n.l)", "[n.l] | join"),
            *("n.l | trim", "n.l | upper", "n.l | safe", "n.l is lower", "raise_exception(n.l)", "{'a': n.l}.values()"),
            *("n.l == m.l", "n.l < m.l", "n.l in [m.l]", "n.l is eq(m.l)", "n.l is in([m.l])", "[m.l].index(n.l)"),
            *(
                "[m.l, n.l] | sort",
                "[m.l, n.l] | min",
                "[m.l] | select('eq', n.l) | list",
                "[n.l] | map('string') | list",
            ),
            *("{'a': m.l} == {'a': n.l}", "{'a': m.l, 'b': n.l} | dictsort(by='value')", "n.l in {'a': m.l}.values()"),
        )
    },
    **{
        f"wide tuple {use}": TUPLES + "{{ " + use + " }}"
        for use in (
            *("{n.l: 1} | length", "{}.get(n.l)", "{}[n.l]", "n.l in {}", "dict([(n.l, 1)])", "dict.fromkeys([n.l])"),
            *("namespace([(n.l, 1)])", "[1] | map(n.l) | list", "[{}] | map(attribute=n.l) | list", "n.l is in({})"),
            *("[n.l] | unique | list", "self[n.l]", "[1] | select(n.l) | list"),
        )
    },
    **{
        f"deep tuple {use}": DEEP + "{{ " + use + " }}"
        for use in ("{n.l: 1} | length", "{}[n.l]", "n.l in {}", "dict.fromkeys([n.l])", "[n.l] | unique | list")
    },
    "a list that holds itself": "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ [ns] | string }}",
    "views in views": "{% set ns = namespace(l={}) %}{% for i in range(90) %}"
    "{% set ns.l = {'a': ns.l.items(), 'b': ns.l.items()} %}{% endfor %}{{ ns.l }}",
    # sources
    "brackets": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "macros in macros": "{% macro i() %}" * 80 + "{% set a = 1 %}" * 3000 + "{% endmacro %}" * 80,
    "sums": "{{ " + "+".join(["1"] * 20000) + " }}",
    "a long source": "a" * 100000,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    monkeypatch.setattr(sandbox, "LEVEL", 200_000)


def peak() -> int:
    """MiB that this process has held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ATTACKS)
def test_no_template_takes_long_or_fills_the_memory(name: str) -> None:
    before, start = peak(), time.thread_time()
    with pytest.raises(TemplateRefused) as caught:
        Template(ATTACKS[name], VARIABLES).render([USER])
    assert time.thread_time() - start < 2.5
    assert peak() - before < 300
    assert len(str(caught.value)) <= 300


def test_what_a_template_keeps_is_freed_without_a_crash() -> None:
    for value in ("[ns.l] | reverse", "[ns.l].index", "{'a': ns.l}.items()", "[ns.l].nope", "{'a': ns.l} | items"):
        chain = "{% set ns = namespace(l=[1]) %}{% for i in range(20000) %}{% set ns.l = V %}{% endfor %}ok"
        assert Template(chain.replace("V", value), {}).render([USER]) == "ok"


def test_the_limits_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    assert "more than 0.1 seconds" in refused(Template(FOREVER, {}), [USER])
    assert "160 MiB" in refused(Template("{{ 'a' * 10 ** 9 }}", {}), [USER])
    assert "16,000,000 characters" in refused(Template(BIG + "{{ x }}" * 5, {}), [USER])


def test_a_long_conversation_is_within_the_limits() -> None:
    template = Template((FOLDER / "qwen3.jinja").read_text(encoding="utf-8"), VARIABLES)
    messages = [{"role": role, "content": "字" * 999 + "\n"} for role in ("user", "assistant")] * 1000
    assert len(template.render(messages)) > 2_000_000
    messages = [{"role": role, "content": "字" * 2_000_000} for role in ("user", "assistant")]
    assert len(template.render(messages)) > 4_000_000


# --- escapes

ESCAPES = [
    "messages.__class__",
    "messages.__class__.__mro__",
    "messages['__class__']",
    "''.__class__.__mro__[1].__subclasses__()",
    "''['__class__']",
    "cycler.__init__.__globals__",
    "lipsum.__globals__['os'].popen('id').read()",
    "joiner('x')",
    "self._TemplateReference__context",
    "self['_TemplateReference__context']",
    "self.__init__.__globals__",
    "namespace.__init__.__globals__",
    "namespace(a=1).__init__.__globals__",
    "namespace(a=1)._Namespace__attrs",
    "namespace(_x=1)",
    "namespace({'__class__': 1})",
    "dict.__call__.__globals__",
    "dict.fromkeys.__globals__",
    "range.__globals__",
    "strftime_now.__globals__",
    "strftime_now.__closure__",
    "strftime_now.args",
    "raise_exception.func",
    "raise_exception.args",
    "raise_exception.__code__",
    "'{0.__class__}'.format(messages)",
    "'{0.__globals__}'.format(strftime_now)",
    "'{0._env}{0._meter.spent}'.format('x'.format)",
    "'{0.__class__.__mro__}'.format_map({'0': 1})",
    "('{0.__class__}' | safe).format(1)",
    "'%s' | format('{0.__class__}'.format(1))",
    "'x'.format.vformat('{0.__class__}', [1], {})",
    "'x'.format._env",
    "'x'.format.__self__",
    "''.join.__self__",
    "messages | attr('append')",
    "'' | attr('__class__')",
    "[messages] | map(attribute='__class__') | list",
    "[messages] | map('attr', '__class__') | list",
    "[-1000000] | map(' tick') | list",
    "messages | selectattr('__class__') | list",
    "messages.append(1)",
    "messages.clear()",
    "messages[0].update(role='x')",
    "messages[0].pop('role')",
    "messages[0].setdefault('x', 1)",
    "tools.append(1)",
    "dict.meter",
    "dict(a=1).__class__",
    "(1).__class__",
    "(1).real.__class__",
    "nope.__class__",
    "nope._undefined_exception",
    "messages.index.__self__",
    "messages.copy()",
    "'x'.encode().decode()",
    "caller",
    "context",
    "environment",
    "get_flashed_messages",
    "open('x')",
    "__import__('os')",
]


@pytest.mark.parametrize("expression", ESCAPES)
@pytest.mark.parametrize("form", ["{{ EXPRESSION }}", "{% set x = EXPRESSION %}{{ x }}{{ x() }}", "{{ [EXPRESSION] }}"])
def test_a_template_reaches_nothing_but_what_it_is_given(expression: str, form: str) -> None:
    messages = [dict(USER), dict(ANSWER)]
    try:
        text = Template(form.replace("EXPRESSION", expression), VARIABLES).render(messages, tools=[])
    except TemplateRefused:
        text = ""
    assert text in ("", "[]", "[[]]", "['']", "[Undefined]", "[[Undefined]]", "[[Undefined, Undefined]]")
    assert messages == [USER, ANSWER]


@pytest.mark.parametrize(
    "name", ["raise_exception", "strftime_now", "range", "dict", "namespace", "loop", "m", "bos_token.format"]
)
def test_what_can_be_called_shows_nothing_of_itself(name: str) -> None:
    public = {
        *dir(object()),
        *("fromkeys", "cycle", "changed", "name", "arguments", "catch_kwargs", "catch_varargs", "caller"),
        *("explicit_caller", "depth", "depth0", "index", "index0", "first", "last", "length", "revindex", "revindex0"),
        *("previtem", "nextitem", "format", "vformat", "parse", "get_value", "get_field", "convert_field"),
        *("format_field", "check_unused_args"),
    }
    seen: list[Any] = []
    template = Template("{% macro m() %}{% endmacro %}{% for a in [1] %}{{ " + name + " }}{% endfor %}", VARIABLES)
    template._environment.finalize = lambda value: seen.append(value) or ""  # type: ignore[func-returns-value]
    template.render([USER])
    assert not {attribute for attribute in dir(seen[0]) if attribute[0] != "_"} - public


@pytest.mark.parametrize(
    "source",
    [
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% autoescape true %}{{ 1 }}{% endautoescape %}",
    ],
)
def test_a_template_is_one_file(source: str) -> None:
    with pytest.raises(TemplateRefused, match="line 2: a chat template cannot use"):
        Template("\n" + source, {})


# --- the rest


def test_dates() -> None:
    template = Template("{{ strftime_now('%d %b %Y %H:%M:%S') }}", {})
    assert template.uses_date
    assert template.render([USER], date=datetime.date(2024, 7, 26)) == "26 Jul 2024 00:00:00"
    assert template.render([USER], date=datetime.datetime(2024, 7, 26, 15, 4)) == "26 Jul 2024 00:00:00"
    assert template.render([USER]).startswith(datetime.date.today().strftime("%d %b %Y"))
    assert not Template(CHATML, {}).uses_date


def test_markers() -> None:
    template = Template(CHATML, {})
    assert template.has_markers
    text, spans = template.marked([USER, ANSWER, USER, {"role": "assistant", "content": "字"}])
    assert [text[start:end] for start, end in spans] == [" It is 4.\n<|im_end|>", "字<|im_end|>"]
    assert not Template("{{ 'generation' }}", {}).has_markers
    inside = Template("{% macro m() %}{% generation %}a{% endgeneration %}{% endmacro %}{{ m() }}", {})
    assert inside.has_markers
    assert inside.render([USER]) == "a"
    with pytest.raises(TemplateRefused, match="inside of a macro"):
        inside.marked([USER])


def test_refusals() -> None:
    with pytest.raises(TemplateRefused, match=r"^line 2: .*endif"):
        Template("a\n{% if x %}", {})
    with pytest.raises(TemplateRefused, match=r"^line 3: No filter named 'nope'"):
        Template("a\n\n{{ 'a' | nope }}", {})
    template = Template("{{ raise_exception('only\n user') if messages[0].role != 'user' else 'ok' }}", {})
    assert refused(template, [ANSWER]) == "only user"
    assert template.render([USER]) == "ok"  # and can be used again
    assert "no messages" in refused(template, [])
    assert refused(Template("{{ 1 / 0 }}", {}), [USER]) == "ZeroDivisionError: division by zero"


def test_nothing_that_is_given_is_changed() -> None:
    messages = [dict(USER), {**REASONED}]
    Template(CHATML, VARIABLES).render(messages)
    assert messages == [USER, REASONED]


def test_threads_share_a_template() -> None:
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    wrong = []

    def work(number: int) -> None:
        messages = [{"role": "user", "content": str(number)}] * 200
        wrong.extend(1 for _ in range(20) if template.render(messages) != str(number) * 200)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_is_sent_to_a_worker() -> None:
    template = pickle.loads(pickle.dumps(Template("{{ bos_token }}{{ messages[0].content }}", VARIABLES)))
    assert template.render([USER]) == "<s>" + USER["content"]


def test_a_worker_starts_fast() -> None:
    code = "import sys, trivium.data.sandbox; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
