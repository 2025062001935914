"""One stage of a recipe: every field of it, with one sentence, and what does not go together.

Fields left out stay None here; `stages.py` gives them the defaults of their stage and says so.
"""

from __future__ import annotations

import datetime
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trivium.errors import RecipeError, nearest
from trivium.objectives import OBJECTIVES, SETTINGS, fault, shares
from trivium.peft.settings import METHODS, PRESETS, as_written, settings_of
from trivium.stages import STAGES, rows_of
from trivium.train.budget import in_bytes

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"  # of a folder, with an ending of ours
RESERVED = ("model", "tokenizer", "data", "tensorboard", "wandb")  # what a run writes beside its stages
ENDINGS = (".partial", ".old", ".gone", ".training", ".json", ".html")
MOST_SEED = 2**63  # what torch takes
MEND = "mend it in the recipe or by --set"


def wrong(what: str, remedy: str = MEND, *place: str | int) -> PydanticCustomError:
    """An error with a remedy of its own; ``place`` leads to the value, from where it is raised."""
    return PydanticCustomError("wrong", "{what}", {"what": what, "remedy": remedy, "place": list(place)})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):  # else true would be read as 1
            raise wrong(f"{str(value).lower()} is no value for it", "write a number or a name")
        return value


class DataSource(Strict):
    """One source of rows: a path, or more to be said of it."""

    path: str = Field(min_length=1, description="File, folder, glob or hf://owner/name/path.")
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Its share of the examples, against the other sources' weights."
    )
    fields: dict[str, str] | None = Field(
        None, description="What its fields are called: {prompt: question_text}, ours by theirs; meta.text goes inside."
    )

    @field_validator("fields")
    @classmethod
    def _ours(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        from trivium.data.formats import FIELDS

        for ours in value or {}:
            if ours not in FIELDS:
                raise wrong(f"no format has a field '{ours}'{nearest(ours, FIELDS)}", f"ours are: {', '.join(FIELDS)}")
        return value

    def plain(self) -> Any:
        """As short as it can be written."""
        told = self.model_dump(exclude_none=True)
        return told["path"] if set(told) == {"path"} else told


def _sources(value: Any) -> Any:
    """A path, a mapping, or a list of them, as a list of mappings."""
    if not value or not isinstance(value, (str, dict, list)):
        raise wrong("it names no file", "give a file, a folder, a glob, hf://owner/name/path, or a list of them")
    listed = value if isinstance(value, list) else [value]
    return [{"path": one} if isinstance(one, str) else one for one in listed]


def _as_written(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    told = [source.plain() for source in value]
    return told[0] if len(told) == 1 else told


class Stage(Strict):
    """One step of the walk. What is left out gets the default of its stage, or its parent's value, and is printed."""

    name: str = Field(description="The stage's name and the name of its folder.", pattern=NAME)
    stage: str = Field(description="What it does: pretrain, sft, preference or reward.")
    from_: str | None = Field(None, alias="from", description="The stage it starts from; left out: the recipe's model.")
    data: list[DataSource] = Field(
        description="File, folder, glob, hf://owner/name/path, or a list of them; or {path, weight, fields}."
    )
    eval_data: float | list[DataSource] | None = Field(
        None, description="Held-out rows: as data, or a share of it (decided row by row), or 0 for none."
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, instead of epochs.")
    batch_size: int | None = Field(None, ge=1, description="Examples per optimizer step.")
    batch_tokens: int | None = Field(None, ge=1, description="Tokens per optimizer step, instead of batch_size.")
    micro_batch_tokens: int | None = Field(None, ge=1, description="Tokens that one forward pass holds.")
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] | None = Field(
        None, description="Course of the learning rate after warm-up; wsd: stable, then down to 0 in the last fifth."
    )
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="Share of the steps spent on warm-up.")
    optimizer: Literal["adamw", "muon"] | None = Field(None, description="adamw, or muon (full training only).")
    weight_decay: float | None = Field(None, ge=0, description="Decoupled weight decay of matrices.")
    max_grad_norm: float | None = Field(None, gt=0, description="The gradient's norm is clipped to this.")
    max_length: int | None = Field(
        None,
        ge=2,
        description="Longest example in tokens; on_overflow says what becomes of longer rows.",
    )
    on_overflow: Literal["error", "drop", "truncate_left", "truncate_right", "split"] | None = Field(
        None,
        description="What becomes of rows longer than max_length or the model's context. Left out: text is split; "
        "other rows are an error if max_length was given, else dropped and counted.",
    )
    bad_rows: float | None = Field(None, ge=0, le=1, description="Share of unusable rows at which the run stops.")
    duplicates: Literal["keep", "drop"] | None = Field(
        None, description="Whether rows that were there before, word for word, are used again."
    )
    scored: Literal["best_worst", "all"] | None = Field(
        None, description="Of a scored list of answers: best against worst, or all, every better against every worse."
    )
    date: datetime.date | None = Field(
        None, description="The date that a chat template which asks for it is told; left out: today."
    )
    train_on: Literal["assistant", "last", "all"] | None = Field(
        None, description="Which turns of a conversation are trained."
    )
    recompute: Literal["none", "layers", "auto"] | int | None = Field(
        None,
        description="Recompute layers in the backward pass to save memory: all, none, or how many; auto: where they "
        "would not fit.",
    )
    memory: str | None = Field(
        None,
        description="What training may take at its peak, such as 2GB: passes get smaller and layers are recomputed, "
        "whichever costs less.",
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="The model's own dropout.")
    eval_every: int | None = Field(None, ge=1, description="Evaluate on the held-out rows every so many steps.")
    save_every: int | None = Field(
        None, ge=1, description="A checkpoint every so many steps; left out: as often as 2% of the time allows."
    )
    save_minutes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="A checkpoint every so many minutes, instead of save_every."
    )
    keep_checkpoints: int | None = Field(
        None, ge=1, description="How many of the last checkpoints are kept, besides the best one."
    )
    result: Literal["last", "best"] | None = Field(
        None, description="Which model the stage gives: that of the last step, or of the lowest held-out loss."
    )
    skip_non_finite: int | None = Field(
        None, ge=0, description="How many steps may be left out because their loss or gradient is not finite."
    )
    seed: int | None = Field(
        None, ge=0, lt=MOST_SEED, description="Seed of order and initialisation; left out: the recipe's."
    )
    dtype: Literal["float32", "bfloat16", "auto"] | None = Field(
        None, description="Computation and frozen weights; auto: bfloat16 on CUDA, float32 elsewhere."
    )
    device: str | None = Field(
        None, pattern=r"^[a-z]+(:[0-9]+)?$", description="cpu, cuda, cuda:1, mps; left out: the fastest there is."
    )
    method: dict[str, Any] | None = Field(
        None, description=f"How it is trained, and the method's settings: {', '.join((*METHODS, *PRESETS))}."
    )
    loss: str | dict[str, float] | None = Field(
        None,
        description=f"The objective, or several of pairs by weight ({{dpo: 1, hinge: 0.5}}): {', '.join(OBJECTIVES)}.",
    )
    beta: float | None = Field(
        None, gt=0, description="How strongly it holds on to its parent (IPO's tau); or the scale of its rewards."
    )
    sft_weight: float | None = Field(
        None, ge=0, description="Weight of next-token prediction on the chosen answer, beside the preference loss."
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="Share of the labels that is taken to be wrong (dpo: cDPO; robust, exo, cpo)."
    )
    gamma: float | None = Field(None, ge=0, description="SimPO's target margin: by how much rewards are to differ.")
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = Field(
        None, description="The f-divergence from the parent; left out, the reverse KL."
    )
    divergence_alpha: float | None = Field(None, description="The alpha of divergence: alpha.")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="What the longer answer's tokens beyond the shorter's length count (LD-DPO)."
    )
    desirable_weight: float | None = Field(None, gt=0, description="KTO: what an answer found good counts.")
    undesirable_weight: float | None = Field(None, gt=0, description="KTO: what an answer found bad counts.")
    center_rewards: float | None = Field(
        None, ge=0, description="Reward models: weight of what keeps rewards around 0 (0.01 is usual)."
    )
    reference: Literal["auto", "computed", "kept"] | None = Field(
        None, description="The parent's log-probabilities: computed in every step, or once and kept; auto: the cheaper."
    )
    reference_sync_steps: int | None = Field(
        None, ge=1, description="Move the reference to the model every so many steps (TR-DPO)."
    )
    reference_mixup: float | None = Field(
        None, gt=0, le=1, description="How far it is moved: 1, or left out, all the way."
    )

    @field_validator("stage")
    @classmethod
    def _stage(cls, value: str) -> str:
        if value not in STAGES:
            raise wrong(f"'{value}' is no stage there is{nearest(value, STAGES)}", f"stages: {', '.join(STAGES)}")
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            if isinstance(value, dict) and "name" not in value:
                raise wrong("it has no name", "write method: {name: full | lora | bottleneck | ..., ...}")
            try:
                value = as_written(value)
                settings_of(value)
            except RecipeError as error:
                raise wrong(error.what, error.remedy) from None
        return value

    @field_validator("loss", mode="before")
    @classmethod
    def _loss(cls, value: Any) -> Any:
        for weight in value.values() if isinstance(value, dict) else ():
            cls._no_switch(weight)
        return value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value.lower() in RESERVED or value.lower().endswith(ENDINGS):
            remedy = f"not {', '.join(RESERVED)}, and nothing that ends with {' or '.join(ENDINGS)}"
            raise wrong(f"the run's folder needs the name '{value}' itself", f"choose another name: {remedy}")
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, value: Any) -> Any:
        return _sources(value)

    @field_validator("eval_data", mode="before")
    @classmethod
    def _eval_data(cls, value: Any) -> Any:
        if value is None or isinstance(value, (int, float)):
            if value is not None and not 0 <= value < 1:
                raise wrong(f"{value} is no share of the data", "give a number from 0 up to, not including, 1")
            return value
        return _sources(value)

    def _check_memory(self) -> None:
        """``memory`` is an amount, and how it is kept to is not said besides."""
        if isinstance(self.recompute, int) and (isinstance(self.recompute, bool) or self.recompute < 0):
            raise wrong(
                f"{self.recompute} is no number of layers", "write none, layers, auto, or how many", "recompute"
            )
        if self.memory is not None:
            in_bytes(self.memory)
            if self.recompute not in (None, "auto"):
                what = "memory and recompute contradict each other: memory decides how many layers are recomputed"
                raise wrong(what, "leave one of them out", "recompute")

    @property
    def full(self) -> bool:
        """Whether it trains every weight."""
        return self.method is None or self.method["name"] == "full"

    @property
    def paths(self) -> Any:
        """Where its rows come from, as short as it can be written."""
        return _as_written(self.data)

    @field_serializer("data", "eval_data")
    def _short(self, value: Any) -> Any:
        return _as_written(value)

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        names = ("learning_rate", *SETTINGS, "epochs", "weight_decay", "max_grad_norm")
        for name in names:
            if isinstance(getattr(self, name), float) and not math.isfinite(getattr(self, name)):
                raise wrong(f"{getattr(self, name)} is no finite number", MEND, name)
        for one, other in (("epochs", "max_steps"), ("batch_size", "batch_tokens"), ("save_every", "save_minutes")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise wrong(f"{one} and {other} contradict each other", "leave one of them out", other)
        self._check_memory()
        kind = STAGES[self.stage]
        loss = kind.defaults["loss"] if self.loss is None else self.loss
        if (found := fault(loss, self.stage, kind.losses, self.__dict__)) is not None:
            key, _, what = found.partition(": ")
            raise wrong(what, MEND, key)
        relative = any(OBJECTIVES[name].relative for name in shares(loss))
        if self.reference is not None and not relative:
            raise wrong(f"{', '.join(shares(loss))} compares with none", "leave reference out", "reference")
        if self.reference is not None and self.reference_sync_steps is not None:
            what = "one that moves (reference_sync_steps) is neither kept nor computed once more"
            raise wrong(what, "leave one of them out", "reference")
        if loss == "kto" and self.batch_size == 1:
            raise wrong("kto compares every answer with those to other prompts", "use at least 2", "batch_size")
        rows = rows_of(self)
        if self.train_on is not None and rows != "conversation":
            raise wrong("only a stage that learns from conversations has one", "leave train_on out", "train_on")
        if self.scored is not None and rows not in ("pair", "rating"):
            what = "only a stage that learns from several answers to one prompt has one"
            raise wrong(what, "leave scored out", "scored")
        if self.scored == "all" and rows == "rating":
            what = "of a list of answers kto takes the best as good and the worst as bad, and no others"
            raise wrong(what, "leave scored out, or use a loss of pairs", "scored")
        if self.on_overflow == "split" and rows != "text":
            raise wrong("only text can be split", "use error, drop, truncate_left or truncate_right", "on_overflow")
        if self.date is not None and rows == "text":
            raise wrong("text has no chat template that could ask for it", "leave date out", "date")
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            raise wrong("some sources have a weight and some none", "give every source a weight, or none", "data")
        if isinstance(self.eval_data, list) and any(source.weight for source in self.eval_data):
            what = "every row is looked at once, so that its sources have no weight"
            raise wrong(what, "leave the weights out", "eval_data")
        if self.result == "best" and self.eval_data == 0:
            what = "without held-out rows none is the best"
            raise wrong(what, "give eval_data, or take result: last", "result")
        if self.optimizer == "muon" and not self.full:
            raise wrong("muon is for full training, not for an adapter", "use adamw, or method: full", "optimizer")
        return self
