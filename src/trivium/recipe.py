"""The recipe: what a person writes, checked when it is read.

Every field has one sentence. Unknown keys get the nearest name and the line they stand on. Fields left out stay
None here; `stages.py` gives them the defaults of their stage and says so.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trivium.errors import RecipeError, UserError, listed, nearest
from trivium.objectives import OBJECTIVES
from trivium.peft.settings import settings_for
from trivium.stages import STAGES


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


class Stage(Strict):
    """One step of the walk. What is left out gets the default of its stage, or its parent's value, and is printed."""

    name: str = Field(
        description="The stage's name and the name of its folder.", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
    )
    stage: str = Field(description="What it does: pretrain, sft or preference.")
    from_: str | None = Field(None, alias="from", description="The stage it starts from; left out: the recipe's model.")
    data: str | list[str] = Field(description="File, folder, glob, hf://owner/name/path, or a list of them.")
    eval_data: str | float | None = Field(None, description="Held-out rows: a path, a share of data, or 0 for none.")
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
        description="Longest example in tokens: longer text is split, longer rows are set aside and counted.",
    )
    bad_rows: float | None = Field(None, ge=0, le=1, description="Share of unusable rows at which the run stops.")
    train_on: Literal["assistant", "last", "all"] | None = Field(
        None, description="Which turns of a conversation are trained."
    )
    recompute: Literal["none", "layers", "auto"] | None = Field(
        None, description="Recompute each layer in the backward pass to save memory; auto: where it would not fit."
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="The model's own dropout.")
    eval_every: int | None = Field(None, ge=1, description="Evaluate on the held-out rows every so many steps.")
    seed: int | None = Field(None, ge=0, description="Seed of order and initialisation; left out: the recipe's.")
    dtype: Literal["float32", "bfloat16", "auto"] | None = Field(
        None, description="Computation and frozen weights; auto: bfloat16 on CUDA, float32 elsewhere."
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:1, mps; left out: the fastest there is.")
    method: dict[str, Any] | None = Field(None, description="name: full, lora or bottleneck, and its settings.")
    loss: str | None = Field(None, description="The objective: next_token or dpo.")
    beta: float | None = Field(None, gt=0, description="DPO's beta: how strongly it holds on to its parent.")

    @field_validator("stage")
    @classmethod
    def _stage(cls, value: str) -> str:
        if value not in STAGES:
            raise ValueError(f"there is no such stage{nearest(value, STAGES)}; stages: {', '.join(STAGES)}")
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict):
            if "name" not in value:
                raise RecipeError("method: no name", "write method: {name: full | lora | bottleneck, ...}")
            settings_for(value["name"], {k: v for k, v in value.items() if k != "name"})
        return value

    @field_validator("eval_data")
    @classmethod
    def _eval_data(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("a share of the data lies between 0 and 1")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        numbers = (self.learning_rate, self.beta, self.epochs, self.weight_decay, self.max_grad_norm)
        if any(n is not None and not math.isfinite(n) for n in numbers):
            raise ValueError("learning_rate, beta, epochs, weight_decay and max_grad_norm are finite numbers")
        for one, other in (("epochs", "max_steps"), ("batch_size", "batch_tokens")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} contradict each other: give one of them")
        rows = STAGES[self.stage].rows
        wanted = [name for name, entry in OBJECTIVES.items() if rows in entry.rows]
        if self.loss is not None and self.loss not in wanted:
            raise ValueError(f"loss: a {self.stage} stage has {' or '.join(wanted)}, not {self.loss}")
        if self.beta is not None and rows != "pair":
            raise ValueError("beta: only a stage that learns from pairs has one")
        if self.train_on is not None and rows != "conversation":
            raise ValueError("train_on: only a stage that learns from conversations has one")
        full = self.method is None or self.method["name"] == "full"
        if self.optimizer == "muon" and not full:
            raise ValueError("optimizer: muon is for full training; use adamw with an adapter")
        return self


class Recipe(Strict):
    """A chain of stages on one model."""

    name: str = Field(description="Name of the run.", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0, description="Seed of everything random; the same seed gives the same run.")
    model: str | dict[str, Any] = Field(
        description="A folder, hub id or GGUF file; or sizes of a new model (architecture, hidden_size, ...); "
        "or path and what overrides its config."
    )
    stages: list[Stage] = Field(min_length=1, description="The stages, each after the one it starts from.")

    @field_validator("model")
    @classmethod
    def _model(cls, value: Any) -> Any:
        if isinstance(value, dict) and ("path" in value) == ("architecture" in value):
            raise ValueError("give either `path` (a model there is) or `architecture` (a new one)")
        return value

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        seen: list[str] = []
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called '{stage.name}': rename one")
            if stage.from_ is not None and stage.from_ not in seen:
                after = " (it comes later)" if stage.from_ in {s.name for s in self.stages} else ""
                names = ", ".join(seen) or "none; leave `from` out to start from the model"
                hint = nearest(stage.from_, seen)
                raise ValueError(
                    f"stage '{stage.name}': unknown from: '{stage.from_}'{after}{hint}; stages before it: {names}"
                )
            seen.append(stage.name)
        return self


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override, check. Relative paths in it become absolute: they are relative to the recipe.

    ``overrides`` are ``key=value`` with dots, a stage by its name: ``stages.chat.learning_rate=1e-4``; a path given
    there may also be relative to the current folder. Raises RecipeError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise RecipeError(f"{path}: no such recipe{hint}", "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({type(error).__name__})", "a recipe is a YAML text file") from None
    return parse_recipe(text, path, overrides or [])


def parse_recipe(text: str, path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in ``text``; ``path`` is where it stands, for messages and relative paths."""
    try:
        value = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: not YAML: {problem}", "mend the line; indent with spaces") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML: {str(error)[:100]}", "mend the value") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with name, model and stages", "see recipes/ for examples")
    for override in overrides or []:
        _override(value, override)
    try:
        recipe = Recipe.model_validate(value)
    except UserError as error:
        raise RecipeError(f"{path}: {error.what}", error.remedy) from None
    except ValidationError as error:
        raise _explained(error, value, node, path) from None
    return _absolute(recipe, path.resolve().parent)


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: not key=value", "e.g. --set stages.chat.learning_rate=1e-4")
    try:
        new = yaml.safe_load(text)
    except yaml.YAMLError:
        new = text
    if isinstance(new, str):
        with_number = _number(new)
        new = with_number if with_number is not None else new
    *parents, last = key.split(".")
    at: Any = value
    for part in parents:
        found = None
        if isinstance(at, dict):
            found = at.setdefault(part, {}) if at is not value or part == "model" else at.get(part)
            names = list(at)
        elif isinstance(at, list):
            named = {s.get("name"): s for s in at if isinstance(s, dict)}
            found, names = named.get(part), [str(n) for n in named]
        else:
            names = []
        if found is None:
            raise RecipeError(f"--set {key}: no '{part}' here{nearest(part, names)}", f"there are: {listed(names)}")
        at = found
    if not isinstance(at, dict):
        raise RecipeError(
            f"--set {key}: '{parents[-1] if parents else key}' holds no keys", "e.g. --set stages.chat.data=rows.jsonl"
        )
    if last in ("data", "eval_data", "model", "path") and isinstance(new, str) and Path(new).exists():
        new = str(Path(new).resolve())
    at[last] = new


def _number(text: str) -> float | None:
    """YAML 1.1 reads 1e-4 as text; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return None


def _explained(error: ValidationError, value: dict[str, Any], node: Any, path: Path) -> RecipeError:
    """The first thing wrong, with its line, its key and the nearest name there is."""
    first = error.errors()[0]
    place = [p for p in first["loc"] if not (isinstance(p, str) and ("[" in p or p in ("str", "float", "dict")))]
    line, shown = _line_of(node, place), _shown(place, value)
    if first["type"] == "extra_forbidden":
        fields = Stage.model_fields if len(place) > 1 else Recipe.model_fields
        names = [f.alias or n for n, f in fields.items()]
        return RecipeError(
            f"{path}{line}: unknown key {shown}{nearest(str(place[-1]), names)}", f"keys there are: {listed(names, 40)}"
        )
    if first["type"] == "missing":
        return RecipeError(f"{path}{line}: {shown} is missing", f"add `{place[-1]}:`")
    message = first["msg"].removeprefix("Value error, ").strip()
    got = "" if isinstance(first["input"], (dict, list)) else f" (got {first['input']!r})"
    return RecipeError(
        f"{path}{line}: {shown + ': ' if shown else ''}{message}{got}"[:400], "mend it in the recipe or by --set"
    )


def _shown(place: list[Any], value: dict[str, Any]) -> str:
    """``stages.chat.beta`` instead of ``stages.1.beta``."""
    parts: list[str] = []
    at: Any = value
    for part in place:
        try:
            at = at[part]
        except (KeyError, IndexError, TypeError):
            at = None
        name = at.get("name") if isinstance(part, int) and isinstance(at, dict) else None
        parts.append(str(name or part))
    return ".".join(parts)


def _line_of(node: Any, place: list[Any]) -> str:
    """``:7`` for the line on which the deepest known part of ``place`` stands."""
    line = None
    for part in place:
        found = None
        if isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                if key.value == part:
                    found, line = child, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return f":{line}" if line else ""


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    def place(text: str) -> str:
        return text if text.startswith("hf://") else str(folder / Path(text).expanduser())

    for stage in recipe.stages:
        stage.data = [place(d) for d in stage.data] if isinstance(stage.data, list) else place(stage.data)
        if isinstance(stage.eval_data, str):
            stage.eval_data = place(stage.eval_data)
    if isinstance(recipe.model, str):
        recipe.model = _model_place(recipe.model, folder)
    else:
        for key in ("path", "tokenizer"):
            if isinstance(recipe.model.get(key), str):
                recipe.model[key] = _model_place(recipe.model[key], folder)
    return recipe


def _model_place(text: str, folder: Path) -> str:
    """A folder beside the recipe, or a hub id as it stands."""
    local = folder / Path(text).expanduser()
    is_path = local.exists() or text.startswith((".", "/", "~")) or text.endswith(".gguf") or text.count("/") != 1
    return str(local) if is_path else text
