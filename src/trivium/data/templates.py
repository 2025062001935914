"""Which chat template a tokenizer gets, and what ends an assistant's turn in it.

    1. the tokenizer's own;
    2. ChatML, where the tokenizer already has both its markers as single tokens;
    3. plain-text role markers, each turn ended by the tokenizer's own EOS.

No token is ever added to a tokenizer. How a turn ends is found by rendering a probe, not from ``eos_token``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trivium.data.chat import ChatTemplate, added_bos
from trivium.data.formats import RowError
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

_ASK, _ANSWER = "qxask", "qxanswer"  # what the probe says; no template holds these


def chat_template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The chat template to train and serve this tokenizer's model with; also set as ``tokenizer.chat_template``.

    Raises ModelError where the template cannot be used, or there is none and the tokenizer has no EOS to end a turn.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "this tokenizer cannot tell which characters its tokens hold",
            "Give a model folder with a tokenizer.json (a fast tokenizer).",
        )
    source, origin = _source(tokenizer)
    template = ChatTemplate(tokenizer, source, origin)
    try:
        template = _with_generation_prompt(template)
        template = _with_ending(template)
    except RowError as error:
        raise ModelError(
            f"{origin} cannot render a question and its answer: {error}",
            "Put a working chat template into the model's folder (chat_template.jinja).",
        ) from None
    tokenizer.chat_template = template.source
    return template


def _source(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
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
            "Name its end token as eos_token in tokenizer_config.json, or give it a chat template.",
        )
    has_bos = "true" if added_bos(tokenizer) is not None else "false"
    plain = PLAIN.replace("BOS", has_bos)
    return plain, f"plain role markers ended by {tokenizer.eos_token}, as the tokenizer has no chat template"


def _with_generation_prompt(template: ChatTemplate) -> ChatTemplate:
    """Give a template that ignores ``add_generation_prompt`` the one that its own turns show.

    Without it a model is asked to answer without the marker of its own turn, and that marker would be trained.
    """
    ask = [{"role": "user", "content": _ASK}]
    bare = template.render(ask)
    answered = template.render([*ask, {"role": "assistant", "content": _ANSWER}])
    if template.render(ask, add_generation_prompt=True) != bare or not answered.startswith(bare):
        return template
    marker = answered[len(bare) : max(answered.rfind(_ANSWER), len(bare))]
    if not marker.strip():
        return template
    literal = marker.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    source = template.source + "{% if add_generation_prompt %}{{ '" + literal + "' }}{% endif %}"
    return replace(template, source=source, origin=f"{template.origin}, with the generation prompt that it lacks added")


def _with_ending(template: ChatTemplate) -> ChatTemplate:
    """Find what ends an assistant's turn: the first added tokens, side by side, that follow the answer's text."""
    messages = [{"role": "user", "content": _ASK}, {"role": "assistant", "content": _ANSWER}]
    text = template.render(messages)
    if (at := text.rfind(_ANSWER)) < 0:
        raise RowError("it does not print the assistant's text")
    at += len(_ANSWER)
    added = set(template.tokenizer.added_tokens_decoder)
    tokens = template.tokenize([text])[0]
    stop_id, stop_at = -1, at
    for token, start, end in zip(tokens.ids.tolist(), tokens.start.tolist(), tokens.end.tolist(), strict=True):
        if start < at or token not in added:
            continue
        beside = stop_id >= 0 and start == stop_at and token != template.tokenizer.bos_token_id
        if stop_id < 0 or beside:
            stop_id, stop_at = token, end
    if stop_id < 0:
        raise ModelError(
            f"{template.origin} ends an answer with {repr(text[at:]) if text[at:] else 'nothing'}, not with a token of "
            "its own: a model trained on it could not learn to stop",
            "Use a chat template whose turns end with one of the tokenizer's special tokens, such as its EOS"
            + (f" {template.tokenizer.eos_token!r}." if template.tokenizer.eos_token else "."),
        )
    return replace(template, ending=text[at:], stop_text=text[at:stop_at], stop_id=stop_id)
