"""An adapter folder: ``adapter_model.safetensors`` and ``adapter_config.json``, written and read.

    save(model, folder, base="HuggingFaceTB/SmolLM2-135M", settings=attached.settings)
    attached = load(model, folder)          # a frozen base with the adapter hung in it, ready to use or train on

LoRA is written and read in PEFT's format (``peft_format.py``), so that PEFT, vLLM and llama.cpp load it. Every other
method has the same two files in a form of its own, which ``trivium_type`` names. A folder is data and never code:
only safetensors are read, no key names a class or a file, and every name and shape is checked against the model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trivium.errors import ModelError, UserError
from trivium.peft import peft_format
from trivium.peft.base import Attached, check_same, deltas, hang, load_state, plan_for, small_weights, state
from trivium.peft.settings import FullSettings, LoRASettings, Settings, method_name, settings_for

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TYPE = "trivium_type"


def save(model: nn.Module, folder: Path, base: str, settings: Settings, dtype: torch.dtype = torch.float32) -> None:
    """Write the deltas of ``model`` into ``folder``, plainly; ``base`` is the name or path of the base model.

    In the default float32 what is loaded again is what was saved, bitwise.
    """
    assert deltas(model), "there is no adapter to save"
    if isinstance(settings, LoRASettings):
        config = peft_format.config(model, base, settings)
        small = peft_format.tensors(model)
    else:
        config = {TYPE: method_name(settings), "base_model_name_or_path": base, **asdict(settings)}
        small = state(model)
    folder.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in small.items()}
    save_file(ready, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(model: nn.Module, folder: Path) -> Attached:
    """Hang the adapter of ``folder`` in ``model``, frozen but for the deltas.

    Reads what ``save`` writes, and LoRA folders that PEFT wrote. Raises ModelError when the folder is damaged, uses
    something that is not supported, or was made for another base; the model then has no deltas.
    """
    config = read_config(folder)
    base = config.get("base_model_name_or_path") or "an unnamed base"
    small = _read_weights(folder)
    if TYPE not in config:
        return peft_format.attach_lora(model, config, small, folder)
    settings = _own_settings(config, folder)
    try:
        plan = plan_for(model, settings)
        assert plan is not None, "full has no folder of this kind"
        # Before anything is hung or any memory taken for sizes that the config claims.
        check_same(small_weights(plan.deltas), small)
    except UserError as error:
        raise ModelError(f"{folder} does not fit this model: {error.what}", f"It was trained on {base}.") from None
    attached = hang(model, settings, plan)
    load_state(model, small)
    return attached


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder as they are in its ``adapter_config.json``. Raises ModelError."""
    path = _inside(folder, CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", "An adapter folder has this file; fetch it again."
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold settings", "Fetch the adapter again.")
    return config


def _own_settings(config: dict[str, Any], folder: Path) -> Settings:
    values = {key: value for key, value in config.items() if key not in (TYPE, "base_model_name_or_path")}
    try:
        settings = settings_for(config[TYPE], values)
    except UserError as error:
        raise ModelError(f"{folder / CONFIG}: {error.what}", error.remedy) from None
    if isinstance(settings, (FullSettings, LoRASettings)):
        raise ModelError(f"{folder / CONFIG} has {TYPE} {config[TYPE]!r}", "Fetch the adapter again.")
    return settings


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(
            f"{folder} has only adapter_model.bin, a pickle, which can run code and is never read",
            f"Ask for the adapter as {WEIGHTS}, or convert it with PEFT where you trust it.",
        )
    path = _inside(folder, WEIGHTS)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "The file is damaged or cut; fetch it again.") from None


def _inside(folder: Path, name: str) -> Path:
    """The file's path, refused when a link leads out of the folder (to a hub cache's own blobs is not out)."""
    path, root = (folder / name).resolve(), folder.resolve()
    if not path.is_file() and not path.is_relative_to(root):
        raise ModelError(f"{folder / name} is a link to nothing", "Fetch the adapter again.")
    blobs = root.parent.parent / "blobs"
    if path.is_relative_to(root) or (root.parent.name == "snapshots" and path.is_relative_to(blobs)):
        if not path.is_file():
            raise ModelError(f"{folder / name} is not there", f"An adapter folder holds {WEIGHTS} and {CONFIG}.")
        return path
    raise ModelError(f"{folder / name} is a link out of its folder", "Copy the file itself into the folder.")
