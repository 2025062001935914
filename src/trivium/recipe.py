"""The recipe: what a person writes, checked when it is read.

Every field has one sentence. Unknown keys get the nearest name and the line they stand on. Fields left out stay
None here; `stages.py` gives them the defaults of their stage and says so.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trivium.errors import RecipeError, listed, nearest
from trivium.objectives import OBJECTIVES
from trivium.peft.settings import settings_for
from trivium.stages import STAGES

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
RESERVED = ("model", "tokenizer", "data")  # what a run writes beside its stages
ENDINGS = (".partial", ".old", ".json")
MOST_SEED = 2**63  # what torch takes
MEND = "mend it in the recipe or by --set"


def _wrong(what: str, remedy: str = MEND, *place: str | int) -> PydanticCustomError:
    """An error with a remedy of its own; ``place`` leads to the value, from where it is raised."""
    return PydanticCustomError("wrong", "{what}", {"what": what, "remedy": remedy, "place": list(place)})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):  # else true would be read as 1
            raise _wrong(f"{str(value).lower()} is no value for it", "write a number or a name")
        return value


class Stage(Strict):
    """One step of the walk. What is left out gets the default of its stage, or its parent's value, and is printed."""

    name: str = Field(description="The stage's name and the name of its folder.", pattern=NAME)
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
    seed: int | None = Field(
        None, ge=0, lt=MOST_SEED, description="Seed of order and initialisation; left out: the recipe's."
    )
    dtype: Literal["float32", "bfloat16", "auto"] | None = Field(
        None, description="Computation and frozen weights; auto: bfloat16 on CUDA, float32 elsewhere."
    )
    device: str | None = Field(
        None, pattern=r"^[a-z]+(:[0-9]+)?$", description="cpu, cuda, cuda:1, mps; left out: the fastest there is."
    )
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
                raise _wrong("it has no name", "write method: {name: full | lora | bottleneck, ...}")
            try:
                settings_for(value["name"], {k: v for k, v in value.items() if k != "name"})
            except RecipeError as error:
                raise _wrong(error.what, error.remedy) from None
        return value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value.lower() in RESERVED or value.lower().endswith(ENDINGS):
            remedy = f"not {', '.join(RESERVED)}, and nothing that ends with {' or '.join(ENDINGS)}"
            raise _wrong(f"the run's folder needs the name '{value}' itself", f"choose another name: {remedy}")
        return value

    @field_validator("data")
    @classmethod
    def _data(cls, value: Any) -> Any:
        if not value:
            raise _wrong("it names no file", "give a file, a folder, a glob, hf://owner/name/path, or a list of them")
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

    name: str = Field(description="Name of the run.", pattern=NAME)
    seed: int = Field(0, ge=0, lt=MOST_SEED, description="Seed of everything random; the same seed gives the same run.")
    model: str | dict[str, Any] = Field(
        description="A folder, hub id or GGUF file; or sizes of a new model (architecture, hidden_size, ...); "
        "or path and what overrides its config."
    )
    stages: list[Stage] = Field(min_length=1, description="The stages, each after the one it starts from.")

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        ways = "give a folder, hub id or .gguf file; {path: ...}; or the sizes of a new one: {architecture: llama, ...}"
        if not isinstance(value, (str, dict)) or not value:
            raise _wrong(f"{value!r} is no model", ways)
        if isinstance(value, dict):
            if ("path" in value) == ("architecture" in value):
                raise _wrong("it needs either `path` (a model there is) or `architecture` (a new one)", ways)
            for key in ("path", "architecture", "tokenizer"):
                if not isinstance(value.get(key, ""), str):
                    raise _wrong(f"{key} is {value[key]!r}, which is no name", ways)
        return value

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        seen: list[str] = []
        for number, stage in enumerate(self.stages):
            # where the file system does not tell upper case from lower, Chat and chat are one folder
            if stage.name.lower() in (name.lower() for name in seen):
                raise _wrong(f"a stage before it is called '{stage.name}', too", "rename one", "stages", number, "name")
            of_another = stage.name.removesuffix("-base")
            if of_another != stage.name and of_another in {s.name for s in self.stages}:
                what = f"stage '{of_another}' may have to write its base under the name '{stage.name}'"
                raise _wrong(what, "rename one", "stages", number, "name")
            if stage.from_ is not None and stage.from_ not in seen:
                after = " (it comes later)" if stage.from_ in {s.name for s in self.stages} else ""
                names = ", ".join(seen) or "none; leave `from` out to start from the model"
                hint = nearest(stage.from_, seen)
                what = f"no stage before it is called '{stage.from_}'{after}{hint}"
                raise _wrong(what, f"stages before it: {names}", "stages", number, "from")
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
        value = yaml.load(text, Loader=Loader)
        node = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: not YAML: {problem}", "mend the line; indent with spaces") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML: {str(error)[:100]}", "mend the value") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with name, model and stages", "see recipes/ for examples")
    for number, key in _repeated(node, set()):
        raise RecipeError(f"{path}:{number}: '{key}' is given a second time", "keep one of the two")
    for override in overrides or []:
        _override(value, override)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise _explained(error, value, node, path) from None
    return _absolute(recipe, path.resolve().parent)


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: not key=value", "e.g. --set stages.chat.learning_rate=1e-4")
    try:
        new = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        new = text
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
        if part == "method" and isinstance(found, str):  # method: lora, and --set ...method.r=8
            at[part] = found = {"name": found}
        at = found
    if not isinstance(at, dict):
        raise RecipeError(
            f"--set {key}: '{parents[-1] if parents else key}' holds no keys", "e.g. --set stages.chat.data=rows.jsonl"
        )
    if last in ("data", "eval_data", "model", "path", "tokenizer"):
        new = [_here(one) for one in new] if isinstance(new, list) else _here(new)
    at[last] = new


def _here(new: Any) -> Any:
    """A path or glob that means something in the current folder, as an absolute path."""
    there = isinstance(new, str) and new and (Path(new).expanduser().exists() or glob.glob(new))  # noqa: PTH207
    return str(Path(new).expanduser().absolute()) if there else new


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people mean a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _repeated(node: Any, seen: set[int]) -> Iterator[tuple[int, str]]:
    """(line, key) of every key that its mapping has already; YAML's reader would keep the last without a word."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, child in node.value:
            if isinstance(key.value, str) and key.value in keys and key.value != "<<":
                yield key.start_mark.line + 1, key.value
            keys.add(str(key.value))
            children = [*children, child]
    for child in children:
        yield from _repeated(child, seen)


def _explained(error: ValidationError, value: dict[str, Any], node: Any, path: Path) -> RecipeError:
    """The first thing wrong, with its line, its key and the nearest name there is."""
    first = error.errors()[0]
    context = first.get("ctx", {})
    place: list[Any] = [
        p for p in first["loc"] if not (isinstance(p, str) and ("[" in p or p in ("str", "float", "dict")))
    ]
    place += context.get("place", [])
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
    got = "" if isinstance(first["input"], (dict, list)) or "what" in context else f" (got {first['input']!r})"
    what = " ".join(f"{path}{line}: {shown + ': ' if shown else ''}{message}{got}".split())
    return RecipeError(what[:400], context.get("remedy", MEND))


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
