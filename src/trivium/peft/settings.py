"""The registry of methods: each one's settings, the file that makes it, and the learning rate it wants.

    settings = settings_for("lora", {"r": 8, "target_modules": ["q_proj", "v_proj"]})

A preset is a method under the name by which the field knows it: ``dora`` is ``{name: lora, dora: true}``. This file
imports no torch, so that a recipe is checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from trivium.errors import RecipeError, listed, nearest
from trivium.peft import kinds
from trivium.peft.kinds import FullSettings, Settings


class Method(NamedTuple):
    """A registry line: the settings, the module whose ``build`` makes the deltas (None: nothing is hung), and how many
    times full fine-tuning's learning rate suits it: what starts near zero and is small learns at a higher one."""

    settings: type
    module: str | None
    rate: float = 10.0


METHODS: dict[str, Method] = {
    "full": Method(FullSettings, None, 1.0),
    "lora": Method(kinds.LoRASettings, "trivium.peft.lora"),
    "vera": Method(kinds.VeRASettings, "trivium.peft.vera", 100.0),
    "bottleneck": Method(kinds.BottleneckSettings, "trivium.peft.bottleneck"),
    "compacter": Method(kinds.CompacterSettings, "trivium.peft.compacter", 100.0),
    "ia3": Method(kinds.IA3Settings, "trivium.peft.ia3", 100.0),
    "prompt": Method(kinds.PromptSettings, "trivium.peft.prompt", 300.0),
    "prefix": Method(kinds.PrefixSettings, "trivium.peft.prefix", 300.0),
    "bitfit": Method(kinds.BitFitSettings, "trivium.peft.bitfit", 30.0),
    "layer_norms": Method(kinds.LayerNormSettings, "trivium.peft.layer_norms", 30.0),
    "top_layers": Method(kinds.TopLayersSettings, "trivium.peft.top_layers", 1.0),
}

# Variants under the names by which they are known.
PRESETS: dict[str, dict[str, Any]] = {
    "rslora": {"name": "lora", "rslora": True},
    "dora": {"name": "lora", "dora": True},
    "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    "olora": {"name": "lora", "init_lora_weights": "olora"},
    "loraplus": {"name": "lora", "loraplus_lr_ratio": 16.0},
    "qlora": {"name": "lora", "quantize": "nf4"},
    "houlsby": {"name": "bottleneck", "placement": "houlsby"},
    "pfeiffer": {"name": "bottleneck", "placement": "pfeiffer"},
    "parallel": {"name": "bottleneck", "placement": "parallel"},
    "scaled_parallel": {"name": "bottleneck", "placement": "parallel", "scale": 4.0},
}
# A start from parts of the weights themselves is no start near zero.
RATES = {"pissa": 2.0, "olora": 2.0}


def settings_for(name: str, values: Mapping[str, Any]) -> Settings:
    """The settings of method ``name`` with ``values`` filled in. Raises RecipeError for an unknown name or key."""
    if not isinstance(name, str) or name not in METHODS:
        raise unknown(name)
    known = [one.name for one in fields(METHODS[name].settings)]
    for key in values:
        if key not in known:
            remedy = f"settings of {name}: {listed(known)}" if known else f"leave {key} out: {name} has no settings"
            raise RecipeError(f"method {name} has no setting {key!r}{nearest(str(key), known)}", remedy)
    found: Settings = METHODS[name].settings(**values)
    return found


def unknown(name: object) -> RecipeError:
    """The error for a method that is not there."""
    every = (*METHODS, *PRESETS)
    return RecipeError(f"there is no method {name!r}{nearest(str(name), every)}", f"methods: {listed(every, 30)}")


def as_written(method: str | Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's ``method`` as a mapping, a preset's name replaced by what it stands for.

    Raises RecipeError for an unknown name, or a setting that contradicts the preset.
    """
    given = {"name": method} if isinstance(method, str) else dict(method)
    name = given.get("name")
    if not isinstance(name, str) or name not in PRESETS:
        return given
    preset = PRESETS[name]
    for key, value in preset.items():
        if key != "name" and given.get(key, value) != value:
            raise RecipeError(
                f"{key} is {given[key]!r}, and {name} means {key}: {value}",
                f"leave {key} out, or write name: {preset['name']}",
            )
    return {**preset, **{key: value for key, value in given.items() if key != "name"}}


def only_named(method: Mapping[str, Any]) -> bool:
    """Whether a recipe's ``method`` says no more than the name of a method or preset."""
    return set(method) == {"name"} or dict(method) in PRESETS.values()


def method_of_preset(name: str) -> dict[str, Any]:
    """What a recipe's ``method`` says for a method or preset of this name. Raises RecipeError."""
    if name not in METHODS and name not in PRESETS:
        raise unknown(name)
    return as_written(name)


def rate_of(method: Mapping[str, Any]) -> float:
    """How many times full fine-tuning's learning rate suits a recipe's ``method``.

    Where B has a rate of its own (LoRA+), the geometric mean of both is LoRA's.
    """
    rate = RATES.get(str(method.get("init_lora_weights")), METHODS[method["name"]].rate)
    ratio: float = method.get("loraplus_lr_ratio") or 1.0
    return rate / ratio**0.5


def settings_of(method: Mapping[str, Any] | None) -> Settings:
    """The settings of a recipe's ``method``, ``{"name": ..., ...}``; None is full. Raises RecipeError."""
    values = as_written(method or "full")
    return settings_for(values.pop("name", None), values)


def method_name(settings: Settings) -> str:
    """The registry name of a settings object."""
    return next(name for name, method in METHODS.items() if method.settings is type(settings))
