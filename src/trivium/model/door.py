"""The one place where `transformers` is asked for a config, a tokenizer or a model: after what is there was checked.

    where, extra = fetched(*locate(source))
    config, tokenizer = config_of(where, extra), tokenizer_of(where, extra)

What comes from the hub is fetched first, into its client's cache: settings, then weights, and never another kind of
file. It is looked at there as any folder is, and then read from that very commit without asking the hub again.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from trivium.circles import as_usual
from trivium.errors import ModelError
from trivium.files import read_json
from trivium.model.untrusted import READ, TEMPLATES, check_files, check_folder, inside
from trivium.model.vocabulary import tried

Extra = dict[str, Any]
KEPT = {"trust_remote_code": False}  # nothing is run; without it transformers asks a person at the terminal


def ready() -> None:
    """Before the first model is made: what all of them are made with is imported."""
    importlib.import_module("transformers.modeling_utils")
    as_usual()


def fetched(where: str, extra: Extra, weights: bool = False) -> tuple[str, Extra]:
    """A hub id as it lies in the cache, checked; a folder or file as it stands. Raises ModelError, and what the hub's
    client raises."""
    if extra or Path(where).is_dir():
        return where, extra
    from huggingface_hub import snapshot_download

    wanted = [f"*{ending}" for ending in READ if ending != ".safetensors"]
    folder = Path(snapshot_download(where, allow_patterns=[*wanted, f"{TEMPLATES}/*.jinja"]))
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names instead
        raise ModelError(f"{where}: an adapter", "fetch it into a folder (hf download), and give that folder")
    check_files(folder)
    extra = {"revision": folder.name, "local_files_only": True}
    if weights:
        snapshot_download(where, revision=folder.name, allow_patterns=_parts(folder))
        if not any(folder.glob("*.safetensors")):
            remedy = "convert it once with transformers: model.save_pretrained(folder) writes safetensors"
            raise ModelError(f"{where}: it has no weights as safetensors, the only kind that cannot run code", remedy)
        check_folder(folder)
    return where, extra


def _parts(folder: Path) -> list[str]:
    """The files of weights that a repository has, by its index."""
    index = folder / "model.safetensors.index.json"
    found = read_json(inside(index, folder)) if index.exists() else {}
    parts = found.get("weight_map") if isinstance(found, dict) else None
    names = {str(name) for name in parts.values()} if isinstance(parts, dict) else set()
    return ["model.safetensors", *sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))]


def config_of(where: str, extra: Extra) -> Any:
    """The config. Attention and experts are computed as this machine can, whatever a file says; only eager, which is
    always there, is kept."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, **_here(where, extra), **KEPT)
    if config._attn_implementation != "eager":
        config._attn_implementation = None
    config._experts_implementation = None
    if hasattr(config, "auto_map"):  # it would be saved with the model, and names what is not there
        del config.auto_map
    return config


def tokenizer_of(where: str, extra: Extra) -> Any:
    """The tokenizer, when it has read a text."""
    from transformers import AutoTokenizer

    return tried(AutoTokenizer.from_pretrained(where, **extra, **KEPT))


def model_of(kind: Any, where: str, extra: Extra, config: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """A model of safetensors or GGUF weights by an ``AutoModel`` class, and what was missing in them."""
    found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
        where, config=config, **_here(where, extra), **KEPT, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    return found


def _here(where: str, extra: Extra) -> Extra:
    """A folder is never a reason to ask the hub."""
    return {"local_files_only": True, **extra} if Path(where).is_dir() else extra
