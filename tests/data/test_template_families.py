"""Families of chat templates: in whichever, exactly the answers are trained, each up to and with its stop token.

What is right is said by transformers' own rendering of the same messages, and for our own fixtures also by hand. The
templates are those in `templates/`, written after the families that they are named for, and all that trl carries. Each
has a tokenizer of bytes whose control tokens are those that the template prints.

Named below is all in which a template differs from the plain rule: the prompt that asks for a turn, and then the turn.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from trivium.data.chat import REASONING, ChatTemplate
from trivium.data.formats import RowError
from trivium.data.templates import chat_template

Messages = list[dict[str, Any]]
MARKER = re.compile("z.*?·")  # what each message holds that no other text has
DAY = datetime.date(2026, 1, 2)  # what templates that ask for the date are told


def found() -> dict[str, Path]:
    """Template files by name; those of trl as ``trl/name``."""
    ours = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
    trl = importlib.util.find_spec("trl")
    folder = Path(trl.origin).parent / "chat_templates" if trl and trl.origin else Path("none")
    return ours | {f"trl/{path.stem}": path for path in sorted(folder.glob("*.jinja"))}


PATHS = found()
OURS = [name for name in PATHS if "/" not in name]


# --- what is known of the families: the first pattern that fits a name counts

STOPS = {  # what ends a turn
    "alpaca|llama2|mistral|zephyr|llava": "</s>",
    "qwen|lfm|nemotron|chatml|phi4|hermes": "<|im_end|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma4|diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "gptoss|gpt_oss": "<|return|>",
    "idefics3|smolvlm": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "muse": "<|eot|>",
    "phi3": "<|end|>",
}
NAMES = {  # BOS and EOS, where they are not <s> and </s>
    "^qwen3$|chatml|phi4|hermes": (None, "<|im_end|>"),
    "^llama3$": ("<|begin_of_text|>", "<|eot_id|>"),
    "^gemma$": ("<bos>", "<eos>"),
    "^deepseek_r1$": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "^gpt_oss$": ("<|startoftext|>", "<|return|>"),
    "^phi3$": ("<s>", "<|endoftext|>"),
}
# The prompt opens the reasoning, and a turn without reasoning is printed without it: (header of the turn, what opens).
OPENS = {
    "deepseek": ("<｜Assistant｜>", "<think>\n"),
    "nemotron": ("<|im_start|>assistant\n<think></think>", "<think>\n"),
    "qwen3_5_nothink_training": ("<|im_start|>assistant\n", "<think>\n\n</think>\n\n"),
}
# The prompt closes the reasoning, so that where a turn with reasoning begins is not clear: such rows are refused.
AMBIGUOUS = "qwen3_5_nothink$"
# The last turn has no end of its own, only the marker of the turn after it; so it is given that.
LACKS = {"^trl/glm4moe$": "<|user|>"}
IN_PARTS = "idefics3|llava|smolvlm"  # content that is a list of parts, for pictures
NO_SYSTEM = r"^(trl/)?gemma(_training)?$"  # system messages are refused
# A turn that calls a tool ends otherwise than one that answers, so that rows with calls are refused:
# with <|call|>; with <|tool_response>; with nothing, as its turn is followed by <|observation|> and not by <|user|>.
CALLS_END_OTHERWISE = "gptoss|gpt_oss|gemma4(?!_v2)|diffusion_gemma|glm4moe_training"
ONE_CALL = "deepseekv3"  # prints the marker of the assistant's turn before the first call of a conversation only
SEARCHED = ("<channel|>", "<|channel>")  # signs at which templates part a text, so that guarding these shows

Becomes = Callable[[str, str, str], str]  # an answer's text, its reasoning, and its call as JSON, as they are trained
BY_HAND: dict[str, Becomes] = {
    "alpaca": lambda said, _, call: said + "</s>",
    "chatml": lambda said, _, call: said + "<|im_end|>",
    "deepseek_r1": lambda said, _, call: said.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>",
    "gemma": lambda said, _, call: said.strip() + "<end_of_turn>",
    "gpt_oss": lambda said, thought, call: (
        (f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else "")
        + f"<|channel|>final<|message|>{said}<|return|>"
    ),
    "hermes_tools": lambda said, _, call: said + tagged(said, call) + "<|im_end|>",
    "llama2": lambda said, _, call: " " + said.strip() + " </s>",
    "llama3": lambda said, _, call: said.strip() + "<|eot_id|>",
    "mistral": lambda said, _, call: (
        f'[TOOL_CALLS] [{call[:-1]}, "id": "call00001"}}]</s>' if call else f" {said.strip()}</s>"
    ),
    "phi3": lambda said, _, call: said + "<|end|>",
    "phi4": lambda said, _, call: said + "<|im_end|>",
    "qwen3": lambda said, thought, call: qwen(said, thought) + tagged(said, call) + "<|im_end|>",
    "zephyr": lambda said, _, call: said + "</s>",
}


def tagged(said: str, call: str) -> str:
    return f"{chr(10) if said else ''}<tool_call>\n{call}\n</tool_call>" if call else ""


def qwen(said: str, thought: str) -> str:
    if not thought and "</think>" in said:
        thought, said = said.removeprefix("<think>").split("</think>")
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + said.lstrip("\n")


def known(table: dict[str, Any], name: str) -> Any:
    return next((value for pattern, value in table.items() if re.search(pattern, name)), None)


# --- a template and its tokenizer

CONTROL = r"""<[|｜][^<>|｜\s]{1,30}[|｜]>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|</?s>|<(?:bos|eos|sop)>|\[gMASK\]"""
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # tokens of their own, but no control tokens
MERGES = [("Ġ", "a"), ("a", "b"), ("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ")]  # none across a line's end


def byte_tokenizer(name: str, source: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    """Bytes with a few merges; special are the tokens that the template prints."""
    bos, eos = known(NAMES, name) or ("<s>", "</s>")
    brackets = r"|\[/?[A-Z_]+\]" if "[TOOL_CALLS]" in source else ""
    special = sorted({*filter(None, (bos, eos)), *re.findall(CONTROL + brackets, source)})
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in MERGES]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN if t in source])
    if adds_bos and bos:
        begin = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        chat_template=source,
        additional_special_tokens=special,
    )


@dataclass(frozen=True, eq=False)
class Case:
    """A template with its tokenizer, and transformers' word on what it prints."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    adds_bos: bool
    stop: str
    lacks: str
    opens: tuple[str, str] | None

    def apply(self, messages: Messages, tools: Any = None, **options: Any) -> Any:
        """Text, or tokens with the one BOS that the tokenizer adds in front, which transformers leaves out."""
        if re.search(IN_PARTS, self.name):
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            found = self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        except TypeError:  # it wants the arguments of calls as text
            found = self.tokenizer.apply_chat_template(as_text(messages), tools=tools, **options)
        return found if isinstance(found, str) else self.with_bos(found)

    def shown(self, messages: Messages, tools: Any = None, ask: bool = False) -> str:
        return str(self.apply(messages, tools, tokenize=False, add_generation_prompt=ask))

    def with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos, *(ids[1:] if ids[:1] == [bos] else ids)] if self.adds_bos and bos is not None else ids

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(np.array(ids).tolist()))

    def turn(self, messages: Messages, i: int, tools: Any) -> tuple[str, int, int]:
        """Assistant turn ``i``: the rendering that ends with it, and its ``[start, end)`` there; -1 without a stop."""
        text = self.shown(messages[: i + 1], tools) + self.lacks
        prompt = self.shown(messages[:i], tools, ask=True)
        start = len(prompt)
        if not text.startswith(prompt):
            if re.search(AMBIGUOUS, self.name):
                return text, len(text), -1
            assert self.opens, f"{self.name} prints a turn without the prompt that asks for it"
            header, opened = self.opens
            before = self.shown(messages[:i], tools) + header
            assert prompt.startswith(before.removesuffix("<think></think>") + opened)
            if (said := messages[i]["content"]).startswith(opened):  # the answer goes on where the prompt ends
                text = prompt + said.removeprefix(opened) + self.stop
            else:
                assert text.startswith(before)
                start = len(before)
        end = text.rfind(self.stop, start)
        return text, start, end + len(self.stop) if end >= 0 else -1


def as_text(messages: Messages) -> Messages:
    def written(call: Any) -> Any:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [{**m, "tool_calls": [*map(written, m["tool_calls"])]} if "tool_calls" in m else m for m in messages]


@functools.cache
def case(name: str, adds_bos: bool = False) -> Case:
    tokenizer = byte_tokenizer(name, PATHS[name].read_text(encoding="utf-8"), adds_bos)
    template = chat_template(tokenizer, DAY)
    stop = known(STOPS, name) or template.stop_text  # a family that is newer than this table
    return Case(name, tokenizer, template, adds_bos, stop, known(LACKS, name) or "", known(OPENS, name))


@pytest.fixture(autouse=True, scope="module")
def _one_day() -> Iterator[None]:
    """transformers takes the date from the clock."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Day:
            return cls(DAY.year, DAY.month, DAY.day)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Day)
        yield


# --- conversations

TEXT = st.text(alphabet="ab é😀 \n\t\u00a0.:\"'{}<|>&\\%", max_size=10)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "z·tools", "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "description": "where"}}, "required": ["at"]}}}]  # fmt: skip


def kinds(name: str) -> list[str]:
    """What more than plain text the template has a place for."""
    source = PATHS[name].read_text(encoding="utf-8")
    more = {"calls": "tool_calls", "tools": "tools", "think": "think>"}
    found = ["plain", *(kind for kind, word in more.items() if word in source)]
    return found + ["reasoning"] * any(word in source for word in REASONING)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> tuple[Messages, Any]:
    """(messages, tools): one to four questions, each message with a marker that no other text has."""
    kind, count = draw(st.sampled_from(kinds(name))), draw(st.integers(1, 4))
    some, marker = draw(st.integers(0, 15)), draw(st.text("ghjk", min_size=1, max_size=3))
    numbers = iter(range(100))

    def says() -> str:
        text = draw(TEXT)
        return f"{text[: len(text) // 2]}z{next(numbers)}{marker}·{text[len(text) // 2 :]}"

    messages: Messages = []
    if not re.search(NO_SYSTEM, name) and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(st.sampled_from([says(), ""]))})
    for n in range(count):
        this = bool(some >> n & 1)  # has a call, or reasoning
        messages.append({"role": "user", "content": says()})
        if kind == "calls" and this and not (re.search(ONE_CALL, name) and "tool_calls" in str(messages)):
            call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": says()}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "look", "tool_call_id": "call00001", "content": says()})
        thought = f"<think>\n{says()}\n</think>\n\n" if kind == "think" and this else ""
        messages.append({"role": "assistant", "content": thought + says()})
        if kind == "reasoning" and this:
            messages[-1]["reasoning_content"] = says()
    if draw(st.booleans()):
        messages.append({"role": "user", "content": says()})  # nobody answers
    return messages, TOOLS if kind in ("calls", "tools") else None


def answers(messages: Messages) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", [])]


def pieces(message: dict[str, Any]) -> list[str]:
    """What an answer says, each piece without the white space around it."""
    said = [message.get("reasoning_content", ""), *re.split("</?think>", message["content"])]
    called = [marker for call in calls(message) for marker in MARKER.findall(call["arguments"]["at"])]
    return [text.strip() for text in said if text.strip()] + called


def by_hand(name: str, message: dict[str, Any]) -> str:
    call = "".join(json.dumps(call, ensure_ascii=False) for call in calls(message))
    return BY_HAND[name](message["content"], message.get("reasoning_content", ""), call)


Turns = dict[int, tuple[str, int, int]]


def refusal(case: Case, messages: Messages, tools: Any, turns: Turns) -> str:
    """Why a conversation is no row for this template; "" where it is one."""
    for i, (text, start, end) in turns.items():
        if any(piece not in text[start:] for piece in pieces(messages[i])):
            return "leaves out|does not print" + "|ambiguous" * bool(re.search(AMBIGUOUS, case.name))
        if end < 0:
            assert calls(messages[i])
            assert re.search(CALLS_END_OTHERWISE, case.name)
            return "does not end with the stop token"
        if tools and "z·tools" not in text:
            return "does not print"
    return ""


def check(
    case: Case, messages: Messages, tools: Any, wanted: list[int], train_on: Any = "assistant", evil: bool = False
) -> Any:
    """All that is claimed of the sequences, of which ``wanted`` are the trained messages; the last one.

    ``evil``: control tokens are written out in the messages.
    """
    turns = {i: case.turn(messages, i, tools) for i in wanted}
    if words := refusal(case, messages, tools, turns):
        with pytest.raises(RowError, match=words):
            case.template.encode(messages, train_on, tools)
        return None
    sequences = case.template.encode(messages, train_on, tools)
    whole = turns[wanted[-1]][0]
    one = all(whole.startswith(text[:end]) for text, _, end in turns.values())  # else earlier turns are rewritten
    for sequence, held in zip(sequences, [wanted] if one else [[i] for i in wanted], strict=True):
        check_sequence(case, messages, tools, {i: turns[i] for i in held}, sequence, evil)
    return sequences[-1]


def check_sequence(case: Case, messages: Messages, tools: Any, turns: Turns, sequence: Any, evil: bool) -> None:
    last, ids = max(turns), sequence.tokens.tolist()
    text, plain = turns[last][0], case.shown(messages[: last + 1], tools)
    if text != plain:  # what we append, and where an answer goes on with what the prompt has opened
        assert text == plain + case.lacks or case.opens
        assert evil or ids == case.with_bos(case.tokenizer(text, add_special_tokens=False)["input_ids"])
    elif not evil:
        assert ids == case.apply(messages[: last + 1], tools, return_dict=False)
    elif not any(token in str(messages) for token in PLAIN):  # which transformers takes for control tokens too
        assert ids == case.apply(messages[: last + 1], tools, return_dict=False, sanitize_control_tokens=True)
    assert case.decode(ids) in (text, f"{case.tokenizer.bos_token}{text}")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.weights > 0, [0]]).astype(int)))
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def turn(self, messages: Messages, i: int, tools: Any) -> tuple[str, int, int]:
        """Assistant turn ``i``: the rendering that ends with it, and its ``[start, end)`` there; -1 without a stop."""
        text = self.shown(messages[: i + 1], tools) + self.lacks
        prompt = self.shown(messages[:i], tools, ask=True)
        start = len(prompt)
        if not text.startswith(prompt):
            if re.search(AMBIGUOUS, self.name):
                return text, len(text), -1
            assert self.opens, f"{self.name} prints a turn without the prompt that asks for it"
            header, opened = self.opens
            before = self.shown(messages[:i], tools) + header
            assert prompt.startswith(before.removesuffix("<think></think>") + opened)
            if (said := messages[i]["content"]).startswith(opened):  # the answer goes on where the prompt ends
                text = prompt + said.removeprefix(opened) + self.stop
            else:
                assert text.startswith(before)
                start = len(before)
        end = text.rfind(self.stop, start)
        return text, start, end + len(self.stop) if end >= 0 else -1


def as_text(messages: Messages) -> Messages:
    def written(call: Any) -> Any:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [{**m, "tool_calls": [*map(written, m["tool_calls"])]} if "tool_calls" in m else m for m in messages]


@functools.cache
def case(name: str, adds_bos: bool = False) -> Case:
    tokenizer = byte_tokenizer(name, PATHS[name].read_text(encoding="utf-8"), adds_bos)
    template = chat_template(tokenizer, DAY)
    stop = known(STOPS, name) or template.stop_text  # a family that is newer than this table
    return Case(name, tokenizer, template, adds_bos, stop, known(LACKS, name) or "", known(OPENS, name))


@pytest.fixture(autouse=True, scope="module")
def _one_day() -> Iterator[None]:
    """transformers takes the date from the clock."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Day:
            return cls(DAY.year, DAY.month, DAY.day)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Day)
        yield


# --- conversations

TEXT = st.text(alphabet="ab é😀 \n\t\u00a0.:\"'{}<|>&\\%", max_size=10)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "z·tools", "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "description": "where"}}, "required": ["at"]}}}]  # fmt: skip


def kinds(name: str) -> list[str]:
    """What more than plain text the template has a place for."""
    source = PATHS[name].read_text(encoding="utf-8")
    more = {"calls": "tool_calls", "tools": "tools", "think": "think>"}
    found = ["plain", *(kind for kind, word in more.items() if word in source)]
    return found + ["reasoning"] * any(word in source for word in REASONING)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> tuple[Messages, Any]:
    """(messages, tools): one to four questions, each message with a marker that no other text has."""
    kind, count = draw(st.sampled_from(kinds(name))), draw(st.integers(1, 4))
    some, marker = draw(st.integers(0, 15)), draw(st.text("ghjk", min_size=1, max_size=3))
    numbers = iter(range(100))

    def says() -> str:
        text = draw(TEXT)
        return f"{text[: len(text) // 2]}z{next(numbers)}{marker}·{text[len(text) // 2 :]}"

    messages: Messages = []
    if not re.search(NO_SYSTEM, name) and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(st.sampled_from([says(), ""]))})
    for n in range(count):
        this = bool(some >> n & 1)  # has a call, or reasoning
        messages.append({"role": "user", "content": says()})
        if kind == "calls" and this and not (re.search(ONE_CALL, name) and "tool_calls" in str(messages)):
            call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": says()}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "look", "tool_call_id": "call00001", "content": says()})
        thought = f"<think>\n{says()}\n</think>\n\n" if kind == "think" and this else ""
        messages.append({"role": "assistant", "content": thought + says()})
        if kind == "reasoning" and this:
            messages[-1]["reasoning_content"] = says()
    if draw(st.booleans()):
        messages.append({"role": "user", "content": says()})  # nobody answers
    return messages, TOOLS if kind in ("calls", "tools") else None


def answers(messages: Messages) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", [])]


def pieces(message: dict[str, Any]) -> list[str]:
    """What an answer says, each piece without the white space around it."""
    said = [message.get("reasoning_content", ""), *re.split("</?think>", message["content"])]
    called = [marker for call in calls(message) for marker in MARKER.findall(call["arguments"]["at"])]
    return [text.strip() for text in said if text.strip()] + called


def by_hand(name: str, message: dict[str, Any]) -> str:
    call = "".join(json.dumps(call, ensure_ascii=False) for call in calls(message))
    return BY_HAND[name](message["content"], message.get("reasoning_content", ""), call)


Turns = dict[int, tuple[str, int, int]]


def refusal(case: Case, messages: Messages, tools: Any, turns: Turns) -> str:
    """Why a conversation is no row for this template; "" where it is one."""
    for i, (text, start, end) in turns.items():
        if any(piece not in text[start:] for piece in pieces(messages[i])):
            return "leaves out|does not print" + "|ambiguous" * bool(re.search(AMBIGUOUS, case.name))
        if end < 0:
            assert calls(messages[i])
            assert re.search(CALLS_END_OTHERWISE, case.name)
            return "does not end with the stop token"
        if tools and "z·tools" not in text:
            return "does not print"
    return ""


def check(
    case: Case, messages: Messages, tools: Any, wanted: list[int], train_on: Any = "assistant", evil: bool = False
) -> Any:
    """All that is claimed of the sequences, of which ``wanted`` are the trained messages; the last one.

    ``evil``: control tokens are written out in the messages.
    """
    turns = {i: case.turn(messages, i, tools) for i in wanted}
    if words := refusal(case, messages, tools, turns):
        with pytest.raises(RowError, match=words):
            case.template.encode(messages, train_on, tools)
        return None
    sequences = case.template.encode(messages, train_on, tools)
    whole = turns[wanted[-1]][0]
    one = all(whole.startswith(text[:end]) for text, _, end in turns.values())  # else earlier turns are rewritten
    for sequence, held in zip(sequences, [wanted] if one else [[i] for i in wanted], strict=True):
        check_sequence(case, messages, tools, {i: turns[i] for i in held}, sequence, evil)
    return sequences[-1]


def check_sequence(case: Case, messages: Messages, tools: Any, turns: Turns, sequence: Any) -> None:
    last = max(turns)
    text, plain = turns[last][0], case.shown(messages[: last + 1], tools)
    if text == plain:
        ids = case.apply(messages[: last + 1], tools, return_dict=False)
    else:  # what we append, and where an answer goes on with what the prompt has opened
        assert text == plain + case.lacks or case.opens
        ids = case.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sequence.tokens.tolist() == case.with_bos(ids)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.weights > 0, [0]]).astype(int))).reshape(-1, 2)
    for (i, (text, begin, stop)), (start, end) in zip(turns.items(), edges.tolist(), strict=True):
        shown = case.decode(sequence.tokens[start:end])
        assert shown == text[begin:stop]
        assert case.name not in BY_HAND or shown == by_hand(case.name, messages[i])
        others = "".join(m["content"] for n, m in enumerate(messages) if n != i)
        assert not any(marker in shown for marker in MARKER.findall(others))
        assert sequence.tokens[end - 1] == case.template.stop_id
        assert case.stop.endswith(case.decode([case.template.stop_id]))
        if i == last:
            goes_on = text.startswith(case.shown(messages[:i], tools, ask=True))
            assert goes_on or case.opens
            assert (case.template.encode_prompt(messages[:i], tools) == sequence.tokens[:start].tolist()) == goes_on
    assert case.template.stop_ids == {case.template.stop_id, case.tokenizer.eos_token_id}


MANY = settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", PATHS)
def test_exactly_the_answers_and_their_stop_tokens_are_trained(name: str) -> None:
    @given(row=conversations(name), adds_bos=st.booleans())
    @MANY
    def run(row: tuple[Messages, Any], adds_bos: bool) -> None:
        check(case(name, adds_bos), *row, answers(row[0]))

    run()


@pytest.mark.parametrize("name", PATHS)
def test_which_turns_are_trained(name: str) -> None:
    made = case(name)

    @given(flags=st.lists(st.sampled_from([None, False, True]), min_size=1, max_size=4), text=TEXT)
    @settings(MANY, max_examples=4)
    def run(flags: list[bool | None], text: str) -> None:
        bare = [{"role": r, "content": f"z{n}{r}·{text}"} for n in range(len(flags)) for r in ("user", "assistant")]
        places = answers(bare)
        said = {i: {"train": flag} for i, flag in zip(places, flags, strict=True) if flag is not None}
        messages = [{**m, **said.get(i, {})} for i, m in enumerate(bare)]
        for train_on, usual in (("assistant", places), ("last", places[-1:])):
            wanted = [i for i in places if said.get(i, {"train": i in usual})["train"]]
            if wanted:
                check(made, messages, None, wanted, train_on)
            else:
                with pytest.raises(RowError, match="no assistant turn"):
                    made.template.encode(messages, train_on)
        (whole,) = made.template.encode(bare, "all")
        assert whole.tokens.tolist() == made.apply(bare, return_dict=False)
        assert whole.weights.tolist() == [0] + [1] * (len(whole.tokens) - 1)

    run()


@pytest.mark.parametrize("name", PATHS)
def test_what_looks_like_a_control_token_stays_text(name: str) -> None:
    made = case(name)
    special = [token for token in made.tokenizer.all_special_tokens if token not in SEARCHED]

    @given(row=conversations(name), spices=st.lists(st.sampled_from(special), min_size=1, max_size=3), at=st.integers(0))
    @settings(MANY, max_examples=5)
    def run(row: tuple[Messages, Any], spices: list[str], at: int) -> None:
        messages, tools = row
        messages = messages[: answers(messages)[-1] + 1]
        places = [i for i, m in enumerate(messages) if not calls(m)]
        spiced = {places[(at + n) % len(places)]: spice for n, spice in enumerate(spices)}

        def seasoned(spices: dict[int, str]) -> Messages:
            return [{**m, "content": (m["content"] or "·").replace("·", "·" + spices[i], 1)} if i in spices else m
                    for i, m in enumerate(messages)]  # fmt: skip

        last = [len(messages) - 1]
        evil = check(made, seasoned(spiced), tools, last, evil=True)
        plain = check(made, seasoned(dict.fromkeys(spiced, "salt")), tools, last)
        assert (evil is None) == (plain is None)
        for token in made.tokenizer.all_special_ids if evil else ():
            assert np.sum(evil.tokens == token) == np.sum(plain.tokens == token)

    run()
