"""Chat templates, and exactly which tokens of a conversation are trained.

    template = chat_template(tokenizer)
    sequences = template.encode(messages, train_on="assistant")

A conversation is rendered once and tokenised once. What is trained is found by comparing renderings, in characters:
the assistant's turn ``i`` is what ``render(messages[:i+1])`` adds to ``render(messages[:i], generation prompt)``, up to
and with its stop token. So the mask is right for any template, with or without generation markers; a template for
which this does not hold is refused, row by row, with the reason.

Where the template rewrites earlier turns (one that drops earlier reasoning, say), each assistant turn becomes a
sequence of its own, as the model will have seen it when it is asked for that turn; the forest shares what is common.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trivium.data.formats import Message, RowError
from trivium.forest import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TrainOn = Literal["assistant", "last", "all"]

# The names under which templates know an answer's reasoning; transformers hands each under all of them.
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation and the spans ``[start, end)`` of its characters that are trained, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]
    answer_bytes: int  # UTF-8 bytes of the trained text, stop tokens not counted


@dataclass(frozen=True, slots=True)
class Tokens:
    """``n`` tokens and, for each, where its characters start and end in the text: three arrays ``[n]``."""

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer's chat template and how its assistant's turns end. Made by ``templates.chat_template``."""

    tokenizer: PreTrainedTokenizerFast
    source: str  # Jinja
    origin: str  # one line: where it came from
    ending: str = ""  # all that the template puts after the assistant's text in the last turn: "<|im_end|>\n"
    stop_text: str = ""  # the part of it that is trained: "<|im_end|>"
    stop_id: int = -1  # the token with which it ends

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which generation stops: the one that ends the assistant's turn, and the tokenizer's own EOS."""
        eos = self.tokenizer.eos_token_id
        return frozenset({self.stop_id} | ({int(eos)} if eos is not None else set()))

    @cached_property
    def bos_id(self) -> int | None:
        return added_bos(self.tokenizer)

    @cached_property
    def _added_ids(self) -> np.ndarray:
        return np.array(sorted(self.tokenizer.added_tokens_decoder), dtype=np.int64)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches any control token's text. The unknown token is none: corpora are full of it."""
        texts = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        texts = [t for t in texts if t != self.tokenizer.unk_token]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    # --- rendering

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as text. Raises RowError with the template's own message where it refuses."""
        import jinja2

        self._must_print(messages, tools)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=self.source,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise RowError(
                f"the chat template refuses the conversation: {str(error) or type(error).__name__}"
            ) from None

    def _must_print(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """What a template has no place for would be lost without a word."""
        if tools and "tools" not in self.source:
            raise RowError("the row has 'tools', which the chat template does not print")
        for number, message in enumerate(messages, start=1):
            for fields in (("tool_calls",), REASONING):
                held = [f for f in fields if message.get(f)]
                if held and not any(f in self.source for f in fields):
                    raise RowError(f"message {number} has '{held[0]}', which the chat template does not print")

    def lay_out(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: list[Any] | None = None
    ) -> list[Rendered]:
        """The conversation with its trained spans: one rendering, or one per trained turn where the template
        rewrites earlier ones. Raises RowError."""
        self._no_control_tokens(messages)
        if train_on == "all":
            text = self.render(messages, tools=tools)
            return [Rendered(text, ((0, len(text)),), len(text.encode("utf-8")))]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        turns = [i for i in (turns[-1:] if train_on == "last" else turns) if m_trained(messages[i])]
        if not turns:
            raise RowError("no assistant turn to train")
        # What comes after the last trained turn is nothing that any trained token can see.
        whole = self.render(messages[: turns[-1] + 1], tools=tools)
        parts = [self._turn(messages, i, whole if i == turns[-1] else None, tools) for i in turns]
        if all(whole.startswith(text[:end]) for text, _, end in parts):
            return [self._rendered(whole, [(start, end) for _, start, end in parts])]
        return [self._rendered(text, [(start, end)]) for text, start, end in parts]

    def lay_out_answer(
        self, prompt: Sequence[Message], answer: Sequence[Message], tools: list[Any] | None = None
    ) -> Rendered:
        """``prompt`` and then ``answer``, of which every assistant turn is trained. Raises RowError."""
        untrained = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt]
        rendered = self.lay_out([*untrained, *answer], "assistant", tools)
        if len(rendered) > 1:
            raise RowError("an answer of several turns, and the chat template rewrites the earlier ones")
        return rendered[0]

    def _turn(
        self, messages: Sequence[Message], i: int, text: str | None, tools: list[Any] | None
    ) -> tuple[str, int, int]:
        """Assistant turn ``i``: the rendering that ends with it, and where its trained span starts and ends there."""
        if i == 0:
            raise RowError("begins with the assistant's message: nothing asks for it; put a user message before it")
        text = self.render(messages[: i + 1], tools=tools) if text is None else text
        prompt = self.render(messages[:i], add_generation_prompt=True, tools=tools)
        if not text.startswith(prompt):
            raise RowError(
                f"the chat template, asked for message {i + 1}, ends the prompt with {prompt[-24:]!r}, "
                "but renders the answered conversation without it: what to train is ambiguous"
            )
        start, end = len(prompt), len(text)
        if text.endswith(self.ending) and end - len(self.ending) >= start:
            return text, start, end - len(self.ending) + len(self.stop_text)
        # Some turns, tool calls for one, end in their own way; the stop token itself must be there.
        stop = self.stop_text.strip()
        if (at := text.rfind(stop, start)) < 0:
            raise RowError(f"message {i + 1} does not end with the stop token {stop!r} in the chat template")
        return text, start, at + len(stop)

    def _rendered(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        answers = sum(len(text[a:b].encode("utf-8")) - len(self.stop_text.encode("utf-8")) for a, b in spans)
        return Rendered(text, tuple(spans), answers)

    def _no_control_tokens(self, messages: Sequence[Message]) -> None:
        """A control token written out in a message would become the token: a turn that ends early, a forged role."""
        for number, message in enumerate(messages, start=1):
            if found := self._control.search(message.get("content") or ""):
                raise RowError(f"message {number} holds the control token {found[0]!r} as text")

    # --- tokens

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Rendered texts as tokens, in one batched call; exactly one BOS where the tokenizer adds one by itself."""
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [self._tokens(ids, at) for ids, at in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    def _tokens(self, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
        at = np.array(offsets, np.int64).reshape(-1, 2)
        end = np.maximum.accumulate(at[:, 1]) if len(at) else at[:, 1]
        # Some tokenizers leave white space out of a token's offsets: a token takes what lies before it.
        start = np.minimum(at[:, 0], np.concatenate([[0], end[:-1]])) if len(at) else at[:, 0]
        tokens = np.array(ids, np.int32)
        if self.bos_id is not None:
            others = np.flatnonzero(tokens != self.bos_id)
            first = int(others[0]) if len(others) else len(tokens)
            tokens = np.concatenate([np.array([self.bos_id], np.int32), tokens[first:]])
            start, end = np.concatenate([[0], start[first:]]), np.concatenate([[0], end[first:]])
        return Tokens(tokens, start, end)

    def weigh(self, rendered: Rendered, tokens: Tokens) -> TokenSequence:
        """Weight 1 for every token with a character in a trained span, else 0.

        A token that straddles a span's start (a line end of the prompt with one of the answer, say) is trained, as it
        holds the answer's first characters, unless it is an added token that swallowed them. Raises RowError where a
        trained turn's last token is not its stop token.
        """
        ids, start, end = tokens.ids, tokens.start, tokens.end
        weights = np.zeros(len(ids), np.float32)
        for a, b in rendered.spans:
            inside = (start < b) & ((end > a) | ((start >= a) & (end == start)))
            swallowed = (start < a) & np.isin(ids, self._added_ids)
            weights[inside & ~swallowed] = 1
            last = np.flatnonzero(inside)[-1:]
            if (a, b) != (0, len(rendered.text)) and (not len(last) or ids[last[0]] != self.stop_id):
                raise RowError(f"a trained turn does not end with the stop token {self.stop_text.strip()!r}")
        if len(weights):
            weights[0] = 0  # nothing comes before it
        return TokenSequence(ids, weights)

    def encode(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: list[Any] | None = None
    ) -> list[TokenSequence]:
        """A conversation as sequences ``[n]``: one, or one per trained turn (see ``lay_out``). Raises RowError."""
        rendered = self.lay_out(messages, train_on, tools)
        return [self.weigh(r, t) for r, t in zip(rendered, self.tokenize([r.text for r in rendered]), strict=True)]

    def encode_prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens after which the model is to answer. Raises RowError."""
        return self.tokenize([self.render(messages, add_generation_prompt=True, tools=tools)])[0].ids.tolist()


def m_trained(message: Message) -> bool:
    """A message may carry OpenAI's ``"weight": 0``: read, but not trained."""
    return message.get("weight", 1) != 0


def added_bos(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The BOS that the tokenizer puts in front of every text by itself, if it does."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and full[:1] == [bos] and bare[:1] != [bos] else None
