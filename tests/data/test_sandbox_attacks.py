"""Chat templates that take for ever, fill the memory, or reach for what is not theirs: each is refused in time."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from trivium.data import sandbox_meter
from trivium.data.sandbox import Template, TemplateRefused

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
USER = {"role": "user", "content": "What is 2+2? <é>"}
ANSWER = {"role": "assistant", "content": " It is 4.\n"}

BIG = "{% set x = 'a' * 4000000 %}"
TWICE = "{% set ns = namespace(s=START) %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s | length }}"
# Two lists of 2 ** 60 entries each, and a tuple in tuples, 100,000 deep.
DAGS = (
    "{% set n = namespace(l=['x']) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}"
    "{% set m = namespace(l=['x']) %}{% for i in range(60) %}{% set m.l = [m.l, m.l] %}{% endfor %}"
)
TUPLES = "{% set n = namespace(l=('x',)) %}{% for i in range(60) %}{% set n.l = (n.l, n.l) %}{% endfor %}"
DEEP = "{% set n = namespace(l=('x',)) %}{% for i in range(100000) %}{% set n.l = (n.l,) %}{% endfor %}"
PRINTED = """
n.l ;; n ;; n.l | string ;; n.l | tojson ;; n.l ~ '' ;; '%s' % n.l ;; '{}'.format(n.l) ;; [n.l] | join
n.l | trim ;; n.l | upper ;; n.l | safe ;; n.l is lower ;; raise_exception(n.l) ;; {'a': n.l}.values()
n.l == m.l ;; n.l < m.l ;; n.l in [m.l] ;; n.l is eq(m.l) ;; n.l is in([m.l]) ;; [m.l].index(n.l)
[m.l, n.l] | sort ;; [m.l, n.l] | min ;; [m.l] | select('eq', n.l) | list ;; [n.l] | map('string') | list
{'a': m.l} == {'a': n.l} ;; {'a': m.l, 'b': n.l} | dictsort(by='value') ;; n.l in {'a': m.l}.values()
"""
HASHED = """
{n.l: 1} | length ;; {}.get(n.l) ;; {}[n.l] ;; n.l in {} ;; dict([(n.l, 1)]) ;; dict.fromkeys([n.l])
namespace([(n.l, 1)]) ;; [1] | map(n.l) | list ;; [{}] | map(attribute=n.l) | list ;; n.l is in({})
[n.l] | unique | list ;; self[n.l] ;; [1] | select(n.l) | list
"""
HASHED_DEEP = "{n.l: 1} | length ;; {}[n.l] ;; n.l in {} ;; dict.fromkeys([n.l]) ;; [n.l] | unique | list"
FOREVER = "{% for i in range(100000) %}{% for j in range(100000) %}BODY{% endfor %}{% endfor %}"
COLLIDING = (  # whole numbers with one hash
    "{% set p = '2305843009213693951' | int %}{% set x %}{% for i in range(COUNT) %}{{ p * (i + 1) }},{% endfor %}"
    "{% endset %}{% set k = x.split(',') | map('int') | list %}"
)


def split(expressions: str) -> list[str]:
    return expressions.strip().replace("\n", " ;; ").split(" ;; ")


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
    **{f"list {use}": DAGS + "{{ " + use + " }}" for use in split(PRINTED)},
    **{f"wide tuple {use}": TUPLES + "{{ " + use + " }}" for use in split(HASHED)},
    **{f"deep tuple {use}": DEEP + "{{ " + use + " }}" for use in split(HASHED_DEEP)},
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
    monkeypatch.setattr(sandbox_meter, "SECONDS", 0.05)
    monkeypatch.setattr(sandbox_meter, "LEVEL", 200_000)


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


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        (FOREVER, "more than 0.1 seconds"),
        ("{{ 'a' * 10 ** 9 }}", "160 MiB"),
        (BIG + "{{ x }}" * 5, "16,000,000 characters"),
    ],
)
def test_the_limits_are_said(source: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_meter, "SECONDS", 0.1)
    with pytest.raises(TemplateRefused, match=limit):
        Template(source, {}).render([USER])


# --- escapes

ESCAPES = (
    """
messages.__class__ ;; messages.__class__.__mro__ ;; messages['__class__'] ;; ''.__class__.__mro__[1].__subclasses__()
''['__class__'] ;; cycler.__init__.__globals__ ;; lipsum.__globals__['os'].popen('id').read() ;; joiner('x')
self._TemplateReference__context ;; self['_TemplateReference__context'] ;; self.__init__.__globals__
namespace.__init__.__globals__ ;; namespace(a=1).__init__.__globals__ ;; namespace(a=1)._Namespace__attrs
namespace(_x=1) ;; namespace({'__class__': 1}) ;; dict.__call__.__globals__ ;; dict.fromkeys.__globals__
range.__globals__ ;; strftime_now.__globals__ ;; strftime_now.__closure__ ;; strftime_now.args ;; raise_exception.func
raise_exception.args ;; raise_exception.__code__ ;; '{0.__class__}'.format(messages)
'{0.__globals__}'.format(strftime_now) ;; '{0._env}{0._meter.spent}'.format('x'.format)
'{0.__class__.__mro__}'.format_map({'0': 1}) ;; ('{0.__class__}' | safe).format(1)
'%s' | format('{0.__class__}'.format(1)) ;; 'x'.format.vformat('{0.__class__}', [1], {}) ;; 'x'.format._env
'x'.format.__self__ ;; ''.join.__self__ ;; messages | attr('append') ;; '' | attr('__class__')
[messages] | map(attribute='__class__') | list ;; [messages] | map('attr', '__class__') | list
[-1000000] | map(' spend') | list ;; messages | selectattr('__class__') | list ;; messages.append(1)
messages.clear() ;; messages[0].update(role='x') ;; messages[0].pop('role') ;; messages[0].setdefault('x', 1)
tools.append(1) ;; dict.meter ;; dict(a=1).__class__ ;; (1).__class__ ;; (1).real.__class__ ;; nope.__class__
nope._undefined_exception ;; messages.index.__self__ ;; messages.copy() ;; 'x'.encode().decode() ;; caller ;; context
environment ;; get_flashed_messages ;; open('x') ;; __import__('os')
""".strip()
    .replace("\n", " ;; ")
    .split(" ;; ")
)


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
