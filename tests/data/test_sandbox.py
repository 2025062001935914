"""Chat templates: rendered as transformers renders them, with dates and marks, from threads and in workers."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

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


def test_a_long_conversation_is_within_the_limits() -> None:
    template = Template((FOLDER / "qwen3.jinja").read_text(encoding="utf-8"), VARIABLES)
    messages = [{"role": role, "content": "字" * 999 + "\n"} for role in ("user", "assistant")] * 1000
    assert len(template.render(messages)) > 2_000_000
    messages = [{"role": role, "content": "字" * 2_000_000} for role in ("user", "assistant")]
    assert len(template.render(messages)) > 4_000_000


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
    assert refused(Template("{{ 1 / 0 }}", {}), [USER]) == "division by zero"


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


def test_half_a_character_is_refused():
    with pytest.raises(TemplateRefused, match=r"half a character: the lone surrogate .ud800"):
        Template("{{ '\\ud800' }}", VARIABLES).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ none + 1 }}", "{{ strftime_now(1) }}", "{% for i in range(10**9) %}{% endfor %}"]
)
def test_refusals_name_no_class_of_python(source):
    with pytest.raises(TemplateRefused) as refused:
        Template(source, VARIABLES).render([{"role": "user", "content": "a"}])
    assert "Error" not in str(refused.value)
