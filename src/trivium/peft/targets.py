"""Which modules of a model a method is hung under: by name, by pattern, or all linear ones.

Patterns are a module's full name, its dotted suffix, or a glob of either. "all-linear" is every linear module in
the decoder layers, without the output head and without a mixture-of-experts router. Experts and routers that are
bare parameters (as in today's ``transformers``) are no modules; they stay frozen, and ``frozen_note`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trivium.errors import ModelError, RecipeError, listed, nearest
from trivium.peft.settings import ALL_LINEAR, TargetModules

LINEAR = (nn.Linear, Conv1D)
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
            "Name the modules in target_modules, or train in full.",
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
        f"{name} has none of {listed(names)}; it has {listed(children)}", "Name the modules in target_modules."
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
                    f"Write a narrower pattern, or '{ALL_LINEAR}' for every linear module in the layers.",
                )
    return select(candidates, patterns)


def select(candidates: Mapping[str, nn.Module], patterns: Iterable[str]) -> list[str]:
    """The candidates that ``patterns`` match, in the model's order. Raises RecipeError where one matches none."""
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in candidates):
            names = {name.rpartition(".")[2] for name in candidates}
            hint = nearest(pattern.rpartition(".")[2], names)
            raise RecipeError(
                f"target_modules {pattern!r} matches no module that can be adapted{hint}",
                f"Modules there are: {listed(names, 24)}.",
            )
    return [name for name in candidates if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the name, a dotted suffix of it, or a glob of either."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase("." + name, "*." + pattern)


def frozen_note(model: nn.Module) -> list[str]:
    """One line that names the matrices in the layers that no linear module holds: experts, routers, convolutions."""
    bare: dict[str, None] = {}
    for name, layer in decoder_layers(model).items():
        for owner, module in layer.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not isinstance(module, (*LINEAR, nn.Embedding)):
                    bare[f"{owner}.{key}"] = None
            if isinstance(module, LINEAR) and _is_router(model, f"{name}.{owner}"):
                bare[f"{owner}.weight"] = None
    if not bare:
        return []
    names = listed({re.sub(r"\.\d+\.", ".*.", name) for name in bare})
    return [f"stays frozen under {ALL_LINEAR}, being an expert, a router or otherwise no linear module: {names}"]


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
