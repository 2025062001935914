"""Exactly which tokens of a conversation are trained, whatever its chat template.

    template = chat_template(tokenizer)
    sequences = template.encode(messages, train_on="assistant")

A conversation is rendered and tokenised once. What is trained is found by comparing renderings, in characters: the
assistant's turn ``i`` is what ``render(messages[:i+1])`` adds to ``render(messages[:i], generation prompt)``, up to and
with its stop token. So the mask is right for any template, with or without generation markers; where the prompt that
asks for a turn is no beginning of the turn's rendering (a template that opens the reasoning, say), the turn begins
behind its role's header, or where the template's own markers say.

Where the template rewrites earlier turns (one that drops earlier reasoning, say), each assistant turn becomes a
sequence of its own, as the model will have seen it when it is asked for that turn; the forest shares what is common.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from trivium.data.encoder import GUARD, Encoder
from trivium.data.formats import Message, RowError
from trivium.data.memo import Tokens, Words
from trivium.data.messages import REASONING
from trivium.data.sandbox import Template, TemplateRefused
from trivium.forest import TokenSequence

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation (guards in it, see `encoder`) and the spans ``[start, end)`` of its characters that are
    trained, in order; those that are an assistant's turn end with its stop token."""

    text: str
    spans: tuple[tuple[int, int], ...]
    answer_bytes: int  # UTF-8 bytes of the trained text, stop tokens not counted
    turns: tuple[bool, ...] = ()  # whether each span is an assistant's turn, which a stop token ends


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer's chat template and how its assistant's turns begin and end. Made by ``templates.chat_template``."""

    encoder: Encoder
    source: str  # Jinja
    origin: str  # one line: where it came from
    header: str = ""  # what the template puts between a question and the assistant's text: "<|im_start|>assistant\n"
    ending: str = ""  # all that it puts after the assistant's text in the last turn: "<|im_end|>\n"
    stop_text: str = ""  # the part of it that is trained: "<|im_end|>"
    stop_id: int = -1  # the token with which it ends
    appended: str = ""  # the stop text, where the template puts none after the last turn
    call_stop: str = ""  # what ends a turn of tool calls, where that is another token
    call_stop_id: int = -1
    call_appended: str = ""  # the same, where the template puts none after the last turn
    in_parts: bool = False  # it prints content that is a list of parts: of models that see pictures
    date: datetime.date | None = None  # what a template that asks for the date is told; None: today

    def dump(self) -> dict[str, Any]:
        """All but the encoder, as plain values."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "encoder"}
        return found | {"date": None if self.date is None else self.date.isoformat()}

    @classmethod
    def load(cls, encoder: Encoder, dumped: dict[str, Any]) -> ChatTemplate:
        date = None if dumped["date"] is None else datetime.date.fromisoformat(dumped["date"])
        return cls(encoder, **(dumped | {"date": date}))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()

    @property
    def told_date(self) -> str | None:
        """The date that the template is told; None where it does not ask for it."""
        return str(self.date or datetime.date.today()) if self.jinja.uses_date else None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which generation stops: the one that ends the assistant's turn, and the tokenizer's own EOS."""
        found = {self.stop_id, self.call_stop_id, self.encoder.eos_id}
        return frozenset(int(i) for i in found if i is not None and i >= 0)

    @cached_property
    def jinja(self) -> Template:
        """The template compiled. Raises RowError."""
        try:
            return _compiled(self.source, tuple(sorted(self.encoder.variables.items())))
        except TemplateRefused as error:
            raise RowError(f"the chat template is broken: {error}") from None

    # --- rendering

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as text. Raises RowError with the template's own message where it refuses."""
        self._must_print(messages, tools)
        asked: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools, "date": self.date}
        if self.in_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self.jinja.render(messages, **asked)
        except TemplateRefused as error:
            first = error
        if any(m.get("tool_calls") for m in messages):  # some templates want a call's arguments as text
            try:
                return self.jinja.render([_with_text_arguments(m) for m in messages], **asked)
            except TemplateRefused:
                pass
        raise RowError(f"the chat template refuses the conversation: {first}")

    def _must_print(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """What a template has no place for would be lost without a word."""
        if tools and "tools" not in self.source:
            raise RowError("the row has 'tools', which the chat template does not print")
        for number, message in enumerate(messages, start=1):
            if len(message) == 2:  # role and content
                continue
            for names in (("tool_calls",), REASONING):
                held = [f for f in names if message.get(f)]
                if held and not any(f in self.source for f in names):
                    raise RowError(f"message {number} has '{held[0]}', which the chat template does not print")

    def lay_out(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: list[Any] | None = None
    ) -> list[Rendered]:
        """The conversation with its trained spans: one rendering, or one per trained turn where the template
        rewrites earlier ones. Raises RowError."""
        messages, tools = self._guarded(messages), self.encoder.guarded(tools)
        wanted = trained(messages, train_on)
        if train_on == "all" and len(wanted) == len(messages):
            text = self.render(messages, tools=tools)
            text += self.appended if messages[-1]["role"] == "assistant" else ""
            _must_say(messages, text)
            return [Rendered(text, ((0, len(text)),), _bytes(text), (False,))]
        if not wanted:
            raise RowError("no assistant turn to train")
        # What comes after the last trained message is nothing that any trained token can see.
        whole = self.render(messages[: wanted[-1] + 1], tools=tools)
        parts = []
        for i in wanted:
            own = whole if i == wanted[-1] else None
            answers = messages[i]["role"] == "assistant" and train_on != "all"
            parts.append((self._turn if answers else self._message)(messages, i, own, tools))
        whole = parts[-1][0]
        _must_say(messages[: wanted[-1] + 1], whole)
        if all(whole.startswith(text[:end]) for text, _, end, _ in parts):
            return [self._rendered(whole, [part[1:] for part in parts])]
        return [self._rendered(part[0], [part[1:]]) for part in parts]

    def lay_out_answer(
        self, prompt: Sequence[Message], answer: Sequence[Message], tools: list[Any] | None = None
    ) -> Rendered:
        """``prompt`` and then ``answer``, of which every assistant turn is trained. Raises RowError."""
        rendered = self.lay_out([*({**m, "train": False} for m in prompt), *answer], "assistant", tools)
        if len(rendered) > 1:
            raise RowError("an answer of several turns, and the chat template rewrites the earlier ones")
        return rendered[0]

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        """Whatever looks like a control token in a message stays text: else a turn could end early, or be forged."""
        plain = (m["content"] if len(m) == 2 else None for m in messages)  # role and content, as most are
        suspect = [
            m for m, text in zip(messages, plain, strict=True) if text is None or self.encoder.names_control(text)
        ]
        if any(self.encoder.names_control(text) for m in suspect for text in _texts(m)):
            if any(GUARD in text for m in messages for text in _texts(m)):
                raise RowError("holds U+FDD0, which is no character")
            return list(self.encoder.guarded(list(messages)))
        return list(messages)

    def _turn(
        self, messages: Sequence[Message], i: int, text: str | None, tools: list[Any] | None
    ) -> tuple[str, int, int, str]:
        """Assistant turn ``i``: the rendering that ends with it, where its trained span starts and ends there, and the
        stop text with which it ends."""
        if i == 0:
            raise RowError("begins with the assistant's message: nothing asks for it; put a user message before it")
        text = self.render(messages[: i + 1], tools=tools) if text is None else text
        prompt = self.render(messages[:i], add_generation_prompt=True, tools=tools)
        calls = bool(messages[i].get("tool_calls"))
        start, text = len(prompt), text + (self.call_appended if calls else self.appended)
        if not text.startswith(prompt):
            text, start = self._begun_otherwise(messages, i, text, prompt, tools)
        self._must_hold(messages[i], text[start:], i)
        end = len(text)
        if text.endswith(self.ending) and end - len(self.ending) >= start:
            return text, start, end - len(self.ending) + len(self.stop_text), self.stop_text
        # Some turns, tool calls for one, end in their own way; the stop token itself must be there.
        stop = self.call_stop if calls and self.call_stop else self.stop_text.strip()
        if (at := text.rfind(stop, start)) < 0:
            raise RowError(f"message {i + 1} does not end with the stop token {stop!r} in the chat template")
        return text, start, at + len(stop), stop

    def _begun_otherwise(
        self, messages: Sequence[Message], i: int, text: str, prompt: str, tools: list[Any] | None
    ) -> tuple[str, int]:
        """A turn that does not begin with the prompt that asks for it: its rendering, and where it starts there."""
        said = str(messages[i]["content"])
        before = self.render(messages[:i], tools=tools) + self.header
        opened = prompt[len(before) :]  # "<think>\n": the model is asked to go on from there
        if prompt.startswith(before) and opened.strip() and said.startswith(opened.rstrip()):
            rest = said[len(opened.rstrip()) :].removeprefix(opened[len(opened.rstrip()) :])
            return prompt + rest + self.ending, len(prompt)
        if self.header and text.startswith(before):
            return text, len(before)
        if self.jinja.has_markers:
            marked, spans = self.jinja.marked(messages[: i + 1], tools=tools, date=self.date)
            if marked == text and spans:
                return text, spans[-1][0]
        raise RowError(
            f"the chat template, asked for message {i + 1}, ends the prompt with {prompt[-24:]!r}, "
            "but renders the answered conversation without it: what to train is ambiguous"
        )

    def _must_hold(self, message: Message, turn: str, i: int) -> None:
        """What a template leaves out of a turn, reasoning above all, would be lost without a word."""
        said = str(message["content"])
        if len(message) == 2 and said.strip() in turn:
            return
        names = [call["function"].get("name") for call in message.get("tool_calls") or [] if "function" in call]
        for name in names:
            if name and turn.count(str(name)) < names.count(name):
                raise RowError(f"the chat template leaves out a tool call of message {i + 1}: {name!r}")
        reasoning = next((str(message[f]) for f in REASONING if message.get(f)), "")
        for piece in (reasoning, *re.split("</?think>", said)):
            if piece.strip() and piece.strip() not in turn:
                raise RowError(f"the chat template leaves out a part of message {i + 1}: {piece.strip()[:40]!r}")

    def _message(
        self, messages: Sequence[Message], i: int, text: str | None, tools: list[Any] | None
    ) -> tuple[str, int, int, str]:
        """Message ``i`` of any role with all that the template puts around it, as ``_turn``; no stop is asked of it."""
        text = self.render(messages[: i + 1], tools=tools) if text is None else text
        before = self.render(messages[:i], tools=tools) if i else ""
        if not text.startswith(before):
            raise RowError(f"the chat template rewrites what stands before message {i + 1}: it cannot be told apart")
        return text, len(before), len(text), ""

    def _rendered(self, text: str, spans: list[tuple[int, int, str]]) -> Rendered:
        answers = sum(_bytes(text[a:b]) - _bytes(stop) for a, b, stop in spans)
        return Rendered(text, tuple((a, b) for a, b, _ in spans), answers, tuple(bool(stop) for *_, stop in spans))

    # --- tokens

    def tokenize(self, texts: Sequence[str]) -> list[Tokens | Words]:
        """Rendered texts as tokens, in one batched call."""
        return self.encoder.tokens(texts)

    def one_bos(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Tokens with exactly one BOS where the tokenizer adds one by itself, and by how much they moved."""
        bos = self.encoder.bos_id
        if bos is None or (len(ids) > 1 and ids[0] == bos != ids[1]):
            return ids, 0
        others = np.flatnonzero(ids != bos)
        first = int(others[0]) if len(others) else len(ids)
        return np.concatenate([np.array([bos], np.int32), ids[first:]]), 1 - first

    def weigh(self, rendered: Rendered, tokens: Tokens | Words) -> TokenSequence:
        """Weight 1 for every token with a character in a trained span, else 0.

        A token that straddles a span's start (a line end of the prompt with one of the answer, say) is trained, as it
        holds the answer's first characters, unless it is an added token that swallowed them. Raises RowError where a
        trained turn's last token is not its stop token.
        """
        ids, moved = self.one_bos(tokens.ids)
        weights = np.zeros(len(ids), np.float32)
        for (a, b), turn in zip(rendered.spans, rendered.turns, strict=True):
            i, j, before = tokens.between(a, b)
            if turn and (i >= j or int(tokens.ids[j - 1]) not in (self.stop_id, self.call_stop_id)):
                raise RowError(f"a trained turn does not end with the stop token {self.stop_text.strip()!r}")
            swallowed = before and int(tokens.ids[i]) in self.encoder.added
            weights[max(0, i + swallowed + moved) : max(0, j + moved)] = 1
        if len(weights):
            weights[0] = 0  # nothing comes before it
        return TokenSequence(ids, weights)

    def encode(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: list[Any] | None = None
    ) -> list[TokenSequence]:
        """A conversation as sequences ``[n]``: one, or one per trained turn (see ``lay_out``). Raises RowError."""
        rendered = self.lay_out(messages, train_on, tools)
        return [self.weigh(r, t) for r, t in zip(rendered, self.tokenize([r.text for r in rendered]), strict=True)]

    def lay_out_prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Rendered:
        """A conversation that asks for an answer: nothing of it is trained. Raises RowError."""
        text = self.render(self._guarded(messages), add_generation_prompt=True, tools=self.encoder.guarded(tools))
        _must_say(messages, text.replace(GUARD, ""))
        return Rendered(text, (), 0)

    def encode_prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens after which the model is to answer. Raises RowError."""
        found = self.tokenize([self.lay_out_prompt(messages, tools).text])[0]
        return list(self.one_bos(found.ids)[0].tolist())


@lru_cache(maxsize=64)
def _compiled(source: str, variables: tuple[tuple[str, str], ...]) -> Template:
    return Template(source, dict(variables))


def _must_say(messages: Sequence[Message], text: str) -> None:
    """A message that a template leaves out would be lost without a word. Raises RowError."""
    for number, message in enumerate(messages, start=1):
        said = "" if message["role"] == "assistant" else str(message["content"]).strip()
        if said and said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:  # printed as JSON
            raise RowError(f"the chat template leaves out message {number}, the {message['role']}'s")


def trained(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """Which messages are trained: those that ``train_on`` names, unless a message says ``"train"`` itself, or in
    OpenAI's words ``"weight": 0``."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    named = {"assistant": answers, "last": answers[-1:], "all": list(range(len(messages)))}[train_on]

    def says(i: int, message: Message) -> bool:
        if "train" in message:
            return bool(message["train"])
        return i in named and message.get("weight", 1) != 0

    return [i for i, m in enumerate(messages) if says(i, m)]


def _texts(value: Any) -> Iterable[str]:
    """All texts in a message, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message

    def written(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
            return call
        arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    return {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}


def _bytes(text: str) -> int:
    return len(text.replace(GUARD, "").encode("utf-8"))
