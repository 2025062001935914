"""LoRA and its family in PEFT's format (see `peft_format.py`).

    base_model.model.<module>.lora_A.weight  [r, in]     ...lora_B.weight  [out, r]     ...lora_magnitude_vector  [out]
    base_model.model.<module>.weight                       a module trained in full (``modules_to_save``)
    base_model.model.<experts>.lora_A.weight               of a bare parameter; that of the one before it in its module
                                                           lies under ``.base_layer``, and so on inwards

``r``, ``lora_alpha``, ``use_rslora`` and the two patterns give the scale of each. A start from the weight itself is
written as the plain LoRA of rank 2r that it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from trivium.errors import ModelError
from trivium.peft.checks import is_number
from trivium.peft.copies import Copies, tied_copies
from trivium.peft.delta import Delta, Plan
from trivium.peft.dora import DoRA
from trivium.peft.experts import ExpertLoRA
from trivium.peft.kinds import LoRASettings
from trivium.peft.lora import LoRA, loras
from trivium.peft.lora_starts import Started, plain_alpha
from trivium.peft.peft_format import (
    MERGE,
    PREFIX,
    Format,
    Read,
    Source,
    by_target,
    conv1d,
    linear_targets,
    short_names,
)  # fmt: skip
from trivium.peft.targets import bare_parameters

KNOWN = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "use_dora", "modules_to_save", "target_parameters", "ensure_weight_tying",
)  # fmt: skip
# Ways to start that leave the base as it was; others (pissa, olora, loftq, ...) change the base's own weights.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
INNER = "base_layer."


def config(model: nn.Module, settings: LoRASettings, hung: dict[str, Delta]) -> dict[str, Any]:
    """``adapter_config.json`` for LoRAs, their experts and the modules beside them."""
    plain = {name: _plain(one, settings) for name, one in hung.items() if isinstance(one, LoRA)}
    own = (settings.r, settings.effective_alpha)
    double = settings.init_lora_weights != "default"
    r, alpha = (2 * own[0], plain_alpha(own[1], settings.rslora)) if double else own
    whole = [name for name, one in hung.items() if isinstance(one, Copies)]
    tied = len({id(hung[name].held) for name in whole}) < len(whole)
    experts = [f"{name}.{key}" for name, one in hung.items() if isinstance(one, ExpertLoRA) for key in one.keys]
    return {
        "r": r,
        "lora_alpha": _short(alpha),
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": short_names(model, plain),
        "rank_pattern": {name: rank for name, (rank, _) in plain.items() if rank != r},
        "alpha_pattern": {name: _short(a) for name, (_, a) in plain.items() if a != alpha},
        "fan_in_fan_out": bool(plain) and conv1d(model, plain),
        "bias": "none",
        "modules_to_save": whole or None,
        **({"ensure_weight_tying": True} if tied else {}),
        "target_parameters": experts or None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": settings.dora,
    }


def _plain(lora: LoRA, settings: LoRASettings) -> tuple[int, float]:
    """(rank, alpha) of the plain LoRA that it is."""
    if isinstance(lora, Started):
        return 2 * lora.r, plain_alpha(lora.alpha, settings.rslora)
    return lora.r, lora.alpha


def tensors(hung: dict[str, Delta]) -> dict[str, Tensor]:
    """The weights under PEFT's names."""
    found: dict[str, Tensor] = {}
    for target, delta in hung.items():
        path = f"{PREFIX}{target}."
        if isinstance(delta, Copies):
            found |= {f"{path}{key}": delta.held.get_parameter(key) for key in delta.keys}
        elif isinstance(delta, ExpertLoRA):
            for key, inwards in zip(delta.keys, _inwards(len(delta.keys)), strict=True):
                one = delta.factors(key)
                found |= {f"{path}{inwards}lora_A.weight": one.lora_A, f"{path}{inwards}lora_B.weight": one.lora_B}
        elif isinstance(delta, LoRA):
            a, b = delta.as_plain() if isinstance(delta, Started) else (delta.lora_A, delta.lora_B)
            found |= {f"{path}lora_A.weight": a, f"{path}lora_B.weight": b}
            if isinstance(delta, DoRA):
                found[f"{path}lora_magnitude_vector"] = delta.lora_magnitude_vector
    return found


def _inwards(count: int) -> list[str]:
    """Where PEFT puts the weights of a module's parameters, in their order: the first one innermost."""
    return [INNER * n for n in reversed(range(count))]


def read(model: nn.Module, source: Source) -> Read:
    """What a LoRA folder asks for. Raises ModelError, naming the first thing that does not fit."""
    _check_supported(source)
    parts = _parts(model, source)
    settings = _settings(source, parts)
    linear = linear_targets(model, source, parts["lora"])
    with torch.device("meta"):
        made = loras(model, settings, list(linear))
        if parts["experts"]:
            made |= _expert_plan(model, source, parts["experts"], settings)
        if parts["whole"]:
            made |= tied_copies(model, parts["whole"], tie=_tied(model, parts["whole"]))
    weights: dict[str, Tensor] = {}
    for target, delta in made.items():
        if isinstance(delta, Copies):
            shown = parts["whole"].get(target, {})
            weights |= {f"{target}.held.{key}": t for key, t in shown.items() if _first_of(made, target, delta)}
        elif isinstance(delta, ExpertLoRA):
            for key, found in zip(delta.keys, parts["experts"][target], strict=True):
                weights |= {f"{target}.{key}.{which}": tensor for which, tensor in found.items()}
        elif isinstance(delta, LoRA):
            weights |= {f"{target}.{key}": t for key, t in _ours(delta, target, parts["lora"][target], source).items()}
    return Read(settings, Plan(made), weights)


def _ours(lora: LoRA, target: str, found: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """The tensors of one module as its delta holds them. Raises ModelError for another shape."""
    twice = 2 if isinstance(lora, Started) else 1
    fits = {"lora_A": (twice * lora.r, lora.lora_A.shape[1]), "lora_B": (lora.lora_B.shape[0], twice * lora.r)}
    if isinstance(lora, DoRA):
        fits["lora_magnitude_vector"] = (len(lora.lora_B),)  # type: ignore[assignment]
    for which, shape in fits.items():
        got = tuple(found[which].shape) if which in found else None
        if got != shape:
            has = "is missing" if got is None else f"is {list(got)}"
            what = f"{source.folder}: {which} of {target} {has}, this model takes {list(shape)}"
            raise ModelError(what, source.wants)
    if not isinstance(lora, Started):
        return found
    (a, start_a), (b, start_b) = found["lora_A"].split(lora.r), found["lora_B"].split(lora.r, 1)
    return {"lora_A": a, "start_A": start_a, "lora_B": b, "start_B": -start_b}


def _first_of(made: dict[str, Delta], target: str, copies: Copies) -> bool:
    """Whether the weights that several share are named after this target."""
    return target == next(name for name, one in made.items() if isinstance(one, Copies) and one.held is copies.held)


def _check_supported(source: Source) -> None:
    config, folder = source.config, source.folder
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder} has bias {config['bias']!r}, which is not supported", MERGE)
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ModelError(f"{folder} has init_lora_weights {start!r}, which changes the base itself", MERGE)
    source.check_keys(KNOWN)


def _parts(model: nn.Module, source: Source) -> dict[str, Any]:
    """The tensors by what they belong to: ``lora`` and ``whole`` by module, ``experts`` a list for each module."""
    whole: dict[str, dict[str, Tensor]] = {}
    rest = dict(source.small)
    modules = dict(model.named_modules())
    listed = source.config.get("modules_to_save") or ()
    for name in list(rest):
        target, _, key = name.removeprefix(PREFIX).rpartition(".")
        if listed and "lora_" not in name and target in modules and hasattr(modules[target], key):
            whole.setdefault(target, {})[key] = rest.pop(name)
    endings = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "lora_magnitude_vector"}
    if not source.config.get("use_dora"):
        del endings["lora_magnitude_vector"]
    found = by_target(Source(source.folder, source.config, rest, source.ours), endings)
    experts: dict[str, list[dict[str, Tensor]]] = {}
    if source.config.get("target_parameters"):
        owners = {name.rpartition(".")[0] for name in bare_parameters(model)}
        depth = Counter({name: name.count(".base_layer") for name in found})
        for name in sorted(found, key=lambda name: -depth[name]):
            if (owner := name.replace(".base_layer", "")) in owners:
                experts.setdefault(owner, []).append(found.pop(name))
    for key, names, there in (
        ("modules_to_save", listed, list(whole)),
        ("target_parameters", source.config.get("target_parameters") or (), list(experts)),
    ):
        for name in names if isinstance(names, list) else [names] if names else []:
            if key == "modules_to_save" and name == "classifier" and "score" in whole:
                continue  # PEFT names both for a reward model, which has one
            module = str(name).rpartition(".")[0] if key == "target_parameters" else str(name)
            if not any(f".{path}".endswith(f".{module}") for path in there):
                raise ModelError(
                    f"{source.folder} has {key} {str(name)[:60]!r} and holds no weights of it",
                    "fetch the adapter again",
                )
    return {"lora": found, "whole": whole, "experts": experts}


def _settings(source: Source, parts: dict[str, Any]) -> LoRASettings:
    config, ours = source.config, source.ours
    start = ours.get("init_lora_weights")
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)  # PEFT's own defaults, for keys an old folder leaves out
    ranks = _per_target(source, "rank_pattern", parts["lora"])
    alphas = _per_target(source, "alpha_pattern", parts["lora"])
    if start and is_number(r) and is_number(alpha):  # written as a plain LoRA of twice the rank
        rslora = bool(config.get("use_rslora"))
        r, alpha = (r // 2 if isinstance(r, int) else r), alpha / plain_alpha(1, rslora)
        ranks = {name: value // 2 for name, value in ranks.items()}
        alphas = {name: value / plain_alpha(1, rslora) for name, value in alphas.items()}
    named = list(parts["lora"])
    found: LoRASettings = source.built(
        LoRASettings, r=r, alpha=_short(alpha) if isinstance(alpha, float) else alpha,
        dropout=config.get("lora_dropout"), target_modules=named or None, rslora=config.get("use_rslora"),
        rank_pattern=ranks or None, alpha_pattern=alphas or None, dora=config.get("use_dora"),
        init_lora_weights=start, loraplus_lr_ratio=ours.get("loraplus_lr_ratio"),
        target_parameters=config.get("target_parameters"),
        modules_to_save=list(parts["whole"]) or None,
    )  # fmt: skip
    return found


def _per_target(source: Source, key: str, names: dict[str, Any]) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern`` by full module name.

    PEFT takes the keys for regular expressions; here they are names or dotted suffixes, which is what is written in
    practice, and one that fits no module is refused: nothing of an untrusted file is run, not even a pattern.
    """
    patterns = source.config.get(key) or {}
    found: dict[str, Any] = {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else [(patterns, None)]:
        plain = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".")
        fitting = [name for name in names if name == plain or name.endswith("." + plain)]
        if not fitting or isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ModelError(
                f"{source.folder} has {key} {str(pattern)[:60]!r}: {value!r}, which fits no module here",
                "write the full names of modules there, each with a number",
            )
        for name in fitting:
            found.setdefault(name, value)  # the first that fits counts, as in PEFT
    return found


def _expert_plan(
    model: nn.Module, source: Source, experts: dict[str, list[dict[str, Tensor]]], settings: LoRASettings
) -> dict[str, Delta]:
    """The deltas of bare parameters. Raises ModelError where their shapes are others."""
    made: dict[str, Delta] = {}
    chosen = source.config["target_parameters"]
    for owner, found in experts.items():
        module = model.get_submodule(owner)
        own = [key for key, p in module.named_parameters(recurse=False) if p.ndim >= 2]
        keys = [key for key in own if any(f"{owner}.{key}".endswith(name) for name in chosen)]
        made[owner] = delta = ExpertLoRA(module, keys, settings)
        wanted = [tuple(delta.factors(key).lora_A.shape) for key in keys]
        got = [tuple(one["lora_A"].shape) if "lora_A" in one else () for one in found]
        if wanted != got:
            raise ModelError(f"{source.folder}: LoRAs of {owner} are {got}, this model takes {wanted}", source.wants)
    return made


def _tied(model: nn.Module, whole: dict[str, dict[str, Tensor]]) -> bool:
    """Whether what the base ties is there on both sides, and the same."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            groups.setdefault(id(weight), []).append(name)
    for group in groups.values():
        there = [whole[name]["weight"] for name in group if name in whole]
        if len(group) > 1 and there and not (len(there) == len(group) and all(t.equal(there[0]) for t in there)):
            return False
    return True


def _short(number: float) -> float:
    """16 rather than 16.0, which PEFT's readers in other languages take for the wrong type."""
    return int(number) if float(number).is_integer() else number


LORA = Format(config, tensors, read)
