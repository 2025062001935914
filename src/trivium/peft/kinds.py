"""What a recipe can say about each method: plain frozen dataclasses, one sentence per field, checked when built.

    LoRASettings(r=8, target_modules=["q_proj", "v_proj"])

This file imports no torch, so that a recipe is checked in milliseconds. Every mistake is a RecipeError that names
the setting. `settings.py` has the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trivium.errors import RecipeError
from trivium.peft.checks import (
    ALL_LINEAR,
    TargetModules,
    above_0,
    by_pattern,
    contradict,
    fraction,
    names,
    one_of,
    patterns,
    put,
    size,
    switch,
    whole,
)  # fmt: skip

NON_LINEARITIES = ("gelu", "relu", "silu", "tanh")
SEQUENTIAL = ("houlsby", "pfeiffer")
PLACEMENTS = (*SEQUENTIAL, "parallel")
STARTS = ("default", "pissa", "olora")
QUANTIZATIONS = ("nf4", "int8")


def _field(default: Any, told: str) -> Any:
    return field(default=default, metadata={"help": told})


def _r(told: str, default: int | None = 16) -> Any:
    return _field(default, told)


def _dropout(where: str) -> Any:
    return _field(0.0, f"Dropout {where}, in training only.")


def _targets(default: Any = ALL_LINEAR, instead: str = "") -> Any:
    told = "'all-linear' (in the decoder layers), or names, dotted suffixes or globs of modules."
    return _field(default, f"Names, dotted suffixes or globs of modules, instead of {instead}." if instead else told)


@dataclass(frozen=True)
class FullSettings:
    """Every weight is trained, in float32; nothing is hung anywhere."""


@dataclass(frozen=True, kw_only=True)
class OnFrozenBase:
    """What all methods have that train no tensor of the base itself."""

    quantize: str | None = _field(
        None, "Hold the frozen linear modules of the layers in 4 bit (nf4, QLoRA) or 8 bit (int8)."
    )

    def __post_init__(self) -> None:
        if self.quantize is not None:
            one_of("quantize", self.quantize, QUANTIZATIONS)


@dataclass(frozen=True, kw_only=True)
class LoRASettings(OnFrozenBase):
    """LoRA: a low-rank update of chosen weight matrices (Hu et al. 2021), and its family."""

    r: int = _r("Rank of the update; r * (in + out) weights per module.")
    alpha: float | None = _field(None, "The update is scaled by alpha / r; left out, alpha is 2 * r.")
    dropout: float = _dropout("on the input of the update")
    target_modules: TargetModules = _targets()
    rslora: bool = _field(False, "Scale by alpha / sqrt(r) instead (Kalajdzievski 2023), for large r.")
    rank_pattern: Mapping[str, int] | None = _field(None, "Another r for modules that a pattern matches: {q_proj: 4}.")
    alpha_pattern: Mapping[str, float] | None = _field(None, "Another alpha for modules that a pattern matches.")
    dora: bool = _field(False, "Train the rows' magnitudes apart from their direction (DoRA, Liu et al. 2024).")
    init_lora_weights: str = _field(
        "default", "pissa (Meng et al. 2024) or olora (Büyükakyüz 2024): start from parts of the weight itself."
    )
    loraplus_lr_ratio: float = _field(
        1.0, "B learns at so many times the rate of A (LoRA+, Hayou et al. 2024; it recommends 16)."
    )
    target_parameters: tuple[str, ...] | None = _field(
        None, "Also expert matrices of a mixture of experts, by name, suffix or glob: [experts.gate_up_proj]."
    )
    modules_to_save: tuple[str, ...] | None = _field(
        None, "Modules trained in full beside it: [embed_tokens, lm_head]; what is tied stays tied."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size("r", self.r)
        fraction("dropout", self.dropout)
        if self.alpha is not None:
            above_0("alpha", self.alpha, "leave it out for 2 * r")
        above_0("loraplus_lr_ratio", self.loraplus_lr_ratio)
        switch("rslora", self.rslora)
        switch("dora", self.dora)
        one_of("init_lora_weights", self.init_lora_weights, STARTS)
        put(self, "target_modules", patterns("target_modules", self.target_modules))
        for key in ("target_parameters", "modules_to_save"):
            if getattr(self, key) is not None:
                put(self, key, names(key, getattr(self, key)))
        for key, check in (("rank_pattern", size), ("alpha_pattern", above_0)):
            if getattr(self, key) is not None:
                put(self, key, by_pattern(key, getattr(self, key), check))
        if self.dora and self.init_lora_weights != "default":
            contradict("dora", "init_lora_weights", "both rewrite the start of the update")
        if self.dropout and self.target_parameters is not None:
            contradict("dropout", "target_parameters", "experts' inputs cannot be reached")
        if self.dora and self.target_parameters is not None:
            contradict("dora", "target_parameters", "it is for linear modules")

    @property
    def effective_alpha(self) -> float:
        return 2 * self.r if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class VeRASettings(OnFrozenBase):
    """VeRA: one random pair of matrices for all modules, and two trained vectors for each (Kopiczko et al. 2024)."""

    r: int = _r("Rows of the shared random matrix; r + out weights per module.", 256)
    dropout: float = _dropout("on the input of the update")
    target_modules: TargetModules = _targets()
    d_initial: float = _field(0.1, "Where the vector of length r starts; the other one starts at 0.")
    projection_seed: int = _field(0, "Seed of the random pair, which is saved with the vectors.")

    def __post_init__(self) -> None:
        super().__post_init__()
        size("r", self.r)
        fraction("dropout", self.dropout)
        above_0("d_initial", self.d_initial)
        whole("projection_seed", self.projection_seed, 0, 2**63 - 1)
        put(self, "target_modules", patterns("target_modules", self.target_modules))


@dataclass(frozen=True, kw_only=True)
class OfAWidth(OnFrozenBase):
    """What narrow networks after or beside blocks have in common."""

    r: int | None = _r("Width of the bottleneck; left out: 64, or what reduction_factor says.", None)
    reduction_factor: float | None = _field(None, "The width as a share of the model's: its width / reduction_factor.")
    non_linearity: str = _field("gelu", "Between down and up: gelu, relu, silu or tanh.")
    skip_layers: int = _field(0, "No adapter in so many of the lowest layers (AdapterDrop, Rücklé et al. 2021).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            size("r", self.r)
        if self.reduction_factor is not None:
            above_0("reduction_factor", self.reduction_factor)
            if self.r is not None:
                contradict("r", "reduction_factor", "give one of them")
        one_of("non_linearity", self.non_linearity, NON_LINEARITIES)
        whole("skip_layers", self.skip_layers, 0, 1_000_000)

    def width_in(self, d: int) -> int:
        """The bottleneck's width on a stream of width ``d``."""
        if self.reduction_factor is not None:
            return max(1, int(d / self.reduction_factor))
        return 64 if self.r is None else self.r


@dataclass(frozen=True, kw_only=True)
class BottleneckSettings(OfAWidth):
    """Bottleneck adapters: a narrow two-layer network on the output of chosen blocks (Houlsby et al. 2019)."""

    placement: str = _field(
        "houlsby",
        "'houlsby': after attention and after the MLP; 'pfeiffer': after the MLP; 'parallel': beside the MLP.",
    )
    scale: float = _field(1.0, "What a parallel adapter adds is scaled by this (He et al. 2022 use 4).")
    dropout: float = _dropout("inside the bottleneck")
    target_modules: TargetModules | None = _targets(None, "those of the placement")
    layer_norms: bool = _field(False, "Also train a gain (and shift) on the norms of the adapted layers, as Houlsby.")

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("dropout", self.dropout)
        one_of("placement", self.placement, PLACEMENTS)
        above_0("scale", self.scale)
        switch("layer_norms", self.layer_norms)
        if self.scale != 1 and self.placement != "parallel":
            raise RecipeError(f"scale is {self.scale}", "only placement: parallel has a scale; leave it out")
        if self.target_modules is not None:
            put(self, "target_modules", patterns("target_modules", self.target_modules))


@dataclass(frozen=True, kw_only=True)
class CompacterSettings(OfAWidth):
    """Compacter: bottlenecks made of Kronecker products that share a factor (Karimi Mahabadi et al. 2021)."""

    placement: str = _field("houlsby", "'houlsby': after attention and after the MLP; 'pfeiffer': Compacter++.")
    phm_dim: int = _field(4, "Terms in each sum of Kronecker products; it divides both widths.")
    phm_rank: int = _field(1, "Rank of each product's second factor.")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("placement", self.placement, SEQUENTIAL)
        size("phm_dim", self.phm_dim)
        size("phm_rank", self.phm_rank)


@dataclass(frozen=True, kw_only=True)
class IA3Settings(OnFrozenBase):
    """(IA)³: trained scales on keys, values and the MLP's inner activations (Liu et al. 2022)."""

    target_modules: TargetModules | None = _targets(None, "keys, values and the MLP's down projection")
    feedforward_modules: TargetModules | None = _field(
        None, "Those of target_modules whose input is scaled instead of their output."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("target_modules", "feedforward_modules"):
            if getattr(self, key) is not None:
                put(self, key, names(key, getattr(self, key)))
        if self.feedforward_modules is not None and self.target_modules is None:
            raise RecipeError("feedforward_modules is given without target_modules", "give both, or neither")


@dataclass(frozen=True, kw_only=True)
class PromptSettings(OnFrozenBase):
    """Prompt tuning: trained embeddings before every sequence (Lester et al. 2021)."""

    num_virtual_tokens: int = _field(20, "How many; they count against the model's context.")

    def __post_init__(self) -> None:
        super().__post_init__()
        size("num_virtual_tokens", self.num_virtual_tokens)


@dataclass(frozen=True, kw_only=True)
class PrefixSettings(PromptSettings):
    """Prefix tuning: trained keys and values in every layer, before every sequence (Li and Liang 2021)."""


@dataclass(frozen=True, kw_only=True)
class BitFitSettings(OnFrozenBase):
    """BitFit: only the biases (Ben Zaken et al. 2022); a model that has none gets them."""


@dataclass(frozen=True)
class LayerNormSettings:
    """Only the norms (Zhao et al. 2024, "Tuning LayerNorm in Attention")."""


@dataclass(frozen=True)
class TopLayersSettings:
    """Only the uppermost decoder layers, whole."""

    layers: int = _field(2, "How many of them.")

    def __post_init__(self) -> None:
        size("layers", self.layers)


Settings = (
    FullSettings | LoRASettings | VeRASettings | BottleneckSettings | CompacterSettings | IA3Settings | PromptSettings
    | BitFitSettings | LayerNormSettings | TopLayersSettings
)  # fmt: skip


def quantization(settings: Settings) -> str | None:
    """How the frozen base is to be held: ``nf4``, ``int8``, or None: as it is."""
    return getattr(settings, "quantize", None)


def virtual_tokens(settings: Settings) -> int:
    """How many tokens of the model's context the method takes."""
    return getattr(settings, "num_virtual_tokens", 0)
