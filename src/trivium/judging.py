"""A new model against its parent, by whoever is asked: what a run does after a preference stage, and `trivium judge`.

preference = preference_of(JudgeSource(reward="runs/x/reward"))
judge("runs/x/align", "runs/x/chat", prompts, preference)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trivium.data.formats import Message, RowError
from trivium.errors import ModelError
from trivium.evaluate.against import ANSWER_TOKENS, Against, against
from trivium.evaluate.endpoint import Endpoint, by_endpoint
from trivium.evaluate.score import best, rewards
from trivium.evaluate.win_rate import Preference, by_reward
from trivium.folder import is_adapter, open_folder, rewards_in
from trivium.model.load import locate
from trivium.ranking import Sampler
from trivium.recipe import MOST_SEED, JudgeSource
from trivium.talk import Talker
from trivium.train.machine import pick_device, pick_dtype

KEY = "OPENAI_API_KEY"


def preference_of(judge: JudgeSource, out: Path | None = None, device: str | None = None) -> Preference:
    """Who says which answer is better; a reward stage of a run is looked for in ``out``. Raises ModelError.

    A reward model is opened when it is asked for the first time, and let go of afterwards.
    """
    if judge.endpoint is not None:
        return by_endpoint(Endpoint(judge.endpoint, str(judge.model), os.environ.get(KEY)))
    source = place_of(str(judge.reward), out)
    _check(source)

    def rewarded(conversations: Sequence[Sequence[Any]]) -> list[float]:
        return rewards(reward_model(source, device), conversations)

    return by_reward(rewarded)


def place_of(reward: str, out: Path | None) -> str:
    """Where a reward model lies that is named by its stage, or by its place."""
    return str(out / reward) if out is not None and (out / reward).is_dir() else reward


def reward_model(source: str, device: str | None = None) -> Any:
    """A reward model, ready to read. Raises ModelError for any other model."""
    _check(source)
    where = pick_device(device)
    model = open_folder(source, pick_dtype(None, where), where).model
    if not model.gives_rewards:  # of the hub
        raise _no_reward_model(source)
    return model


def _check(source: str) -> None:
    """Raises ModelError for a folder that is no reward model's, before anything is loaded or answered."""
    folder = Path(source).expanduser()
    if not (folder.is_dir() and is_adapter(folder)):
        locate(source)
    if folder.is_dir() and not rewards_in(folder):
        raise _no_reward_model(source)


def _no_reward_model(source: str) -> ModelError:
    return ModelError(f"{source}: not a reward model", "give the folder of a reward stage")


def judge(
    new: str, parent: str, prompts: Sequence[Any], prefers: Preference | None, most: int = ANSWER_TOKENS,
    device: str | None = None, dtype: str | None = None, changes: dict[str, Any] | None = None,
) -> Against | None:  # fmt: skip
    """What became of a model, given where it and its parent lie; ``changes`` override the parent's config."""
    return against(
        lambda: Talker.open(new, device, dtype), lambda: Talker.open(parent, device, dtype, changes), prompts, prefers,
        most,
    )  # fmt: skip


def sampler(source: str, count: int, temperature: float, most: int, seed: int) -> Sampler:
    """What draws ``count`` answers to each prompt from a model. Raises ModelError."""
    talker = Talker.open(source)
    drawn = 0

    def read(prompt: list[Message]) -> list[int] | str:
        try:
            ids = talker.prompt(prompt)
        except (RowError, ModelError) as error:
            return error.what if isinstance(error, ModelError) else str(error)
        room = talker.model.context
        return ids if len(ids) < room else f"the prompt has {len(ids):,} tokens, and the model's context is {room:,}"

    def draw(prompts: Sequence[list[Message]]) -> list[list[str] | str]:
        nonlocal drawn
        asked = [read(prompt) for prompt in prompts]
        good = [ids for ids in asked if not isinstance(ids, str)]
        texts = iter(talker.answers_to(good, most, temperature, (seed + drawn) % MOST_SEED, count))
        drawn += count * len(good)  # every answer has a seed of its own
        return [ids if isinstance(ids, str) else list(islice(texts, count)) for ids in asked]

    return draw


def best_answer(
    talker: Talker, prompt: str, reward: str, count: int, most: int, temperature: float, seed: int
) -> str:  # fmt: skip
    """Of ``count`` answers that are drawn the one with the highest reward (best-of-n). Raises ModelError."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    model = reward_model(reward)  # before any time is spent on answers
    texts = talker.answers([messages], most, temperature, seed, count)
    return best(model, [messages], [texts])[0]
