"""What a recipe can say about a method: plain frozen dataclasses, one sentence per field, and the registry.

    settings = settings_for("lora", {"r": 8, "target_modules": ["q_proj", "v_proj"]})

This file imports no torch, so that a recipe is checked in milliseconds. Every mistake is a RecipeError that
names the setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from trivium.errors import RecipeError, listed, nearest

ALL_LINEAR = "all-linear"
NON_LINEARITIES = ("gelu", "relu", "silu")
PLACEMENTS = ("houlsby", "pfeiffer")

TargetModules = str | tuple[str, ...]


@dataclass(frozen=True)
class FullSettings:
    """Every weight is trained, in float32; nothing is hung anywhere."""


@dataclass(frozen=True)
class LoRASettings:
    """LoRA: a low-rank update of chosen weight matrices (Hu et al. 2021)."""

    r: int = field(default=16, metadata={"help": "Rank of the update; r * (in + out) weights per module."})
    alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / r; left out, alpha is 2 * r."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update, in training only."})
    target_modules: TargetModules = field(
        default=ALL_LINEAR,
        metadata={"help": "'all-linear' (in the decoder layers), or names, dotted suffixes or globs of modules."},
    )
    rslora: bool = field(
        default=False, metadata={"help": "Scale by alpha / sqrt(r) instead (Kalajdzievski 2023), for large r."}
    )

    def __post_init__(self) -> None:
        _size("r", self.r)
        _fraction("dropout", self.dropout)
        if self.alpha is not None and (not _is_number(self.alpha) or not 0 < self.alpha < float("inf")):
            raise RecipeError(f"alpha is {self.alpha!r}", "alpha is a number above 0; leave it out for 2 * r.")
        if not isinstance(self.rslora, bool):
            raise RecipeError(f"rslora is {self.rslora!r}", "rslora is true or false.")
        object.__setattr__(self, "target_modules", _patterns(self.target_modules))

    @property
    def effective_alpha(self) -> float:
        return 2 * self.r if self.alpha is None else self.alpha


@dataclass(frozen=True)
class BottleneckSettings:
    """Bottleneck adapters: a narrow two-layer network on the output of chosen blocks (Houlsby et al. 2019)."""

    r: int = field(default=64, metadata={"help": "Width of the bottleneck; 2*d*r + r + d weights per adapter."})
    placement: str = field(
        default="houlsby", metadata={"help": "'houlsby': after attention and after the MLP; 'pfeiffer': after the MLP."}
    )
    non_linearity: str = field(default="gelu", metadata={"help": "Between down and up: gelu, relu or silu."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout inside the bottleneck, in training only."})
    target_modules: TargetModules | None = field(
        default=None, metadata={"help": "Names, dotted suffixes or globs of modules, instead of a placement."}
    )
    layer_norms: bool = field(
        default=False,
        metadata={"help": "Also train a gain (and shift) on the norms of the adapted layers, as Houlsby."},
    )

    def __post_init__(self) -> None:
        _size("r", self.r)
        _fraction("dropout", self.dropout)
        _one_of("placement", self.placement, PLACEMENTS)
        _one_of("non_linearity", self.non_linearity, NON_LINEARITIES)
        if not isinstance(self.layer_norms, bool):
            raise RecipeError(f"layer_norms is {self.layer_norms!r}", "layer_norms is true or false.")
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", _patterns(self.target_modules))


Settings = FullSettings | LoRASettings | BottleneckSettings


class Method(NamedTuple):
    """A registry line: the settings, and the module whose ``build`` makes the deltas (None: nothing is hung)."""

    settings: type
    module: str | None


METHODS: dict[str, Method] = {
    "full": Method(FullSettings, None),
    "lora": Method(LoRASettings, "trivium.peft.lora"),
    "bottleneck": Method(BottleneckSettings, "trivium.peft.bottleneck"),
}


def settings_for(name: str, values: Mapping[str, Any]) -> Settings:
    """The settings of method ``name`` with ``values`` filled in. Raises RecipeError for an unknown name or key."""
    if not isinstance(name, str) or name not in METHODS:
        known = listed(METHODS)
        raise RecipeError(f"there is no method {name!r}{nearest(str(name), METHODS)}", f"Methods: {known}.")
    names = [one.name for one in fields(METHODS[name].settings)]
    for key in values:
        if key not in names:
            remedy = f"Settings of {name}: {listed(names)}." if names else f"{name} has no settings."
            raise RecipeError(f"method {name} has no setting {key!r}{nearest(str(key), names)}", remedy)
    return METHODS[name].settings(**values)


def settings_of(method: Mapping[str, Any] | None) -> Settings:
    """The settings of a recipe's ``method``, ``{"name": ..., ...}``; None is full. Raises RecipeError."""
    values = dict(method or {"name": "full"})
    return settings_for(values.pop("name"), values)


def method_name(settings: Settings) -> str:
    """The registry name of a settings object."""
    return next(name for name, method in METHODS.items() if method.settings is type(settings))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _size(name: str, value: object) -> None:
    # The upper end is far above any width: a folder's config may claim anything, and sizes must stay countable.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000:
        raise RecipeError(f"{name} is {value!r}", f"{name} is a whole number from 1 on, such as 16.")


def _fraction(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise RecipeError(f"{name} is {value!r}", f"{name} is a number from 0 up to, not including, 1.")


def _one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in (allowed := tuple(allowed)):
        raise RecipeError(f"{name} is {value!r}{nearest(str(value), allowed)}", f"{name} is one of {listed(allowed)}.")


def _patterns(value: object) -> TargetModules:
    """``"all-linear"`` as it is; one name or a list of names as a tuple."""
    if value == ALL_LINEAR:
        return ALL_LINEAR
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
        raise RecipeError(
            f"target_modules is {value!r}", "Write 'all-linear' or a list of module names, such as [q_proj, v_proj]."
        )
    return tuple(names)
