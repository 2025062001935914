"""From a recipe's YAML file to a `Recipe`: line numbers, repeated keys, overrides, relative paths, clear errors."""

from __future__ import annotations

import glob
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trivium.errors import RecipeError, listed, nearest, said
from trivium.files import exists
from trivium.recipe import MEND, DataSource, JudgeSource, Recipe, Stage
from trivium.recipe_stage import Strict

MOST = 4 * 2**20  # bytes of a recipe
MOST_NODES = 100_000  # values in a recipe
ODD = (ValueError, LookupError, AttributeError, TypeError, OverflowError)  # what YAML's reader raises of odd values


def any_recipe(recipe: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a YAML file, or from the same as a mapping. Raises RecipeError."""
    if isinstance(recipe, Mapping):
        return recipe_of(dict(recipe), Path("recipe"), list(overrides))
    return read_recipe(Path(recipe), list(overrides))


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override, check. Relative paths in it become absolute: they are relative to the recipe.

    ``overrides`` are ``key=value`` with dots, a stage by its name: ``stages.chat.learning_rate=1e-4``; a path given
    there may also be relative to the current folder. Raises RecipeError.
    """
    try:
        told = path.stat()
        if not stat.S_ISREG(told.st_mode) or told.st_size > MOST:
            why = f"{told.st_size:,} bytes" if stat.S_ISREG(told.st_mode) else "no regular file"
            raise RecipeError(f"{path}: cannot be read ({why})", "a recipe is a YAML text file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise RecipeError(f"{path}: no such recipe{hint}", "check the path") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8 text", "give the recipe's YAML file, saved as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", "check the file and its rights") from None
    return parse_recipe(text, path, overrides or [])


def parse_recipe(text: str, path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in ``text``; ``path`` is where it stands, for messages and relative paths. Raises RecipeError."""
    try:
        node = yaml.compose(text, Loader=Loader)
        value = _value(text, node, str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: not YAML: {problem}", "mend the line; indent with spaces") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply for a recipe", "see recipes/ for examples") from None
    except ODD as error:
        raise RecipeError(f"{path}: not YAML: {said(error, 100)}", "mend the value") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with name, model and stages", "see recipes/ for examples")
    for number, key in _repeated(node, set()):
        raise RecipeError(f"{path}:{number}: '{key}' is given a second time", "keep one of the two")
    return recipe_of(value, path, overrides, node)


def recipe_of(value: dict[str, Any], path: Path, overrides: list[str] | None = None, node: Any = None) -> Recipe:
    """The recipe that a mapping says; ``node`` knows the lines of its file. Raises RecipeError."""
    for override in overrides or []:
        _override(value, override)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise _explained(error, value, node, path) from None
    return _absolute(recipe, path.resolve().parent)


def one_judge(reward: str | None, endpoint: str | None, model: str | None) -> JudgeSource | None:
    """Who judges, as options of a command say it; None where they name nobody. Raises RecipeError."""
    if reward is None and endpoint is None and model is None:
        return None
    try:
        return JudgeSource(reward=reward, endpoint=endpoint, model=model)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        remedy = "e.g. --reward DIR, or --endpoint URL --model NAME"
        raise RecipeError(f"the judge: {said}", remedy) from None


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: not key=value", "e.g. --set stages.chat.learning_rate=1e-4")
    try:
        new = _value(text, yaml.compose(text, Loader=Loader), f"--set {key}")
    except (yaml.YAMLError, RecursionError, *ODD):
        new = text
    *parents, last = key.split(".")
    at: Any = value
    for part in parents:
        found = None
        if isinstance(at, dict):
            found = at.setdefault(part, {}) if at is not value or part == "model" else at.get(part)
            names = list(at)
        elif isinstance(at, list):
            named = {str(s.get("name")): s for s in at if isinstance(s, dict)}
            found, names = named.get(part), list(named)
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
    if last in ("data", "eval_data", "eval_text", "model", "path", "tokenizer"):
        new = [_here(one) for one in new] if isinstance(new, list) else _here(new)
    at[last] = new


def _here(new: Any) -> Any:
    """A path or glob that means something in the current folder, as an absolute path."""
    there = isinstance(new, str) and new and (exists(Path(new).expanduser()) or glob.glob(new))  # noqa: PTH207
    return str(Path(new).expanduser().absolute()) if there else new


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people mean a number. Half a character is no text."""

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(None, None, "half a character (a lone surrogate)", node.start_mark)
        return value


def _value(text: str, node: Any, where: str) -> Any:
    """What YAML's text says. Raises RecipeError where its aliases stand for more than any recipe holds."""
    if node is not None and _size(node, {}) > MOST_NODES:
        raise RecipeError(f"{where}: it has more than {MOST_NODES:,} values, aliases replaced", "write fewer aliases")
    return yaml.load(text, Loader=Loader)


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values there are under a node, an alias counted as what it stands for; one of itself is without end."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # until it is known
        children = node.value if isinstance(node.value, list) else []
        inside = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in inside)
    return known[id(node)]


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
        inside: type[Strict] = DataSource if "data" in place or "eval_data" in place else Stage
        inside = JudgeSource if place[:1] == ["judge"] else inside
        fields = inside.model_fields if len(place) > 1 else Recipe.model_fields
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

    if recipe.eval_text is not None:
        recipe.eval_text = place(recipe.eval_text)
    if recipe.judge is not None and recipe.judge.reward not in (None, *(s.name for s in recipe.stages)):
        recipe.judge.reward = _model_place(str(recipe.judge.reward), folder)
    for stage in recipe.stages:
        for source in [*stage.data, *(stage.eval_data if isinstance(stage.eval_data, list) else [])]:
            source.path = place(source.path)
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
    is_path = exists(local) or text.startswith((".", "/", "~")) or text.endswith(".gguf") or text.count("/") != 1
    return str(local) if is_path else text
