"""A model's answers judged, in a notebook: what `trivium.Model` has for rewards and for comparing it with its parent.

reward.train(pairs, "reward", method="lora")            # a language model in hand becomes a reward model
model.generate(prompt, samples=8, temperature=0.8, best_by=reward)
print(model.against(parent, prompts, judge=reward).line())
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from trivium.api_rows import Prompt, messages_of
from trivium.errors import RecipeError
from trivium.evaluate.against import ANSWER_TOKENS, Against, against
from trivium.evaluate.score import rewards
from trivium.evaluate.win_rate import Preference, by_reward
from trivium.model.reward import as_reward_model
from trivium.peft import base as deltas
from trivium.stages import STAGES
from trivium.talk import Talker

if TYPE_CHECKING:
    from trivium.folder import Opened
    from trivium.recipe import Stage


class Judged:
    """A model in hand, as far as its answers are judged."""

    _opened: Opened

    def against(
        self, parent: Judged, prompts: Sequence[Prompt], judge: Judged | Preference | None = None,
        max_new_tokens: int = ANSWER_TOKENS,
    ) -> Against | None:  # fmt: skip
        """What became of the model since ``parent``: unchanged answers, length, KL, how often its answer is preferred.

        ``judge`` is a reward model, ``trivium.by_program(check)`` or ``trivium.by_endpoint(Endpoint(...))``. None where
        no prompt leaves room for an answer.
        """
        prefers = by_reward(partial(rewards, judge._opened.model)) if isinstance(judge, Judged) else judge
        new, old = Talker.of(self._opened.model), Talker.of(parent._opened.model)
        return against(lambda: new, lambda: old, [messages_of(p) for p in prompts], prefers, max_new_tokens)

    def _check_reads(self, stage: Stage) -> None:
        """A stage can read what this model says. Raises RecipeError."""
        rewards_wanted = STAGES[stage.stage].reads == "reward"
        if self._opened.model.gives_rewards and not rewards_wanted:
            raise RecipeError("a reward model gives numbers, and has no words left to train", "load the model anew")
        if rewards_wanted and not self._opened.model.gives_rewards and deltas.deltas(self._opened.model.hf):
            what = "the model has an adapter that knows no reward"
            raise RecipeError(what, "call merge() first, and name the method in train()")

    def _become(self, stage: Stage) -> None:
        """A language model becomes a reward model for a stage that trains one."""
        if STAGES[stage.stage].reads == "reward":
            self._opened.model = as_reward_model(self._opened.model, int(stage.seed or 0))
