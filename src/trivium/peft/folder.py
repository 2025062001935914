"""An adapter folder: ``adapter_model.safetensors`` and ``adapter_config.json``, written and read.

    save(model, folder, base="HuggingFaceTB/SmolLM2-135M", settings=attached.settings)
    attached = load(model, folder)          # a frozen base with the adapter hung in it, ready to use or train on

LoRA and its family, (IA)³, prompts and prefixes are written and read in PEFT's format (``peft_format.py``), so that
PEFT, vLLM and llama.cpp load them. Every other method has the same two files in a form of its own, which
``trivium_type`` names. A folder is data and never code: only safetensors are read, no key names a class or a file, and
every name and shape is checked against the model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trivium.errors import ModelError, UserError, said
from trivium.files import read_json
from trivium.model.headers import header
from trivium.model.untrusted import inside
from trivium.peft import peft_format
from trivium.peft.base import Attached, check_same, copy_in, hang, small_weights
from trivium.peft.hub import DEFAULT
from trivium.peft.kinds import QUANTIZATIONS, FullSettings, LoRASettings, Settings
from trivium.peft.lora_starts import plain_alpha
from trivium.peft.peft_format import MERGE, PREFIX, Read, Source, common, hung_of
from trivium.peft.peft_lora import LORA
from trivium.peft.settings import method_name, settings_for
from trivium.virtual import NEW_HEADS

FORMATS = {LoRASettings: ("LORA", LORA), **peft_format.FORMATS}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TYPE = "trivium_type"
BASE = "base_model_name_or_path"
REWARDS = "SEQ_CLS"  # the task_type of a reward model's adapter, which holds its readout, too
# What a recipe says for what a config of PEFT says; what the tensors tell is not there.
WORDS = {
    "LORA": ("lora", {
        "r": "r", "lora_alpha": "alpha", "target_modules": "target_modules", "use_rslora": "rslora",
        "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "use_dora": "dora",
        "modules_to_save": "modules_to_save", "target_parameters": "target_parameters",
    }),
    "VERA": ("vera", {
        "r": "r", "target_modules": "target_modules", "d_initial": "d_initial",
        "projection_prng_key": "projection_seed",
    }),
    "IA3": ("ia3", {"target_modules": "target_modules", "feedforward_modules": "feedforward_modules"}),
    "PROMPT_TUNING": ("prompt", {"num_virtual_tokens": "num_virtual_tokens"}),
    "PREFIX_TUNING": ("prefix", {"num_virtual_tokens": "num_virtual_tokens"}),
}  # fmt: skip
OURS = ("quantize", "init_lora_weights", "loraplus_lr_ratio")  # settings that PEFT's configs have no key for


def save(
    model: nn.Module,
    folder: Path,
    base: str,
    settings: Settings,
    dtype: torch.dtype = torch.float32,
    name: str = DEFAULT,
) -> None:
    """Write an adapter of ``model`` into ``folder``, plainly; ``base`` is the name or path of the base model.

    In the default float32 what is loaded again is what was saved, bitwise. Dtype and bytes are written beside the
    weights, and checked when they are read.
    """
    hung = hung_of(model, name)
    rewards = any(head in hung for head in getattr(model, NEW_HEADS, ()))
    task = {"task_type": REWARDS} if rewards else {}
    if (format := FORMATS.get(type(settings))) is not None and (format is FORMATS[LoRASettings] or not rewards):
        peft_type, written = format
        config = {**common(peft_type, base), **written.config(model, settings, hung), **task}
        small = written.tensors(hung)
    else:
        config = {TYPE: method_name(settings), BASE: base, **asdict(settings), **task}
        small = small_weights(hung, fixed=True)
    held = torch.float32 if any(delta.exact for delta in hung.values()) else dtype
    ready = {key: tensor.detach().to("cpu", held).contiguous() for key, tensor in small.items()}
    # Modules that share a weight are written one by one, as their readers want them.
    ready = {key: tensor.clone() if _shared(tensor, key, ready) else tensor for key, tensor in ready.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(ready, folder / WEIGHTS, metadata=_metadata(settings, ready))
    _in_order(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shared(tensor: Tensor, key: str, ready: dict[str, Tensor]) -> bool:
    return any(other is not tensor and other.data_ptr() == tensor.data_ptr() for k, other in ready.items() if k < key)


def _metadata(settings: Settings, ready: dict[str, Tensor]) -> dict[str, str]:
    """What stands in the weights' own header: that nothing changes them unnoticed, and what PEFT has no key for."""
    ours = {key: getattr(settings, key, None) for key in OURS}
    told = {key: value for key, value in ours.items() if value not in (None, "default", 1.0)}
    size = sum(tensor.nbytes for tensor in ready.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in ready.values()})
    return {"format": "pt", "dtype": ",".join(dtypes), "bytes": str(size), "trivium": json.dumps(told)}


def _in_order(path: Path) -> None:
    """Put the metadata in order, which safetensors writes as it comes: the same adapter is the same bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def load(model: nn.Module, folder: Path, name: str = DEFAULT) -> Attached:
    """Hang the adapter of ``folder`` in ``model``, frozen but for the deltas.

    Reads what ``save`` writes, and the folders of these methods that PEFT wrote. Raises ModelError when the folder is
    damaged, uses something that is not supported, or was made for another base; the model is then as it was.
    """
    source = Source(folder, read_config(folder), _read_weights(folder), written_beside(folder))
    read = _own(model, source) if TYPE in source.config else _pefts(model, source)
    if gives_rewards(folder) and (lacking := set(getattr(model, NEW_HEADS, ())) - read.plan.deltas.keys()):
        what = f"{folder} says that it makes a reward model, and holds no weights of {', '.join(lacking)}"
        raise ModelError(what, "fetch the adapter again")
    try:
        # Before anything is hung or any memory taken for sizes that the config claims.
        check_same(small_weights(read.plan.deltas, fixed=True), read.weights)
    except UserError as error:
        raise ModelError(f"{folder} does not fit this model: {error.what}", source.wants) from None
    return hang(
        model, read.settings, read.plan, lambda hung: copy_in(small_weights(hung, fixed=True), read.weights), name
    )


def _own(model: nn.Module, source: Source) -> Read:
    """A folder in our own form."""
    settings = _own_settings(source.config, source.folder)
    return Read(settings, source.planned(model, settings), source.small)


def _pefts(model: nn.Module, source: Source) -> Read:
    """A folder in PEFT's form."""
    kind = source.config.get("peft_type")
    for peft_type, format in FORMATS.values():
        if kind == peft_type:
            return format.read(model, source)
    known = ", ".join(peft_type for peft_type, _ in FORMATS.values())
    raise ModelError(f"{source.folder} has peft_type {kind!r}; {known} are read", MERGE)


def written_beside(folder: Path) -> dict[str, Any]:
    """What ``save`` wrote into the weights' header that PEFT's config has no key for; nothing for others' folders."""
    try:
        with safe_open(_inside(folder, WEIGHTS), "pt") as file:
            found = json.loads((file.metadata() or {}).get("trivium", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError, ModelError):
        return {}  # reading the weights tells what is wrong
    return {k: v for k, v in found.items() if k in OURS} if isinstance(found, dict) else {}


def quantization_of(folder: Path) -> str | None:
    """How the base was held when this adapter was trained on it: ``nf4``, ``int8``, or None: as it is."""
    config = read_config(folder)
    found = config.get("quantize") if TYPE in config else written_beside(folder).get("quantize")
    return found if found in QUANTIZATIONS else None


def gives_rewards(folder: Path) -> bool:
    """Whether an adapter makes a reward model of its base."""
    return bool(read_config(folder).get("task_type") == REWARDS)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder as they are in its ``adapter_config.json``. Raises ModelError."""
    path = _inside(folder, CONFIG)
    try:
        config = read_json(path)
    except ModelError as error:
        raise ModelError(f"{error.what}", "an adapter folder has this file; fetch it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold settings", "fetch the adapter again")
    return config


def method_in(folder: Path) -> dict[str, Any] | None:
    """A recipe's words for the adapter of a folder, so that a stage can go on training it; None where it has none."""
    config = read_config(folder)
    if TYPE in config:
        own = {k: v for k, v in config.items() if k not in (TYPE, BASE, "task_type") and v is not None}
        return {"name": config[TYPE], **own}
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in WORDS:
        return None
    name, words = WORDS[peft_type]
    found = {ours: config[theirs] for theirs, ours in words.items() if config.get(theirs)}
    if config.get("task_type") == REWARDS and isinstance(whole := found.get("modules_to_save"), list):
        found["modules_to_save"] = [name for name in whole if name not in ("classifier", "score")] or None
        found = {k: v for k, v in found.items() if v is not None}  # a reward's readout is trained beside any method
    beside = {k: v for k, v in written_beside(folder).items() if v is not None}
    if peft_type == "LORA" and (modules := _adapted(folder)):
        found["target_modules"] = modules  # what the tensors say: patterns and chosen layers are theirs to read
    if beside.get("init_lora_weights"):  # written as a plain LoRA of twice the rank
        once = 1 / plain_alpha(1, bool(found.get("rslora")))
        for key, factor in (("r", 0.5), ("alpha", once), ("rank_pattern", 0.5), ("alpha_pattern", once)):
            found |= {key: _times(found[key], factor)} if key in found else {}
    return {"name": name, **found, **beside}


def _adapted(folder: Path) -> list[str]:
    """The linear modules whose LoRAs a folder holds; none where it cannot be read, which reading the weights tells."""
    ending = ".lora_A.weight"
    try:
        with safe_open(_inside(folder, WEIGHTS), "pt") as file:
            names = [name.removesuffix(ending) for name in list(file.keys()) if name.endswith(ending)]
    except (OSError, SafetensorError, ValueError, ModelError):
        return []
    return sorted(n.removeprefix(PREFIX) for n in names if not n.endswith((".experts", ".base_layer")))


def _times(value: Any, factor: float) -> Any:
    """A number, or every number of a mapping; whole ones stay whole."""
    if isinstance(value, dict):
        return {key: _times(one, factor) for key, one in value.items()}
    if not isinstance(value, (int, float)):
        return value
    return int(value * factor) if float(value * factor).is_integer() else value * factor


def _own_settings(config: dict[str, Any], folder: Path) -> Settings:
    values = {key: value for key, value in config.items() if key not in (TYPE, BASE, "task_type")}
    try:
        settings = settings_for(config[TYPE], values)
    except UserError as error:
        raise ModelError(f"{folder / CONFIG}: {error.what}", error.remedy) from None
    if isinstance(settings, FullSettings) or (type(settings) in FORMATS and config.get("task_type") != REWARDS):
        raise ModelError(f"{folder / CONFIG} has {TYPE} {config[TYPE]!r}", "fetch the adapter again")
    return settings


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(
            f"{folder} has only adapter_model.bin, a pickle, which can run code and is never read",
            f"ask for the adapter as {WEIGHTS}, or convert it with PEFT where you trust it",
        )
    path = _inside(folder, WEIGHTS)
    try:
        header(path)
        with safe_open(path, "pt") as file:
            names, told = sorted(file.keys()), file.metadata() or {}
            found = {key: file.get_tensor(key) for key in names}
        size, dtypes = sum(t.nbytes for t in found.values()), {str(t.dtype)[6:] for t in found.values()}
        if "bytes" in told and (str(size), ",".join(sorted(dtypes))) != (told["bytes"], told["dtype"]):
            raise ValueError(f"{size} bytes of {sorted(dtypes)}, and it says {told['bytes']} of {told['dtype']}")
        for name, tensor in found.items():
            if not tensor.is_floating_point() or tensor.ndim == 0 or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds values that are no finite fractions")
        return found
    except (OSError, SafetensorError, ValueError, KeyError, ModelError) as error:
        told_of = error.what if isinstance(error, ModelError) else said(error)
        raise ModelError(f"{path} cannot be read: {told_of}", "the file is damaged or cut; fetch it again") from None


def _inside(folder: Path, name: str) -> Path:
    """The file's path. Raises ModelError where it is not there, or leads out of the folder."""
    path = folder / name
    if not path.exists() and not path.is_symlink():
        raise ModelError(f"{path} is not there", f"an adapter folder holds {WEIGHTS} and {CONFIG}")
    return inside(path, folder)
