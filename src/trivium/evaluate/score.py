"""What a model says of answers: their log-probabilities, or a reward model's rewards; one pass serves many.

scored(model, examples, adapters=["anna", "ben"])      # each under an adapter of its own, if it names one
rewards(model, conversations)                          # of a reward model, a number for each
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trivium.data.chat import ChatTemplate
from trivium.data.examples import at_its_end
from trivium.data.formats import RowError
from trivium.data.templates import chat_template
from trivium.errors import DataError, ModelError
from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.proof import prove

PASS_TOKENS = 2048  # in one pass

Messages = Sequence[Mapping[str, Any]]


def scored(model: LanguageModel, examples: Sequence[Example], adapters: Sequence[str | None] = ()) -> list[float]:
    """The sum over each example's trained tokens, in nats; ``adapters`` name one for each (None: the base).

    Raises ModelError for a model whose layouts disagree.
    """
    named = [replace(e, adapter=a) for e, a in zip(examples, adapters, strict=True)] if adapters else examples
    return [sum(each) for each in by_sequence(model, named)]


@dataclass
class Proven:
    """What is known of a model that reads block after block: the layout that equals separate rows, and of how long."""

    layout: str = ""
    tokens: int = 0


def by_sequence(model: LanguageModel, examples: Sequence[Example], proven: Proven | None = None) -> list[list[float]]:
    """The sum over the trained tokens of every sequence of each example; beginnings that are alike are read once."""
    sums: list[list[float]] = []
    for example, values in zip(examples, per_entry(model, examples, proven), strict=True):
        parts = values.split([s.trained_tokens for s in example.sequences])
        sums.append([float(part.sum()) for part in parts])
    return sums


def per_entry(model: LanguageModel, examples: Sequence[Example], proven: Proven | None = None) -> list[torch.Tensor]:
    """What the model says of every trained token of each example, its sequences one after the other.

    Its layout is proved on the shortest and the longest; with ``proven`` only where none so long was read before.
    """
    if not examples:
        return []
    model.check_tokens([int(s.tokens.max()) for e in examples for s in e.sequences if len(s.tokens)])
    sizes = [example.tokens for example in examples]
    ranked = sorted(range(len(examples)), key=lambda n: sizes[n])
    proven = proven or Proven()
    if sizes[ranked[-1]] > proven.tokens:
        proven.layout = prove(model, [replace(examples[n], adapter=None) for n in {ranked[0], ranked[-1]}]).layout
        proven.tokens = sizes[ranked[-1]]
    found = [torch.zeros(0)] * len(examples)
    with torch.no_grad(), model.laid_out(proven.layout):
        for group in _groups([sizes[n] for n in ranked]):
            numbers = [ranked[place] for place in group]
            forest = lay_out(examples[n] for n in numbers).to(model.device)
            parts = model.logprob(forest).cpu().split([examples[n].trained_tokens for n in numbers])
            for n, part in zip(numbers, parts, strict=True):
                found[n] = part
    return found


def _groups(sizes: Sequence[int]) -> list[list[int]]:
    """Consecutive places, as many together as make a pass."""
    groups: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = PASS_TOKENS
        groups[-1].append(place)
        room -= size
    return groups


def rewards(model: LanguageModel, conversations: Sequence[Messages]) -> list[float]:
    """A reward for each conversation's last answer. Those that follow one another with one prompt share it.

    Raises ModelError for a model that gives none, DataError for a conversation that the template or the model's
    context cannot take.
    """
    if not model.gives_rewards:
        raise ModelError("the model gives no rewards: it is no reward model", "train one with a stage: reward")
    if not conversations:
        return []
    template = chat_template(model.tokenizer)
    read = [rewarded(model, messages, template=template) for messages in conversations]
    examples: list[list[TokenSequence]] = []
    for number, sequence in enumerate(read):
        same = number and conversations[number][:-1] == conversations[number - 1][:-1]
        examples[-1].append(sequence) if same else examples.append([sequence])
    return [reward for each in numbers(by_sequence(model, [Example(tuple(e)) for e in examples])) for reward in each]


def numbers(rewards: list[list[float]]) -> list[list[float]]:
    """Rewards as they are. Raises ModelError where one is no number, which is neither more nor less than any."""
    if all(math.isfinite(reward) for each in rewards for reward in each):
        return rewards
    raise ModelError("the reward model gives a reward that is no finite number", "train it again: its weights are lost")


def best(reward: LanguageModel, prompts: Sequence[Messages], answers: Sequence[Sequence[str]]) -> list[str]:
    """Of the answers to each prompt the one with the highest reward (best of n)."""
    told = [[*p, {"role": "assistant", "content": a}] for p, some in zip(prompts, answers, strict=True) for a in some]
    worth = iter(rewards(reward, told))
    return [max([(next(worth), answer) for answer in some], key=lambda one: one[0])[1] for some in answers]


def rewarded(
    model: LanguageModel, messages: Messages, tools: list[Any] | None = None, template: ChatTemplate | None = None
) -> TokenSequence:
    """A conversation as a reward model reads it: up to the end of its last answer; ``template`` is the model's.

    Raises DataError.
    """
    template = template or chat_template(model.tokenizer)
    # what a row says of its training, message by message, is nothing to a reader
    read = [{k: v for k, v in message.items() if k not in ("train", "weight")} for message in messages]
    try:
        sequence = at_its_end(template.encode(read, "last", tools)[-1])
    except RowError as error:
        raise DataError(f"a conversation cannot be read: {error}", "mend it, or leave it out") from None
    if len(sequence.tokens) - 1 > model.context:
        what = f"a conversation has {len(sequence.tokens) - 1:,} tokens, and the model reads {model.context:,}"
        raise DataError(what, "leave it out, or cut it")
    return sequence
