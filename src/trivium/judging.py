"""A new model against its parent, by whoever is asked: what a run does after a preference stage, and `trivium judge`.

preference = preference_of(JudgeSource(reward="runs/x/reward"))
judge("runs/x/align", "runs/x/chat", prompts, preference)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.data.formats import Message
from trivium.errors import ModelError
from trivium.evaluate.against import ANSWER_TOKENS, Against, against
from trivium.evaluate.endpoint import Endpoint, by_endpoint
from trivium.evaluate.score import best, rewards
from trivium.evaluate.win_rate import Preference, by_reward
from trivium.folder import open_folder
from trivium.ranking import Sampler
from trivium.recipe import JudgeSource
from trivium.talk import Talker
from trivium.train.machine import pick_device, pick_dtype

KEY = "OPENAI_API_KEY"


def preference_of(judge: JudgeSource, out: Path | None = None, device: str | None = None) -> Preference:
    """Who says which answer is better; a reward stage of a run is looked for in ``out``. Raises ModelError.

    A reward model is opened when it is asked for the first time, and let go of afterwards.
    """
    if judge.endpoint is not None:
        return by_endpoint(Endpoint(judge.endpoint, str(judge.model), os.environ.get(KEY)))
    source = str(judge.reward)
    if out is not None and (out / source).is_dir():
        source = str(out / source)

    def rewarded(conversations: Sequence[Sequence[Any]]) -> list[float]:
        return rewards(reward_model(source, device), conversations)

    return by_reward(rewarded)


def reward_model(source: str, device: str | None = None) -> Any:
    """A reward model, ready to read. Raises ModelError for any other model."""
    where = pick_device(device)
    model = open_folder(source, pick_dtype(None, where), where).model
    if not model.gives_rewards:
        raise ModelError(f"{source}: not a reward model", "give a folder of a reward stage")
    return model


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

    def draw(prompts: Sequence[list[Message]]) -> list[list[str]]:
        texts = talker.answers(prompts, most, temperature, seed, count)
        return [texts[at : at + count] for at in range(0, len(texts), count)]

    return draw


def best_answer(
    talker: Talker, prompt: str, reward: str, count: int, most: int, temperature: float, seed: int
) -> str:  # fmt: skip
    """Of ``count`` answers that are drawn the one with the highest reward (best-of-n). Raises ModelError."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    model = reward_model(reward)  # before any time is spent on answers
    texts = talker.answers([messages], most, temperature, seed, count)
    return best(model, [messages], [texts])[0]
