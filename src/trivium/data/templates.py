"""Which chat template a tokenizer gets, and what ends an assistant's turn in it.

    1. the tokenizer's own;
    2. ChatML, where the tokenizer already has both its markers as single tokens;
    3. plain-text role markers, each turn ended by the tokenizer's own EOS.

No token is ever added to a tokenizer. How a turn ends is found by rendering a probe, not from ``eos_token``.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from trivium.data.chat import ChatTemplate
from trivium.data.encoder import Encoder
from trivium.data.formats import Message, RowError
from trivium.data.sandbox_meter import TOO_LONG
from trivium.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The marker stands on a line of its own: tokenizers part a text at line ends, so that the prompt's last token is the
# same with and without the answer behind it ("Assistant: " and "Hello" would meet in the one token " Hello").
PLAIN = """\
{{- bos_token if bos_token and BOS }}
{%- for message in messages %}
{{- message['role'] | capitalize + ':\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ message['content'] + eos_token }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""

_REASON = "qxreason"
_ASK, _ANSWER = "qxask", "qxanswer"  # what the probe says; no template holds these
_PROBE = [{"role": "user", "content": _ASK}, {"role": "assistant", "content": _ANSWER}]


def chat_template(tokenizer: PreTrainedTokenizerFast, date: datetime.date | None = None) -> ChatTemplate:
    """The chat template to train and serve this tokenizer's model with; also set as ``tokenizer.chat_template``.

    ``date`` is what a template that asks for it is told; None: the day on which it renders.
    Raises ModelError where the template cannot be used, or there is none and the tokenizer has no EOS to end a turn.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "this tokenizer cannot tell which characters its tokens hold",
            "give a model folder with a tokenizer.json (a fast tokenizer)",
        )
    encoder = Encoder.of(tokenizer)
    source, origin = _source(tokenizer, encoder)
    template = ChatTemplate(encoder, source, origin, date=date)
    try:
        template = _in_parts(template)
        template = _with_generation_prompt(template)
        template = _with_ending(template, tokenizer.bos_token_id)
        template = _with_call_ending(template)
    except RowError as error:
        raise ModelError(
            f"{origin} cannot render a question and its answer: {error}",
            "put a working chat template into the model's folder (chat_template.jinja)",
        ) from None
    tokenizer.chat_template = template.source
    return replace(template, encoder=replace(encoder, also=_marks(template)))


def rewrites(template: ChatTemplate) -> str | None:
    """In which conversations the template renders an earlier turn otherwise than the last one: each such turn is then
    trained as a sequence of its own. None: in none, the template is prefix-preserving."""
    thought = [_PROBE[0], {**_PROBE[1], "reasoning_content": _REASON}]
    found = []
    for what, turns in (("plain turns", _PROBE), ("turns with reasoning", thought)):
        with contextlib.suppress(RowError):  # not what it prints
            if len(template.lay_out([*turns, *turns])) > 1:
                found.append(what)
    return " and ".join(found) or None


def _source(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> tuple[str, str]:
    """(Jinja text, where it came from)."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        return own, "the tokenizer's own chat template"
    vocabulary = tokenizer.get_added_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return CHATML, "ChatML, as the tokenizer has no chat template but has ChatML's tokens"
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has neither a chat template nor an end-of-sequence token, so no answer could end",
            "name its end token as eos_token in tokenizer_config.json, or give it a chat template",
        )
    has_bos = "true" if encoder.bos_id is not None else "false"
    plain = PLAIN.replace("BOS", has_bos)
    return plain, f"plain role markers ended by {tokenizer.eos_token}, as the tokenizer has no chat template"


def _in_parts(template: ChatTemplate) -> ChatTemplate:
    """A template that prints a text's parts only gets them."""
    other = replace(template, in_parts=True)
    for way in (template, other):
        try:
            if _ANSWER in way.render(_PROBE):
                return way
        except RowError as error:
            if TOO_LONG in str(error):
                raise
    return template


def _with_generation_prompt(template: ChatTemplate) -> ChatTemplate:
    """Give a template that ignores ``add_generation_prompt`` the one that its own turns show.

    Without it a model is asked to answer without the marker of its own turn, and that marker would be trained.
    """
    ask = _PROBE[:1]
    bare = template.render(ask)
    answered = template.render(_PROBE)
    if template.render(ask, add_generation_prompt=True) != bare or not answered.startswith(bare):
        return template
    marker = answered[len(bare) : max(answered.rfind(_ANSWER), len(bare))]
    if not marker.strip():
        return template
    literal = marker.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    source = template.source + "{% if add_generation_prompt %}{{ '" + literal + "' }}{% endif %}"
    return replace(template, source=source, origin=f"{template.origin}, with the generation prompt that it lacks added")


def _marks(template: ChatTemplate) -> tuple[str, ...]:
    """Added tokens around messages that the tokenizer does not call special, though a message must not forge them.

    Tags, as of reasoning or tools, are none: an answer may well have them in its text.
    """
    added = template.encoder.added
    found = {added[i].content for i, *_ in template.encoder.placed_tokens(template.render(_PROBE)) if i in added}
    return tuple(sorted(t for t in found if not re.fullmatch(r"</?\w+>", t)))


def _with_call_ending(template: ChatTemplate) -> ChatTemplate:
    """Find what ends a turn of tool calls, where that is another token than an answer's."""
    call = {"type": "function", "id": "qxcall123", "function": {"name": "qxname", "arguments": {"qxkey": "qxvalue"}}}
    asked: list[Message] = [_PROBE[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    told = {"role": "tool", "content": "qxresult", "name": "qxname", "tool_call_id": "qxcall123"}
    try:
        text = template.render(asked)
        longer = template.render([*asked, told])
    except RowError:  # it has no place for calls
        return template
    added, at = template.encoder.added, text.rfind("qxvalue")
    last = [t for t in template.encoder.placed_tokens(text) if t[0] in added and t[1] >= at >= 0]
    if not last or template.stop_text.strip() in text[at:]:
        return template
    token, start, end = last[-1]
    if added[token].special and not text[end:].strip():
        return replace(template, call_stop=text[start:end], call_stop_id=token)
    if found := _begins_at(template, longer, len(text)) if longer.startswith(text) else None:
        return replace(template, call_stop=found[1], call_stop_id=found[0], call_appended=found[1])
    return template


def _next_turn(template: ChatTemplate, text: str) -> tuple[int, str] | None:
    """The control token, and its text, with which the turn after an answer begins."""
    longer = template.render([*_PROBE, *_PROBE])
    return _begins_at(template, longer, len(text)) if longer.startswith(text) else None


def _begins_at(template: ChatTemplate, longer: str, at: int) -> tuple[int, str] | None:
    """The added token, and its text, that begins at a place of a rendering."""
    for token, start, end in template.encoder.placed_tokens(longer):
        if start == at and token in template.encoder.added:
            return token, longer[start:end]
    return None


def _with_ending(template: ChatTemplate, bos_id: int | None) -> ChatTemplate:
    """Find what ends an assistant's turn: the first added tokens, side by side, that follow the answer's text."""
    text, asked = template.render(_PROBE), template.render(_PROBE[:1])
    if (at := text.rfind(_ANSWER)) < 0:
        raise RowError("it does not print the assistant's text")
    header = text[len(asked) : at] if text.startswith(asked) else ""
    at += len(_ANSWER)
    encoder = template.encoder
    stop_id, stop_at = -1, at
    for token, start, end in encoder.placed_tokens(text):
        if start < at or token not in encoder.added:
            continue
        beside = stop_id >= 0 and start == stop_at and token != bos_id
        if stop_id < 0 or beside:
            stop_id, stop_at = token, end
    if stop_id < 0 and (found := _next_turn(template, text)):
        # the turn ends where the next one's marker begins, which the last turn has to be given
        return replace(template, header=header, ending=found[1], stop_text=found[1], stop_id=found[0],
                       appended=found[1])  # fmt: skip
    if stop_id < 0:
        eos = encoder.variables.get("eos_token")
        ending = repr(text[at : at + 40]) if text[at:] else "nothing"
        raise ModelError(
            f"{template.origin} ends an answer with {ending}, not with a token of its own: a "
            "model trained on it could not learn to stop",
            "use a chat template whose turns end with one of the tokenizer's special tokens, such as its EOS"
            + (f" {eos!r}" if eos else ""),
        )
    return replace(template, header=header, ending=text[at:], stop_text=text[at:stop_at], stop_id=stop_id)
