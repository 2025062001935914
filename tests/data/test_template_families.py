"""Families of chat templates: in each, exactly the answers are trained, up to and with their stop tokens.

What is right is said by transformers' own rendering of the same messages, and for our own fixtures by hand too. The
templates are those in `templates/`, written after the families that they are named for, and all that trl carries. Each
has a tokenizer of bytes whose control tokens are those that the template prints.

The plain rule is that a turn is what its rendering adds to the prompt that asks for it, and that it ends with its stop
token. Whatever differs from it in a template is named in the tables below.
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
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from trivium.data.chat import ChatTemplate
from trivium.data.formats import RowError
from trivium.data.messages import REASONING
from trivium.data.templates import chat_template

Messages = list[dict[str, Any]]
Turns = dict[int, tuple[str, int, int]]  # by message: the rendering that ends with it, its start and end there
DAY = datetime.date(2026, 1, 2)  # what templates that ask for the date are told


TRL = importlib.util.find_spec("trl")
FOLDERS = {"": Path(__file__).parent / "templates", "trl/": Path(str(TRL and TRL.origin)).parent / "chat_templates"}
PATHS = {at + path.stem: path for at, folder in FOLDERS.items() for path in sorted(folder.glob("*.jinja"))}

# --- what is known of the families: the first pattern that is found in a name counts

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
# The prompt opens the reasoning, or closes it, and a turn without it, or with it, is printed otherwise: it begins
# behind its header, unless the answer itself goes on from what the prompt has opened. (header, what follows it there)
OPENS = {
    "deepseek": ("<｜Assistant｜>", "<think>\n"),
    "nemotron": ("<|im_start|>assistant\n<think></think>", "<think>\n"),
    "qwen3_5_nothink_training": ("<|im_start|>assistant\n", "<think>\n\n</think>\n\n"),
}
AMBIGUOUS = "qwen3_5_nothink$"  # as above, but where such a turn begins is not known: rows with reasoning are refused
# The last turn has no end, and is given the marker of what comes next: a question, or a tool's result.
LACKS = {"^trl/glm4moe$": "<|user|>"}
CALL_LACKS = {"^trl/glm4moe$": "<|observation|>"}
# A turn that calls a tool ends otherwise than one that answers.
CALL_STOPS = {
    "gptoss|gpt_oss": "<|call|>",
    "gemma4(?!_v2)|diffusion_gemma": "<|tool_response>",
    "glm4moe": "<|observation|>",
}
ONE_CALL = "deepseekv3"  # prints the marker of the assistant's turn before the first call of a conversation only
IN_PARTS = "idefics3|llava|smolvlm"  # content is a list of parts, for pictures
NO_SYSTEM = r"^(trl/)?gemma(_training)?$"  # system messages are refused
SEARCHED = ("<channel|>", "<|channel>")  # at which templates part an answer, and which they would find unguarded


def called(said: str, call: str) -> str:
    return ("\n" if said else "") + f"<tool_call>\n{call}\n</tool_call>" if call else ""


def qwen3(said: str, thought: str, call: str) -> str:
    if not thought and "</think>" in said:
        thought, said = said.removeprefix("<think>").split("</think>")
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + said.lstrip("\n") + called(said, call)


# What our own fixtures make of an answer's text, its reasoning and its call as JSON, up to the stop token.
BY_HAND: dict[str, Callable[[str, str, str], str]] = {
    **dict.fromkeys(("alpaca", "chatml", "phi3", "phi4", "zephyr"), lambda said, *_: said),
    **dict.fromkeys(("gemma", "llama3"), lambda said, *_: said.strip()),
    "deepseek_r1": lambda said, *_: said.removeprefix("<think>\n"),
    "hermes_tools": lambda said, _, call: said + called(said, call),
    "llama2": lambda said, *_: f" {said.strip()} ",
    "gpt_oss": lambda said, thought, _: (
        f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" * bool(thought)
        + f"<|channel|>final<|message|>{said}"
    ),
    "mistral": lambda said, _, call: f'[TOOL_CALLS] [{call[:-1]}, "id": "call00001"}}]' if call else f" {said.strip()}",
    "qwen3": qwen3,
}


def known(table: dict[str, Any], name: str) -> Any:
    return next((value for pattern, value in table.items() if re.search(pattern, name)), None)


# --- a template and its tokenizer

CONTROL = r"""<[|｜][^<>|｜\s]{1,30}[|｜]>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|</?s>|<(?:bos|eos|sop)>|\[gMASK\]"""
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # tokens of their own, but no control tokens
MERGES = [("Ġ", "a"), ("a", "b"), ("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ")]  # none across a line's end


def byte_tokenizer(name: str, source: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    bos, eos = known(NAMES, name) or ("<s>", "</s>")
    brackets = r"|\[/?[A-Z_]+\]" if "[TOOL_CALLS]" in source else ""
    special = sorted({*filter(None, (bos, eos)), *re.findall(CONTROL + brackets, source)})
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in MERGES]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, MERGES))
    # One that cuts text into words, as most do, is read word by word (see trivium.data.memo); the other as a whole.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=adds_bos)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN if t in source])
    if adds_bos and bos:
        begin = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[begin])
    names = {"bos_token": bos, "eos_token": eos, "additional_special_tokens": special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=source, **names)


@dataclass(frozen=True, eq=False)
class Case:
    """A template with its tokenizer, and transformers' word on what it prints."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    adds_bos: bool
    stop: str

    def apply(self, messages: Messages, tools: Any = None, **options: Any) -> Any:
        """Text, or tokens with the one BOS that the tokenizer adds in front, which transformers leaves out."""
        if re.search(IN_PARTS, self.name):
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            made = self.tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)
        except TypeError:  # it wants the arguments of calls as text
            messages = json.loads(json.dumps(messages))
            for function in (call for m in messages for call in calls(m)):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            made = self.tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)
        return made if isinstance(made, str) else self.with_bos(made)

    def shown(self, messages: Messages, tools: Any = None, ask: bool = False) -> str:
        return str(self.apply(messages, tools, tokenize=False, add_generation_prompt=ask))

    def with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos, *(ids[1:] if ids[:1] == [bos] else ids)] if self.adds_bos and bos is not None else ids

    def turn(self, messages: Messages, i: int, tools: Any) -> tuple[str, int, int]:
        """Assistant turn ``i``: the rendering that ends with it, its start there, and its end, -1 without a stop."""
        called = bool(calls(messages[i]))
        stop = (called and known(CALL_STOPS, self.name)) or self.stop
        text = self.shown(messages[: i + 1], tools) + (known(CALL_LACKS if called else LACKS, self.name) or "")
        prompt = self.shown(messages[:i], tools, ask=True)
        start = len(prompt)
        if not text.startswith(prompt):
            if re.search(AMBIGUOUS, self.name):
                return text, len(text), -1
            header, opened = known(OPENS, self.name)
            before = self.shown(messages[:i], tools) + header
            assert prompt.startswith(before.removesuffix("<think></think>") + opened)
            if (said := messages[i]["content"]).startswith(opened):
                text = prompt + said.removeprefix(opened) + self.stop
            else:
                assert text.startswith(before)
                start = len(before)
        end = text.rfind(stop, start)
        return text, start, end + len(stop) if end >= 0 else -1


@functools.cache
def case(name: str, adds_bos: bool) -> Case:
    tokenizer = byte_tokenizer(name, PATHS[name].read_text(encoding="utf-8"), adds_bos)
    template = chat_template(tokenizer, DAY)
    return Case(name, tokenizer, template, adds_bos, known(STOPS, name) or template.stop_text)  # of a newer family


def ways(name: str) -> list[bool]:
    """Whether the tokenizer adds a BOS by itself: for those of trl one way, as a case takes longer than its tests."""
    return [len(name) % 2 > 0] if "/" in name else [False, True]


@pytest.fixture(autouse=True, scope="module")
def _one_day() -> Iterator[None]:
    """transformers takes the date from the clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DAY))
        yield


# --- conversations

MARKER = re.compile("z.*?·")  # what each message holds that no other text has
TEXT = st.text(alphabet="ab é😀 \n\t\u00a0.:\"'{}<|>&\\%", max_size=10)
ARGUMENTS = {"type": "object", "properties": {"at": {"type": "string", "description": "where"}}, "required": ["at"]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "z·tools", "parameters": ARGUMENTS}}]


def kinds(name: str) -> list[str]:
    """What more than plain text the template has a place for."""
    source = PATHS[name].read_text(encoding="utf-8")
    more = {"calls": ["tool_calls"], "tools": ["tools"], "think": ["think>"], "reasoning": REASONING}
    return ["plain", *(kind for kind, words in more.items() if any(word in source for word in words))]


@st.composite
def conversations(draw: st.DrawFn, name: str) -> tuple[Messages, Any]:
    """(messages, tools): one to four questions, each message with a marker of its own."""
    kind, count, some = draw(st.sampled_from(kinds(name))), draw(st.integers(1, 4)), draw(st.integers(0, 15))
    marker, numbers = draw(st.text("ghjk", min_size=1, max_size=3)), iter(range(100))

    def says() -> str:
        text = draw(TEXT)
        return f"{text[: len(text) // 2]}z{next(numbers)}{marker}·{text[len(text) // 2 :]}"

    messages: Messages = []
    if not re.search(NO_SYSTEM, name) and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(st.sampled_from([says(), ""]))})
    for n in range(count):
        this = bool(some >> n & 1)  # has a call, or reasoning
        messages.append({"role": "user", "content": says()})
        if kind == "calls" and this and not (re.search(ONE_CALL, name) and any(map(calls, messages))):
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
    at = [marker for call in calls(message) for marker in MARKER.findall(call["arguments"]["at"])]
    return [text.strip() for text in said if text.strip()] + at


# --- what is claimed


def refusal(case: Case, messages: Messages, tools: Any, turns: Turns) -> str:
    """Why a conversation is no row for this template; "" where it is one."""
    for i, (text, start, end) in turns.items():
        if any(piece not in text[start:] for piece in pieces(messages[i])) or (tools and "z·tools" not in text):
            return "leaves out|does not print" + "|ambiguous" * bool(re.search(AMBIGUOUS, case.name))
        assert end >= 0
    last = max(turns, default=-1)
    for m in messages[: last + 1]:
        said = "" if m["role"] == "assistant" else m["content"].strip()
        if said not in turns[last][0] and json.dumps(said, ensure_ascii=False)[1:-1] not in turns[last][0]:
            return "leaves out message"
    return "" if turns else "no assistant turn"


def check(case: Case, messages: Messages, tools: Any, wanted: list[int], train_on: Any, evil: bool = False) -> Any:
    """The last of the sequences in which messages ``wanted`` are trained, all of them checked; None for a refused row.
    ``evil``: control tokens are written out in the messages."""
    turns = {i: case.turn(messages, i, tools) for i in wanted}
    if words := refusal(case, messages, tools, turns):
        with pytest.raises(RowError, match=words):
            case.template.encode(messages, train_on, tools)
        return None
    whole, sequences = turns[wanted[-1]][0], case.template.encode(messages, train_on, tools)
    one = all(whole.startswith(text[:end]) for text, _, end in turns.values())  # else earlier turns are rewritten
    for sequence, held in zip(sequences, [wanted] if one else [[i] for i in wanted], strict=True):
        check_sequence(case, messages, tools, {i: turns[i] for i in held}, sequence, evil)
    return sequences[-1]


def check_sequence(case: Case, messages: Messages, tools: Any, turns: Turns, sequence: Any, evil: bool) -> None:
    last, ids, template = max(turns), sequence.tokens.tolist(), case.template
    text, plain = turns[last][0], case.shown(messages[: last + 1], tools)
    if text != plain:  # what is appended, and where an answer goes on from what the prompt has opened
        assert known(LACKS, case.name) or known(CALL_LACKS, case.name) or known(OPENS, case.name)
        assert evil or ids == case.with_bos(case.tokenizer(text, add_special_tokens=False)["input_ids"])
    elif not (evil and any(token in str(messages) for token in PLAIN)):  # transformers guards these too
        assert ids == case.apply(messages[: last + 1], tools, sanitize_control_tokens=evil)
    assert case.tokenizer.decode(ids).removeprefix(bos := str(case.tokenizer.bos_token)) == text.removeprefix(bos)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.weights > 0, [0]]).astype(int))).reshape(-1, 2)
    for (i, (shown, start, end)), (first, after) in zip(turns.items(), edges.tolist(), strict=True):
        trained = case.tokenizer.decode(ids[first:after])
        assert trained == shown[start:end]
        assert all(piece in trained for piece in pieces(messages[i]))
        others = "".join(m["content"] for n, m in enumerate(messages) if n != i)
        assert not any(marker in trained for marker in MARKER.findall(others))
        if by_hand := BY_HAND.get(case.name):
            said, call = messages[i], "".join(json.dumps(call, ensure_ascii=False) for call in calls(messages[i]))
            if not (call and known(CALL_STOPS, case.name)):
                assert trained == by_hand(said["content"], said.get("reasoning_content", ""), call) + case.stop
        assert ids[after - 1] == (
            template.call_stop_id if calls(messages[i]) and template.call_stop else template.stop_id
        )
        if i == last:
            goes_on = text.startswith(case.shown(messages[:i], tools, ask=True))
            assert goes_on or known(OPENS, case.name)
            assert (template.encode_prompt(messages[:i], tools) == ids[:first]) == goes_on
    also = {template.call_stop_id} if template.call_stop else set()
    assert template.stop_ids == {template.stop_id, case.tokenizer.eos_token_id} | also


MANY = settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", PATHS)
@given(data=st.data())
@MANY
def test_exactly_the_answers_and_their_stop_tokens_are_trained(name: str, data: st.DataObject) -> None:
    messages, tools = data.draw(conversations(name))
    check(case(name, data.draw(st.sampled_from(ways(name)))), messages, tools, answers(messages), "assistant")


@pytest.mark.parametrize("name", PATHS)
@given(flags=st.lists(st.sampled_from([None, False, True]), min_size=1, max_size=4), text=TEXT)
@settings(MANY, max_examples=3)
def test_which_turns_are_trained(name: str, flags: list[bool | None], text: str) -> None:
    made = case(name, ways(name)[0])
    bare = [{"role": r, "content": f"z{n}{r}·{text}"} for n in range(len(flags)) for r in ("user", "assistant")]
    says = {i: flag for i, flag in zip(answers(bare), flags, strict=True) if flag is not None}
    messages = [{**m, "train": says[i]} if i in says else m for i, m in enumerate(bare)]
    for train_on, usual in (("assistant", answers(bare)), ("last", answers(bare)[-1:])):
        check(made, messages, None, [i for i in answers(bare) if says.get(i, i in usual)], train_on)
    (whole,) = made.template.encode(bare, "all")
    lacked = known(LACKS, name) if bare[-1]["role"] == "assistant" else None
    end = [] if lacked is None else [made.tokenizer.convert_tokens_to_ids(lacked)]
    assert whole.tokens.tolist() == [*made.apply(bare), *end]
    assert whole.weights.tolist() == [0] + [1] * (len(whole.tokens) - 1)


@pytest.mark.parametrize("name", PATHS)
@given(data=st.data())
@settings(MANY, max_examples=4)
def test_what_looks_like_a_control_token_stays_text(name: str, data: st.DataObject) -> None:
    made = case(name, ways(name)[0])
    messages, tools = data.draw(conversations(name))
    messages = messages[: answers(messages)[-1] + 1]
    places = [i for i, m in enumerate(messages) if not calls(m)]
    special = [token for token in made.tokenizer.all_special_tokens if token not in SEARCHED]
    spices = data.draw(st.dictionaries(st.sampled_from(places), st.sampled_from(special), min_size=1, max_size=3))

    def seasoned(spices: dict[int, str]) -> Messages:
        said = {i: (messages[i]["content"] or "·").replace("·", f"·{spices[i]}", 1) for i in spices}
        return [{**m, "content": said.get(i, m["content"])} for i, m in enumerate(messages)]

    evil = check(made, seasoned(spices), tools, [len(messages) - 1], "last", evil=True)
    plain = check(made, seasoned(dict.fromkeys(spices, "salt")), tools, [len(messages) - 1], "last")
    assert (evil is None) == (plain is None)
    for token in made.tokenizer.all_special_ids if evil else ():
        assert np.sum(evil.tokens == token) == np.sum(plain.tokens == token)
