"""LoRA folders in the format of PEFT, which vLLM and llama.cpp read as well.

Tensors: ``base_model.model.<module>.lora_A.weight`` [r, in] and ``...lora_B.weight`` [out, r]. What a folder adapts
is read from its tensors; ``r``, ``lora_alpha``, ``use_rslora`` and the two patterns give the scale of each. A key of
the config that is set and not understood is refused: an adapter that half works is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trivium.errors import ModelError, UserError
from trivium.peft.base import CHILD, Attached, Delta, Plan, deltas, hang, load_state
from trivium.peft.lora import LoRA
from trivium.peft.settings import ALL_LINEAR, LoRASettings
from trivium.peft.targets import LINEAR, linear_shape

PREFIX = "base_model.model."
TENSOR = re.compile(r"base_model\.model\.(?P<target>.+)\.(?P<which>lora_[AB])\.weight")

READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
)
# What says nothing about the result: the tensors tell the modules, the modules tell their own orientation.
HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
)
# Ways to start that leave the base as it was; others (pissa, olora, loftq, ...) change the base's own weights.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def config(model: nn.Module, base: str, settings: LoRASettings) -> dict[str, Any]:
    """``adapter_config.json`` for the LoRAs of ``model``."""
    loras = _loras(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": _plain(settings.effective_alpha),
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _short_names(model, list(loras)),
        "rank_pattern": {name: one.r for name, one in loras.items() if one.r != settings.r},
        "alpha_pattern": {
            name: _plain(one.alpha) for name, one in loras.items() if one.alpha != settings.effective_alpha
        },
        "fan_in_fan_out": all(isinstance(model.get_submodule(name), Conv1D) for name in loras),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
    }


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights under PEFT's names."""
    return {
        f"{PREFIX}{target}.{name}.weight": weight.detach()
        for target, lora in _loras(model).items()
        for name, weight in lora.named_parameters()
    }


def attach_lora(model: nn.Module, config: dict[str, Any], small: dict[str, Tensor], folder: Path) -> Attached:
    """Hang the LoRAs of a PEFT folder in ``model``. Raises ModelError, naming the first thing that does not fit."""
    _check_supported(config, folder)
    settings = _settings(config, folder)
    shapes = _shapes(small, folder)
    ranks = _per_target(config, "rank_pattern", shapes, folder)
    alphas = _per_target(config, "alpha_pattern", shapes, folder)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
    wants = f"It was trained on {config.get('base_model_name_or_path') or 'a base that it does not name'}."
    for target in shapes:
        if target not in linear:
            raise ModelError(f"{folder} adapts {target}, which this model does not have", wants)
    made: dict[str, Delta] = {}
    for target in [name for name in linear if name in shapes]:
        r = int(ranks.get(target, settings.r))
        n_in, n_out = linear_shape(linear[target])
        for which, fits in (("lora_A", (r, n_in)), ("lora_B", (n_out, r))):
            if (got := shapes[target].get(which)) != fits:
                has = "is missing" if got is None else f"is {list(got)}"
                raise ModelError(f"{folder}: {which} of {target} {has}, this model takes {list(fits)}", wants)
        alpha = alphas.get(target, settings.effective_alpha)
        made[target] = LoRA(linear[target], r, alpha, settings.dropout, settings.rslora)
    attached = hang(model, settings, Plan(made))
    load_state(model, {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in small.items()})
    return attached


def _check_supported(config: dict[str, Any], folder: Path) -> None:
    """Refuse a config that says anything not understood here."""
    remedy = "Merge the adapter into its base with PEFT and use the merged model."
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} has peft_type {config.get('peft_type')!r}; only LORA is read", remedy)
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder} has bias {config['bias']!r}, which is not supported", remedy)
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ModelError(f"{folder} has init_lora_weights {start!r}, which changes the base itself", remedy)
    for key, value in config.items():
        if value and key not in (*READ, *HARMLESS):
            raise ModelError(f"{folder} uses {key} ({str(value)[:60]}), which is not supported", remedy)


def _settings(config: dict[str, Any], folder: Path) -> LoRASettings:
    try:
        r = config.get("r", 8)  # PEFT's own defaults, for keys that an old folder leaves out
        return LoRASettings(
            r=r,
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=_names(config.get("target_modules")),
            rslora=config.get("use_rslora", False),
        )
    except UserError as error:
        raise ModelError(f"{folder / 'adapter_config.json'}: {error.what}", error.remedy) from None


def _names(value: Any) -> Any:
    # A string here is PEFT's regular expression; the tensors say which modules it chose, so it is never run.
    return value if isinstance(value, list) and value else ALL_LINEAR


def _shapes(small: dict[str, Tensor], folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """``{module: {"lora_A": shape, "lora_B": shape}}``."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in small.items():
        match = TENSOR.fullmatch(name)
        if match is None or not tensor.is_floating_point():
            raise ModelError(
                f"{folder} holds {name}, which is no weight of a LoRA on a linear module",
                "Merge the adapter into its base with PEFT and use the merged model.",
            )
        found.setdefault(match["target"], {})[match["which"]] = tuple(tensor.shape)
    if not found:
        raise ModelError(f"{folder} holds no weights", "Fetch the adapter again.")
    return found


def _per_target(config: dict[str, Any], key: str, names: Iterable[str], folder: Path) -> dict[str, float]:
    """``rank_pattern`` or ``alpha_pattern`` by full module name.

    PEFT takes the keys for regular expressions; here they are names or dotted suffixes, which is what is written in
    practice, and one that fits no module is refused: nothing of an untrusted file is run, not even a pattern.
    """
    patterns = config.get(key) or {}
    found: dict[str, float] = {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else [(patterns, None)]:
        plain = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".")
        fitting = [name for name in names if name == plain or name.endswith("." + plain)]
        if not fitting or isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ModelError(
                f"{folder} has {key} {str(pattern)[:60]!r}: {value!r}, which fits no module here",
                "Write the full names of modules there, each with a number.",
            )
        for name in fitting:
            found.setdefault(name, value)  # the first that fits counts, as in PEFT
    return found


def _loras(model: nn.Module) -> dict[str, LoRA]:
    found = {name: delta for name, delta in deltas(model).items() if isinstance(delta, LoRA)}
    assert len(found) == len(deltas(model)) > 0, "the model's deltas are not all LoRAs"
    return found


def _short_names(model: nn.Module, chosen: list[str]) -> list[str]:
    """Suffixes such as ``q_proj`` where they select exactly the chosen modules in this model, else the full names."""
    suffixes = {name.rpartition(".")[2] for name in chosen}
    selected = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in suffixes and CHILD not in n.split(".")]
    return sorted(suffixes) if set(selected) == set(chosen) else sorted(chosen)


def _plain(number: float) -> float:
    """16 rather than 16.0, which PEFT's readers in other languages take for the wrong type."""
    return int(number) if float(number).is_integer() else number
