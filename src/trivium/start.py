"""What a chain starts from: a given model, with what the recipe changes in it, or a new one and its tokenizer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.errors import DataError, RecipeError
from trivium.files import sha256_json, whole_folder, write_json
from trivium.recipe import Recipe, Stage
from trivium.sources import by_file, hashes, trained_on
from trivium.terminal import clock, say

if TYPE_CHECKING:
    from trivium.data.rows import Mix, Source
    from trivium.folder import Opened
    from trivium.model.language_model import LanguageModel


@dataclass(frozen=True)
class Link:
    """One place of the chain: a finished stage, or the model it all starts from."""

    source: str  # folder, file or hub id
    identity: str
    lineage: list[dict[str, Any]]


def start_of(recipe: Recipe, stage: Stage, out: Path) -> Link:
    """The model of the recipe; a new one is only described here, and made by the first stage."""
    from trivium.folder import identity_of

    model = recipe.model
    if isinstance(model, dict) and "architecture" in model:
        if stage.stage != "pretrain" and "tokenizer" not in model:
            remedy = "add a pretrain stage first, or give model.tokenizer: a folder with one"
            raise RecipeError(
                f"stages.{stage.name}: a new model has no tokenizer to begin a {stage.stage} stage with", remedy
            )
        _tokenizer(recipe, stage, out)
        identity = sha256_json({"model": {k: v for k, v in model.items() if k != "tokenizer"}, "seed": recipe.seed,
                                "tokenizer": identity_of(str(out / "tokenizer"))})  # fmt: skip
        return Link("new", identity, [{"name": "new", "stage": "random weights", "method": None, "identity": identity}])
    link = link_of(model if isinstance(model, str) else str(model["path"]))
    changes = {k: v for k, v in model.items() if k != "path"} if isinstance(model, dict) else {}
    return Link(link.source, sha256_json([link.identity, changes]), link.lineage) if changes else link


def link_of(source: str) -> Link:
    """A given model's place in a chain: its own lineage, where it was made here."""
    from trivium.folder import identity_of, record_of

    found = record_of(Path(source)) if Path(source).is_dir() else None
    identity = identity_of(source)
    lineage = found["lineage"] if found else [{"name": source, "stage": "given", "method": None, "identity": identity}]
    return Link(source, identity, lineage)


def given_method(recipe: Recipe) -> dict[str, Any] | None:
    """The method of the adapter folder that the recipe starts from, if it is one."""
    from trivium.folder import method_of

    source = recipe.model if isinstance(recipe.model, str) else recipe.model.get("path")
    method = method_of(Path(source)) if isinstance(source, str) else None
    return {"method": method} if method else None


def overrides(recipe: Recipe, parent: Link) -> dict[str, Any]:
    """What the recipe changes in the config of the model it starts from."""
    if not is_start(recipe, parent):
        return {}
    assert isinstance(recipe.model, dict)
    return {k: v for k, v in recipe.model.items() if k not in ("path", "add_tokens")}


def is_start(recipe: Recipe, parent: Link) -> bool:
    """Whether ``parent`` is the given model that the recipe describes by a mapping."""
    return isinstance(recipe.model, dict) and parent.source == recipe.model.get("path")


def add_tokens(model: Any, stage: Stage, settings: Any) -> None:
    """ChatML's two tokens for a base that has no chat template; their embedding rows are trained, so only in full."""
    from trivium.model.tokens import add_chat_tokens
    from trivium.peft.kinds import FullSettings

    if not isinstance(settings, FullSettings):
        raise RecipeError(
            f"model.add_tokens: new embedding rows must be trained, and stages.{stage.name} trains an adapter",
            "use method: full in the first stage, or leave add_tokens out: plain-text role markers need no new tokens",
        )
    added = add_chat_tokens(model, int(stage.seed or 0))
    say(
        f"  {added} tokens added to the vocabulary"
        if added
        else "  add_tokens: the tokenizer already has what it needs"
    )


def _tokenizer(recipe: Recipe, stage: Stage, out: Path) -> None:
    """The tokenizer of a new model, in ``out/tokenizer``: the one given, or trained on the first stage's text."""
    from trivium.folder import load_tokenizer, record_of, save_tokenizer

    assert isinstance(recipe.model, dict)
    final, given = out / "tokenizer", recipe.model.get("tokenizer")
    size_asked = recipe.model.get("vocab_size", 4096)
    if not isinstance(size_asked, int) or isinstance(size_asked, bool):
        raise RecipeError(f"model.vocab_size: {size_asked!r} is not a number of tokens", "e.g. vocab_size: 2048")
    made_from = {"given": given} if given else {"data": data_hashes(stage)["sha256"], "vocab_size": size_asked}
    identity = sha256_json(made_from)
    found = record_of(final) if final.is_dir() else None
    if found is not None and found["identity"] == identity:
        return
    if given:
        tokenizer = load_tokenizer(Path(given))
    else:
        tokenizer = tokenizer_from(trained_on(stage), size_asked)
    with whole_folder(final) as partial:
        save_tokenizer(tokenizer, partial)
        made = {"trivium": 1, "identity": identity, "made_from": made_from, "lineage": []}
        write_json(partial / "trivium.json", made)


def tokenizer_from(sources: Sequence[Source | Mix], vocab_size: int) -> Any:
    """A tokenizer trained on the text of some rows."""
    from trivium.data.rows import texts_of
    from trivium.data.tokenizer import train_tokenizer

    started = time.perf_counter()
    tokenizer = train_tokenizer(texts_of(sources), vocab_size)
    say(f"  tokenizer: {len(tokenizer):,} tokens, trained in {clock(time.perf_counter() - started)}")
    return tokenizer


def new_start(recipe: Recipe, out: Path, dtype: str, device: str) -> Opened:
    """The recipe's new model, with the run's tokenizer."""
    from trivium.folder import Opened, load_tokenizer
    from trivium.peft.kinds import FullSettings

    assert isinstance(recipe.model, dict)
    sizes = {k: v for k, v in recipe.model.items() if k != "tokenizer"}
    return Opened(
        fresh_model(sizes, load_tokenizer(out / "tokenizer"), recipe.seed, dtype, device), FullSettings(), None
    )


def fresh_model(sizes: dict[str, Any], tokenizer: Any, seed: int, dtype: str, device: str) -> LanguageModel:
    """A model of random weights that are held in float32. Raises RecipeError where the sizes do not fit together."""
    import torch

    from trivium.model.load import quiet, wrap
    from trivium.model.new import new_config, new_model

    with quiet():
        hf = new_model(new_config(sizes, tokenizer), seed)
    model = wrap(hf.to(device).eval(), tokenizer, dtype, torch.float32)
    say(f"  new {sizes['architecture']}: {model.parameters():,} parameters, vocabulary {len(tokenizer):,}")
    return model


def data_hashes(stage: Stage) -> dict[str, Any]:
    """What tells a stage's data from other data; raises DataError where a file is missing."""
    with _readable():
        return hashes(stage)


def file_hashes(stage: Stage) -> dict[str, str]:
    """SHA-256 of each file a stage reads, by path, so that a change can be named; raises DataError."""
    with _readable():
        return by_file(stage)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}", "check the file and its rights") from None
