"""Which modules of a model a method is hung under: by name, by pattern, or all linear ones.

Patterns are a module's full name, its dotted suffix, or a glob of either. "all-linear" is every linear module in
the decoder layers, without the output head and without a mixture-of-experts router. Experts and routers that are
bare parameters (as in today's ``transformers``) are no modules; they stay frozen, and ``frozen_note`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trivium.errors import ModelError, RecipeError, listed, nearest
from trivium.peft.checks import ALL_LINEAR, TargetModules
from trivium.peft.hub import CHILD

LINEAR = (nn.Linear, Conv1D)  # one that holds its weight in 4 or 8 bit is an nn.Linear, too (model/quantized.py)
Value = TypeVar("Value")
ROUTERS = ("router", "gate", "shared_expert_gate")
ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn", "mixer")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")


def text_config(model: nn.Module) -> Any:
    """The config of the language model, inside a config of several parts or not."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def width(model: nn.Module) -> int:
    """The width of the residual stream."""
    return int(text_config(model).hidden_size)


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers by name: the outermost list of as many modules as the config says there are layers."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ModelError(
            f"found no list of {count} decoder layers in {type(model).__name__}",
            "name the modules in target_modules, or train in full",
        )
    name, layers = min(lists, key=lambda pair: pair[0].count("."))
    return {f"{name}.{index}": layer for index, layer in enumerate(layers)}


def block(name: str, layer: nn.Module, names: Iterable[str]) -> str:
    """The full name of a layer's attention or MLP: its first child that is called one of ``names``."""
    children = dict(layer.named_children())
    for child in names:
        if child in children:
            return f"{name}.{child}"
    raise ModelError(
        f"{name} has none of {listed(names)}; it has {listed(children)}", "name the modules in target_modules"
    )


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear module by name, the output head left out."""
    head = _head(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, LINEAR) and m is not head}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a linear module; Conv1D keeps its weight as ``[in, out]``."""
    if isinstance(module, Conv1D):
        n_in, n_out = module.get_parameter("weight").shape
        return n_in, n_out
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module as ``[out, in]``; of a quantised one, unpacked."""
    unpack = getattr(module, "unpacked", None)
    weight: Tensor = unpack() if unpack is not None else module.get_parameter("weight")
    return weight.t() if isinstance(module, Conv1D) else weight


def add_to_weight(module: nn.Module, update: Tensor) -> None:
    """Add ``update [out, in]`` to the weight, in float32, and round the sum to the weight's dtype."""
    weight = module.get_parameter("weight")
    with torch.no_grad():
        weight.copy_(weight.float() + (update.t() if isinstance(module, Conv1D) else update))


def value_for(names: Iterable[str], values: Mapping[str, Value] | None, setting: str) -> dict[str, Value]:
    """The value of each name that a pattern of ``values`` matches, the first that does.

    Raises RecipeError where one matches none.
    """
    names = list(names)
    found: dict[str, Value] = {}
    for pattern, value in (values or {}).items():
        fitting = [name for name in names if matches(name, pattern)]
        if not fitting:
            short = sorted({name.rpartition(".")[2] for name in names})
            hint = nearest(pattern.rpartition(".")[2], short)
            raise RecipeError(
                f"{setting} {pattern!r} matches none of the target_modules{hint}", f"these are: {listed(short, 24)}"
            )
        for name in fitting:
            found.setdefault(name, value)
    return found


def find_targets(model: nn.Module, patterns: TargetModules) -> list[str]:
    """The names of the linear modules that ``patterns`` select, in the model's order.

    Raises RecipeError for a pattern that matches nothing, or that reaches the output head.
    """
    candidates = linears(model)
    if patterns == ALL_LINEAR:
        inside = tuple(f"{name}." for name in decoder_layers(model))
        return [n for n in candidates if n.startswith(inside) and not _is_router(model, n)]
    head = _head(model)
    for name in [n for n, m in model.named_modules() if m is head and head is not None]:
        for pattern in patterns:
            if matches(name, pattern):
                raise RecipeError(
                    f"target_modules {pattern!r} reaches the output head {name}, which is never adapted",
                    f"write a narrower pattern, or '{ALL_LINEAR}' for every linear module in the layers",
                )
    return select(candidates, patterns)


def select(
    candidates: Mapping[str, object],
    patterns: Iterable[str],
    setting: str = "target_modules",
    kind: str = "module that can be adapted",
) -> list[str]:
    """The candidates that ``patterns`` match, in the model's order. Raises RecipeError where one matches none."""
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in candidates):
            names = {name.rpartition(".")[2] for name in candidates}
            hint = nearest(pattern.rpartition(".")[2], names)
            raise RecipeError(
                f"{setting} {pattern!r} matches no {kind}{hint}",
                f"there are: {listed(names, 24) or 'none'}",
            )
    return [name for name in candidates if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the name, a dotted suffix of it, or a glob of either."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase("." + name, "*." + pattern)


def bare_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The matrices in the layers that no linear module holds, by their full names: experts, routers, convolutions."""
    found: dict[str, Tensor] = {}
    for name, layer in decoder_layers(model).items():
        for owner, module in layer.named_modules():
            if CHILD in owner.split(".") or isinstance(module, (*LINEAR, nn.Embedding)):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    found[f"{name}.{owner}.{key}"] = parameter
    return found


def frozen_note(model: nn.Module) -> list[str]:
    """One line that names the matrices in the layers that "all-linear" does not reach."""
    layers = tuple(f"{name}." for name in decoder_layers(model))
    routers = [f"{n}.weight" for n in linears(model) if n.startswith(layers) and _is_router(model, n)]
    bare = [*bare_parameters(model), *routers]
    if not bare:
        return []
    numbered = "|".join(re.escape(name.rpartition(".")[0]) for name in decoder_layers(model))
    names = listed({re.sub(rf"^(?:{numbered})\.\d+\.", "", name) for name in bare})
    names = re.sub(r"\.\d+\.", ".*.", names)
    return [
        f"stays frozen under {ALL_LINEAR}, being an expert, a router or otherwise no linear module: {names} "
        "(target_parameters reaches experts)"
    ]


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _is_router(model: nn.Module, name: str) -> bool:
    """A linear beside (or above) experts that is called a router, or that gives one number per expert."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if own == "router" or parent_name.rpartition(".")[2] == "router":
        return True
    if not hasattr(parent, "experts"):
        return False
    config = text_config(model)
    counts = [getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    return own in ROUTERS or linear_shape(model.get_submodule(name))[1] in counts
