"""The recipe: what a person writes, checked when it is read.

Every field has one sentence; those of a stage are in `recipe_stage.py`. Unknown keys get the nearest name and the line
they stand on.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trivium.errors import nearest
from trivium.recipe_stage import MEND as MEND
from trivium.recipe_stage import MOST_SEED, NAME, Strict, wrong
from trivium.recipe_stage import DataSource as DataSource
from trivium.recipe_stage import Stage as Stage
from trivium.stages import STAGES


class JudgeSource(Strict):
    """Who says which of two answers is the better one: a reward model, or a model behind an endpoint."""

    reward: str | None = Field(None, min_length=1, description="A reward stage of this recipe, or a reward model.")
    endpoint: str | None = Field(None, min_length=1, description="An OpenAI-compatible endpoint, e.g. http://host/v1.")
    model: str | None = Field(None, min_length=1, description="The model to ask for behind the endpoint.")

    @model_validator(mode="after")
    def _one(self) -> JudgeSource:
        if (self.reward is None) == (self.endpoint is None):
            raise wrong("give either reward or endpoint", "write {reward: NAME}, or {endpoint: URL, model: NAME}")
        if (self.endpoint is None) != (self.model is None):
            raise wrong("endpoint and model go together", "write {endpoint: URL, model: NAME}")
        return self


class Recipe(Strict):
    """A chain of stages on one model."""

    name: str = Field(description="Name of the run.", pattern=NAME)
    seed: int = Field(0, ge=0, lt=MOST_SEED, description="Seed of everything random; the same seed gives the same run.")
    model: str | dict[str, Any] = Field(
        description="A folder, hub id or GGUF file; or sizes of a new model (architecture, hidden_size, ...); "
        "or path and what overrides its config."
    )
    stages: list[Stage] = Field(min_length=1, description="The stages, each after the one it starts from.")
    track: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="Where metrics go besides the run's own files."
    )
    prompts: list[str] | None = Field(
        None, description="Asked of the model after every stage, for the report; left out: held-out rows; []: nothing."
    )
    judge: JudgeSource | None = Field(
        None, description="Who judges the answers of preference stages against their parents'; left out: nobody."
    )
    judge_prompts: int = Field(
        16,
        ge=0,
        description="How many held-out prompts a preference stage and its parent answer; 0: they are not compared.",
    )
    eval_text: str | None = Field(
        None,
        description="Text on which the model is measured after every stage, in bits per byte, so that forgetting "
        "shows; left out: held-out rows of the first pretraining stage.",
    )

    @field_validator("judge", mode="before")
    @classmethod
    def _judge(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (dict, JudgeSource)):
            raise wrong(f"{value!r} is no judge", "write judge: {reward: NAME}, or {endpoint: URL, model: NAME}")
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        ways = "give a folder, hub id or .gguf file; {path: ...}; or the sizes of a new one: {architecture: llama, ...}"
        if not isinstance(value, (str, dict)) or not value:
            raise wrong(f"{value!r} is no model", ways)
        if isinstance(value, dict):
            if ("path" in value) == ("architecture" in value):
                raise wrong("it needs either `path` (a model there is) or `architecture` (a new one)", ways)
            for key in ("path", "architecture", "tokenizer"):
                if not isinstance(value.get(key, ""), str):
                    raise wrong(f"{key} is {value[key]!r}, which is no name", ways)
        return value

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        seen: list[str] = []
        for number, stage in enumerate(self.stages):
            # where the file system does not tell upper case from lower, Chat and chat are one folder
            if stage.name.lower() in (name.lower() for name in seen):
                raise wrong(f"a stage before it is called '{stage.name}', too", "rename one", "stages", number, "name")
            of_another = stage.name.removesuffix("-base")
            if of_another != stage.name and of_another in {s.name for s in self.stages}:
                what = f"stage '{of_another}' may have to write its base under the name '{stage.name}'"
                raise wrong(what, "rename one", "stages", number, "name")
            if stage.from_ is not None and stage.from_ not in seen:
                after = " (it comes later)" if stage.from_ in {s.name for s in self.stages} else ""
                names = ", ".join(seen) or "none; leave `from` out to start from the model"
                hint = nearest(stage.from_, seen)
                what = f"no stage before it is called '{stage.from_}'{after}{hint}"
                raise wrong(what, f"stages before it: {names}", "stages", number, "from")
            before = next((s for s in self.stages if s.name == stage.from_), None)
            if before is not None and STAGES[before.stage].reads != STAGES[stage.stage].reads == "logprob":
                what = f"'{before.name}' is a reward model: it gives numbers, and has no words left to train"
                raise wrong(what, f"start from what {before.name} was made of", "stages", number, "from")
            seen.append(stage.name)
        self._judge_is_there()
        return self

    def _judge_is_there(self) -> None:
        """A judge that is a stage of this recipe gives rewards, and comes before those that it judges."""
        named = self.judge.reward if self.judge else None
        place = {stage.name: number for number, stage in enumerate(self.stages)}
        if named not in place:
            return
        if STAGES[self.stages[place[named]].stage].reads != "reward":
            remedy = "name a stage: reward, or the folder of a reward model"
            raise wrong(f"stage '{named}' gives no rewards: it is a {self.stages[place[named]].stage} stage", remedy,
                         "judge", "reward")  # fmt: skip
        judged = [stage.name for stage in self.stages[: place[named]] if stage.stage == "preference"]
        if judged:
            what = f"stage '{judged[0]}' comes before '{named}', which is to judge it"
            raise wrong(what, f"put {named} before it", "judge", "reward")
