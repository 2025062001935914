"""Adapter folders in the format of PEFT, which vLLM and llama.cpp read as well; LoRA has a file of its own.

One `Format` for each ``peft_type``: how a config and tensors are written, and how they are read again. What a folder
adapts is read from its tensors. A key of the config that is set and not understood is refused: an adapter that half
works is worse than none; nothing of a folder is ever run, not even a pattern.

Shapes:  P virtual tokens,  L layers,  G key/value heads,  H head width,  D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trivium.errors import ModelError, UserError
from trivium.peft import kinds, targets
from trivium.peft.base import deltas, plan_for
from trivium.peft.delta import Delta, Plan
from trivium.peft.hub import CHILD
from trivium.peft.ia3 import IA3
from trivium.peft.prefix import Prefix
from trivium.peft.vera import Projection, VeRA

PREFIX = "base_model.model."
MERGE = "merge the adapter into its base with PEFT and use the merged model"

# What says nothing about the result: the tensors tell the modules, the modules tell their own orientation.
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_weights",
    "layers_pattern", "layers_to_transform", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "target_modules", "task_type",
)  # fmt: skip


class Read(NamedTuple):
    """What a folder asks for: settings, the deltas, and their weights under our names."""

    settings: kinds.Settings
    plan: Plan
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A folder as it was found. ``ours`` is what PEFT's config has no key for, where we have written it."""

    folder: Path
    config: dict[str, Any]
    small: dict[str, Tensor]
    ours: dict[str, Any]

    @property
    def wants(self) -> str:
        base = self.config.get("base_model_name_or_path") or "it names none"
        return f"use it on the base that it was trained on: {base}"

    def built(self, make: Callable[..., Any], **values: Any) -> Any:
        """Settings made of what the config says. Raises ModelError that names the file."""
        try:
            quantize = {"quantize": self.ours["quantize"]} if self.ours.get("quantize") else {}
            return make(**{k: v for k, v in values.items() if v is not None}, **quantize)
        except UserError as error:
            raise ModelError(f"{self.folder / 'adapter_config.json'}: {error.what}", error.remedy) from None

    def check_keys(self, known: Iterable[str]) -> None:
        """Refuse a config that says anything not understood here."""
        for key, value in self.config.items():
            if value and key not in (*known, *HARMLESS) and (key, value) != ("bias", "none"):
                raise ModelError(f"{self.folder} uses {key} ({str(value)[:60]}), which is not supported", MERGE)

    def planned(self, model: nn.Module, settings: kinds.Settings) -> Plan:
        """The deltas of the settings. Raises ModelError where they do not fit the model."""
        try:
            plan = plan_for(model, settings)
        except UserError as error:
            raise ModelError(f"{self.folder} does not fit this model: {error.what}", self.wants) from None
        assert plan is not None
        return plan


class Format(NamedTuple):
    """How one ``peft_type`` is written and read."""

    config: Callable[[nn.Module, Any, dict[str, Delta]], dict[str, Any]]
    tensors: Callable[[dict[str, Delta]], dict[str, Tensor]]
    read: Callable[[nn.Module, Source], Read]


def common(peft_type: str, base: str) -> dict[str, Any]:
    """What every config begins with."""
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
    }


def short_names(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """Suffixes such as ``q_proj`` where they select exactly the chosen modules in this model, else the full names."""
    chosen = list(chosen)
    suffixes = {name.rpartition(".")[2] for name in chosen}
    selected = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in suffixes and CHILD not in n.split(".")]
    return sorted(suffixes) if set(selected) == set(chosen) else sorted(chosen)


def conv1d(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether all of these keep their weights as ``[in, out]``, as GPT-2 does."""
    return all(isinstance(model.get_submodule(name), Conv1D) for name in names)


def by_target(source: Source, endings: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """``{module: {our name: tensor}}``; ``endings`` are theirs to ours. Raises ModelError for other tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.small.items():
        ending = next((end for end in endings if name.endswith("." + end)), None)
        if not name.startswith(PREFIX) or ending is None or not tensor.is_floating_point():
            raise ModelError(f"{source.folder} holds {name}, which does not belong there", MERGE)
        target = name.removeprefix(PREFIX).removesuffix("." + ending)
        found.setdefault(target, {})[endings[ending]] = tensor
    if not found:
        raise ModelError(f"{source.folder} holds no weights", "fetch the adapter again")
    return found


def linear_targets(model: nn.Module, source: Source, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear modules of these names, in the model's order. Raises ModelError where one is not there."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, targets.LINEAR)}
    names = set(names)
    for target in sorted(names - linear.keys()):
        raise ModelError(f"{source.folder} adapts {target}, which this model does not have", source.wants)
    return {name: module for name, module in linear.items() if name in names}


# --- VeRA


def _vera_config(model: nn.Module, settings: kinds.VeRASettings, hung: dict[str, Delta]) -> dict[str, Any]:
    return {
        "r": settings.r, "vera_dropout": settings.dropout, "d_initial": settings.d_initial, "save_projection": True,
        "projection_prng_key": settings.projection_seed, "bias": "none", "init_weights": True,
        "target_modules": short_names(model, hung), "fan_in_fan_out": conv1d(model, hung),
    }  # fmt: skip


def _vera_tensors(hung: dict[str, Delta]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for target, delta in hung.items():
        assert isinstance(delta, VeRA)
        for key in ("vera_lambda_b", "vera_lambda_d"):
            found[f"{PREFIX}{target}.{key}"] = getattr(delta, key)
        found |= {"base_model.vera_A": delta.projection.vera_A, "base_model.vera_B": delta.projection.vera_B}
    return found


def _read_vera(model: nn.Module, source: Source) -> Read:
    source.check_keys(("r", "vera_dropout", "d_initial", "save_projection", "projection_prng_key"))
    small = dict(source.small)
    pair = [small.pop(f"base_model.vera_{which}", None) for which in "AB"]
    if pair[0] is None or pair[1] is None or pair[0].ndim != 2 or pair[1].ndim != 2:
        raise ModelError(
            f"{source.folder} holds no vera_A and vera_B", "save it again in PEFT with save_projection=True"
        )
    config = source.config
    endings = {key: key for key in ("vera_lambda_b", "vera_lambda_d")}
    found = by_target(Source(source.folder, config, small, source.ours), endings)
    linear = linear_targets(model, source, found)
    settings = source.built(
        kinds.VeRASettings, r=config.get("r"), dropout=config.get("vera_dropout"), d_initial=config.get("d_initial"),
        target_modules=list(linear), projection_seed=config.get("projection_prng_key"),
    )  # fmt: skip
    with torch.device("meta"):
        projection = Projection(len(pair[0]), pair[0].shape[-1], len(pair[1]), settings.projection_seed)
        plan = Plan({name: VeRA(module, projection, settings) for name, module in linear.items()})
    weights = {f"{target}.{key}": tensor for target, one in found.items() for key, tensor in one.items()}
    first = next(iter(linear))
    weights |= {f"{first}.projection.vera_A": pair[0], f"{first}.projection.vera_B": pair[1]}
    return Read(settings, plan, weights)


# --- (IA)³


def _ia3_config(model: nn.Module, settings: kinds.IA3Settings, hung: dict[str, Delta]) -> dict[str, Any]:
    chosen = [name for name, delta in hung.items() if getattr(delta, "feedforward", False)]
    names = [*short_names(model, hung)]
    down = short_names(model, chosen)
    if not set(down) <= set(names):  # PEFT wants the one list within the other
        names, down = sorted(hung), sorted(chosen)
    return {
        "target_modules": names, "feedforward_modules": down, "fan_in_fan_out": conv1d(model, hung),
        "init_ia3_weights": True, "modules_to_save": None,
    }  # fmt: skip


def _ia3_tensors(hung: dict[str, Delta]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for target, delta in hung.items():
        assert isinstance(delta, IA3)
        found[f"{PREFIX}{target}.ia3_l"] = delta.ia3_l[None] if delta.feedforward else delta.ia3_l[:, None]
    return found


def _read_ia3(model: nn.Module, source: Source) -> Read:
    source.check_keys(("feedforward_modules", "init_ia3_weights"))
    found = by_target(source, {"ia3_l": "ia3_l"})
    linear = linear_targets(model, source, found)
    if wrong := [name for name, one in found.items() if one["ia3_l"].ndim != 2]:
        raise ModelError(f"{source.folder}: the scale of {wrong[0]} is no matrix", "fetch the adapter again")
    # A matrix of one row scales the input, of one column the output.
    down = [name for name in linear if len(found[name]["ia3_l"]) == 1]
    settings = source.built(kinds.IA3Settings, target_modules=list(linear), feedforward_modules=down or None)
    with torch.device("meta"):
        plan = Plan({name: IA3(module, name in down) for name, module in linear.items()})
    return Read(settings, plan, {f"{name}.ia3_l": one["ia3_l"].flatten() for name, one in found.items()})


# --- virtual tokens


def _tokens_config(model: nn.Module, settings: kinds.PromptSettings, hung: dict[str, Delta]) -> dict[str, Any]:
    config = targets.text_config(model)
    first = next(iter(hung.values()))
    heads, width = (first.keys.shape[0], first.keys.shape[2]) if isinstance(first, Prefix) else (0, 0)
    return {
        "num_virtual_tokens": settings.num_virtual_tokens, "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers, "num_attention_heads": heads or config.num_attention_heads,
        "token_dim": heads * width or targets.width(model), "modules_to_save": None,
        **({"prefix_projection": False} if heads else {"prompt_tuning_init": "RANDOM"}),
    }  # fmt: skip


def _prompt_tensors(hung: dict[str, Delta]) -> dict[str, Tensor]:
    (delta,) = hung.values()
    return {"prompt_embeddings": delta.get_parameter("embeddings")}


def _prefix_tensors(hung: dict[str, Delta]) -> dict[str, Tensor]:
    layers = [delta for delta in hung.values() if isinstance(delta, Prefix)]
    parts = torch.stack([part for delta in layers for part in (delta.keys, delta.values)])  # [2 L, G, P, H]
    return {"prompt_embeddings": parts.permute(2, 0, 1, 3).flatten(1)}


TOKENS = (
    "num_virtual_tokens", "num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_hidden_size",
)  # fmt: skip


def _the_embeddings(source: Source) -> Tensor:
    if set(source.small) != {"prompt_embeddings"} or source.small["prompt_embeddings"].ndim != 2:
        raise ModelError(f"{source.folder} holds no prompt_embeddings alone", "fetch the adapter again")
    return source.small["prompt_embeddings"]


def _read_prompt(model: nn.Module, source: Source) -> Read:
    source.check_keys(TOKENS)
    found = _the_embeddings(source)
    settings = source.built(kinds.PromptSettings, num_virtual_tokens=len(found))
    plan = source.planned(model, settings)
    return Read(settings, plan, {f"{next(iter(plan.deltas))}.embeddings": found})


def _read_prefix(model: nn.Module, source: Source) -> Read:
    source.check_keys(TOKENS)
    found = _the_embeddings(source)
    settings = source.built(kinds.PrefixSettings, num_virtual_tokens=len(found))
    plan = source.planned(model, settings)
    heads, _, width = next(iter(plan.deltas.values())).get_parameter("keys").shape
    count = 2 * len(plan.deltas)
    if found.shape[1] != count * heads * width:
        raise ModelError(
            f"{source.folder}: a prefix of {found.shape[1]} numbers for each token, this model takes "
            f"{count * heads * width}",
            source.wants,
        )
    parts = found.view(len(found), count, heads, width).permute(1, 2, 0, 3)
    names = [f"{target}.{which}" for target in plan.deltas for which in ("keys", "values")]
    return Read(settings, plan, dict(zip(names, parts, strict=True)))


FORMATS: dict[type, tuple[str, Format]] = {
    kinds.VeRASettings: ("VERA", Format(_vera_config, _vera_tensors, _read_vera)),
    kinds.IA3Settings: ("IA3", Format(_ia3_config, _ia3_tensors, _read_ia3)),
    kinds.PromptSettings: ("PROMPT_TUNING", Format(_tokens_config, _prompt_tensors, _read_prompt)),
    kinds.PrefixSettings: ("PREFIX_TUNING", Format(_tokens_config, _prefix_tensors, _read_prefix)),
}


def hung_of(model: nn.Module, name: str) -> dict[str, Delta]:
    """The deltas of an adapter that is there."""
    found = deltas(model, name)
    assert found, f"there is no adapter {name!r} to save"
    return found
