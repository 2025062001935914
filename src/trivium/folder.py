"""What a folder holds: a whole model, or one adapter on one base; and everything it can tell about how it was made.

A stage's folder is what `transformers` (full) or `peft` (LoRA) loads as it is, with ``trivium.json`` beside it:
identity, parent, data, settings, versions, metrics, rows, costs, and the lineage back to the first base.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trivium.errors import ModelError, RecipeError, beside, said
from trivium.files import read_json, sha256_file, sha256_json, write_by, write_json
from trivium.model.door import config_of, fetched, tokenizer_of
from trivium.model.language_model import LanguageModel
from trivium.model.load import load_base, offline_where_unreachable, quiet
from trivium.model.quantized import quantized
from trivium.model.reward import as_reward_model
from trivium.model.untrusted import check_files, inside
from trivium.peft.hub import CHILD
from trivium.peft.kinds import FullSettings, Settings, quantization
from trivium.terminal import size

if TYPE_CHECKING:
    from trivium.data.chat import ChatTemplate
    from trivium.peft.base import Attached

RECORD = "trivium.json"


@dataclass
class Opened:
    """A model ready to use. ``base`` is where an adapter's base lies (None: it is a whole model itself)."""

    model: LanguageModel
    settings: Settings
    base: str | None
    notes: list[str] = field(default_factory=list)


def record_of(folder: Path) -> dict[str, Any] | None:
    """The folder's ``trivium.json``, or None where it was not made here."""
    path = folder / RECORD
    record = read_json(inside(path, folder)) if path.is_file() else None
    if record is not None and not _is_record(record):
        raise ModelError(f"{path}: not a record of trivium", "restore the folder, or delete this file")
    return record


def _is_record(value: Any) -> bool:
    """Whether what is shown and followed of a record has the types it should have."""
    if not isinstance(value, dict) or not isinstance(value.get("identity"), str):
        return False
    lineage, metrics = value.get("lineage"), value.get("metrics", {})
    links = isinstance(lineage, list) and all(isinstance(one, dict) and "name" in one for one in lineage)
    links = links and all(isinstance(one.get("identity"), str) for one in lineage or [])
    numbers = isinstance(metrics, dict) and all(isinstance(v, (int, float)) for v in metrics.values())
    return links and numbers and isinstance(value.get("base") or {}, dict)


def trained_template(source: str) -> str | None:
    """The hash of the chat template that a folder's model was trained with; None where nothing tells."""
    record = record_of(Path(source)) if Path(source).is_dir() else None
    template = (record or {}).get("template")
    found = template.get("sha256") if isinstance(template, dict) else None
    return found if isinstance(found, str) else None


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def rewards_in(folder: Path) -> bool:
    """Whether a folder holds a reward model, or an adapter that makes one of its base. Raises ModelError."""
    from trivium.peft import folder as adapter

    if is_adapter(folder):
        return adapter.gives_rewards(folder)
    file = folder / "config.json"
    config = read_json(inside(file, folder)) if file.exists() else {}
    named = config.get("architectures") if isinstance(config, dict) else None
    return isinstance(named, list) and any(str(n).endswith("ForSequenceClassification") for n in named)


def open_folder(
    source: str, dtype: str = "float32", device: str = "cpu", overrides: dict[str, Any] | None = None
) -> Opened:
    """Open a model or adapter folder, GGUF file or hub id for use or further training.

    Raises ModelError where it is not there, is damaged, or is an adapter for another base.
    """
    folder = Path(source).expanduser()
    if not (folder.is_dir() and is_adapter(folder)):
        return Opened(load_base(source, dtype, device, overrides), FullSettings(), None)
    from trivium.peft import folder as adapter

    check_files(folder)
    base = base_of(folder)
    opened = open_folder(base, dtype, device, overrides)
    if (how := adapter.quantization_of(folder)) is not None:
        quantize_layers(opened.model, how)
    if adapter.gives_rewards(folder):
        opened.model = as_reward_model(opened.model, 0)
    attached = adapter.load(opened.model.hf, folder)
    if (folder / "tokenizer_config.json").is_file():
        opened.model.tokenizer = load_tokenizer(folder)
    return Opened(opened.model, attached.settings, base, attached.notes)


def quantize_layers(model: LanguageModel, how: str) -> None:
    """Hold the linear modules of the layers in 4 or 8 bit: ``nf4`` or ``int8``. Raises ModelError."""
    from trivium.model.quantized import quantize
    from trivium.peft.checks import ALL_LINEAR
    from trivium.peft.targets import find_targets

    quantize(model.hf, find_targets(model.hf, ALL_LINEAR), how)
    for parameter in model.hf.parameters():
        # what is left may be the only reader of a file that is mapped into memory whole, the unpacked weights with it
        parameter.data = parameter.data.clone()


def attach(model: LanguageModel, settings: Settings, seed: int) -> Attached:
    """Hold the base as the settings ask, and hang a new adapter in it. Raises RecipeError, ModelError."""
    from trivium.peft import base
    from trivium.train.machine import free_memory

    plan = base.plan_for(model.hf, settings)
    # weight, gradient and two moments, of four bytes each
    needed = 16 * sum(t.numel() for t in base.small_weights(plan.deltas).values()) if plan is not None else 0
    if needed > (free := free_memory(str(model.device))):
        raise RecipeError(f"the method's weights take {size(needed)}, and {size(free)} are free", "make it smaller")
    if (how := quantization(settings)) is not None:
        quantize_layers(model, how)
    return base.attach(model.hf, settings, seed)


def method_of(folder: Path) -> dict[str, Any] | None:
    """The recipe's words for the adapter in ``folder``, so that a stage can go on training it; None: no adapter."""
    if not is_adapter(folder):
        return None
    from trivium.peft.folder import method_in
    from trivium.peft.settings import settings_of

    check_files(folder)
    record = record_of(folder)
    if record is not None and isinstance(record.get("settings"), dict):
        method, told_by = record["settings"].get("method"), RECORD
    else:
        method, told_by = method_in(folder), "adapter_config.json"
    if not isinstance(method, dict):
        return None
    try:
        settings_of(method)
    except RecipeError as error:  # of the folder, not of the recipe
        raise ModelError(f"{folder / told_by}: {error.what}", error.remedy) from None
    return method


def load_tokenizer(folder: Path) -> Any:
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
        remedy = f"give a folder with a tokenizer, or a hub id (owner/name){beside(folder)}"
        raise ModelError(f"{folder}: no such folder", remedy)

    if folder.is_dir():
        check_files(folder)
    with quiet():
        try:
            return tokenizer_of(*fetched(str(folder), {}))
        except ModelError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise ModelError(f"{folder}: its tokenizer cannot be loaded: {said(error)}", "restore the folder") from None


def reading_of(source: str) -> tuple[Any, int | None]:
    """The tokenizer of a model, and its context in tokens (None: not said), without loading a weight.

    ``source``: a folder, also of an adapter or a tokenizer alone, a ``.gguf`` file, or a hub id. Raises ModelError.
    """
    from trivium.model.language_model import context_of
    from trivium.model.load import clear_errors_of, settings_at

    path = Path(source).expanduser()
    if path.is_dir() and is_adapter(path):
        tokenizer, context = reading_of(base_of(path))
        own = (path / "tokenizer_config.json").is_file()
        return load_tokenizer(path) if own else tokenizer, context
    if path.is_dir() and not (path / "config.json").is_file():
        return load_tokenizer(path), None
    with quiet(), clear_errors_of(source):
        where, extra = settings_at(source)
        config, tokenizer = config_of(where, extra), tokenizer_of(where, extra)
    return tokenizer, context_of(config.get_text_config())


def base_of(folder: Path) -> str:
    """Where an adapter's base lies: beside it as recorded, where it was, or a hub id. Raises ModelError."""
    from trivium.peft.folder import read_config

    record = record_of(folder) or {}
    recorded = record.get("base") or {}
    named = read_config(folder).get("base_model_name_or_path")
    tried = []
    for place in (recorded.get("path"), recorded.get("source"), named):
        if not isinstance(place, str) or not place or "\0" in place:
            continue
        for candidate in _places(folder, place):
            if candidate.exists():
                if not (candidate.is_dir() or (candidate.is_file() and candidate.suffix == ".gguf")):
                    what = f"{folder}: its base {candidate} is no model"
                    raise ModelError(what, "name a model folder, a .gguf file, or a hub id in its adapter_config.json")
                if candidate.is_dir() and is_adapter(candidate):
                    raise ModelError(f"{folder}: its base {candidate} is itself an adapter", "merge that adapter first")
                _check_base(folder, recorded, candidate)
                return str(candidate)
        tried.append(place)
    if not tried:
        raise ModelError(
            f"{folder}: an adapter that names no base", "write base_model_name_or_path in its adapter_config.json"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", tried[-1]) and not tried[-1].startswith("."):
        return tried[-1]
    raise ModelError(
        f"{folder}: its base model is not at {tried[-1][:200]}",
        "put the base back there, or beside the adapter's folder",
    )


def _places(folder: Path, place: str) -> list[Path]:
    """Where a path in an adapter's folder may mean: from there, and from here; nowhere for what can be no path."""
    try:
        found = [(folder / place).resolve(), Path(place)]
        _ = [path.exists() for path in found]
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
        return []
    return found


def _check_base(folder: Path, recorded: dict[str, Any], base: Path) -> None:
    """An adapter made here is refused on another stage's model, also where the shapes happen to fit."""
    found = record_of(base) if base.is_dir() else None
    if found is not None and recorded.get("identity") not in (None, found["identity"]):
        raise ModelError(
            f"{folder}: an adapter for another base: {base} has changed since (identity {found['identity'][:12]}, "
            f"wanted {recorded['identity'][:12]})",
            "train the adapter again on this base, or restore the base",
        )


def relative(path: str | Path, start: Path) -> str:
    """``path`` as seen from ``start``, so that a run can be moved as a whole."""
    return os.path.relpath(Path(path).resolve(), start.resolve())


def place(source: str, identity: str, final: Path) -> dict[str, Any]:
    """How the record of folder ``final`` names another model: from there, as it was given, and by identity."""
    path = relative(source, final) if Path(source).exists() else source
    return {"path": path, "source": source, "identity": identity}


def identity_of(source: str) -> str:
    """A model's identity: its record's, or a hash of its files; for a hub id, of the name and revision."""
    path = Path(source).expanduser()
    if path.is_dir():
        record = record_of(path)
        if record is not None:
            return str(record["identity"])
        check_files(path)
        wanted = (".safetensors", ".json", ".jinja", ".model", ".txt")
        names = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in wanted)
        own = sha256_json({p.name: sha256_file(p) for p in names})
        return sha256_json([own, identity_of(base_of(path))]) if is_adapter(path) else own
    if path.is_file():
        return sha256_file(path)
    return sha256_json({"hub": source, "revision": _revision(source)})


def _revision(source: str) -> str | None:
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    offline_where_unreachable()
    with quiet():
        try:
            return extract_commit_hash(cached_file(source, "config.json"), None)
        except Exception:  # whatever the hub's client raises, loading the model will say it better
            return None


# --- saving


def round_to(hf: torch.nn.Module, dtype: torch.dtype) -> None:
    """What is measured from here on is what the folder will hold."""
    from trivium.peft.base import kept_exact

    exact = kept_exact(hf)
    with torch.no_grad():
        for p in hf.parameters():
            if p.requires_grad and p.dtype != dtype and not exact:
                p.copy_(p.to(dtype))


def save(model: LanguageModel, settings: Settings, base: str | None, folder: Path) -> None:
    """Write an adapter on ``base``, or the whole model where it was trained in full, each with its tokenizer."""
    from trivium.data.templates import chat_template
    from trivium.peft import folder as adapter

    if isinstance(settings, FullSettings):
        save_model(model, folder, chat_template(model.tokenizer))
        return
    assert base is not None, "an adapter names its base"
    needed = model.trained_parameters() * model.saved_dtype.itemsize
    write_by(folder, lambda: adapter.save(model.hf, folder, base, settings, model.saved_dtype), needed)
    save_tokenizer(model.tokenizer, folder)


def save_model(model: LanguageModel, folder: Path, template: ChatTemplate) -> None:
    """A whole model as `transformers` loads it, with its tokenizer and template, stopping where its turns end."""
    hf, attention = model.hf, model.hf.config._attn_implementation
    assert quantized(hf) is None, "packed layers are no whole model"
    own = {n: t for n, t in hf.state_dict().items() if CHILD not in n.split(".")}  # an adapter is no part of its base
    state = {n: t.to(model.saved_dtype) if t.is_floating_point() else t for n, t in own.items()}
    try:
        hf.config._attn_implementation = model.native_attention
        if hf.can_generate() and hf.generation_config is not None:
            hf.generation_config.eos_token_id = sorted(template.stop_ids)
            hf.generation_config.pad_token_id = model.tokenizer.pad_token_id
        needed = sum(t.numel() * t.element_size() for t in state.values())
        write_by(folder, lambda: hf.save_pretrained(folder, state_dict=state), needed)
    finally:
        hf.config._attn_implementation = attention
    # transformers has written the dtype in which the weights are held, and would load them in it again
    config = read_json(folder / "config.json")
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if "dtype" in part:
            part["dtype"] = str(model.saved_dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    save_tokenizer(model.tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer as `transformers` loads it. Raises DiskError."""
    write_by(folder, lambda: tokenizer.save_pretrained(folder), len(tokenizer.backend_tokenizer.to_str()))
