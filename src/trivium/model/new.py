"""A new model from a few sizes: what is left out is derived from the width, never a library's 7B defaults."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from trivium.errors import RecipeError, listed, nearest, said
from trivium.model.door import ready
from trivium.terminal import size
from trivium.train.machine import free_memory

# Sizes from which others are derived.
WHOLE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings", "num_experts_per_tok",
)  # fmt: skip

INNER = ("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim")
MOST_LAYERS, MOST_VOCABULARY = 10_000, 10_000_000


def new_config(sizes: dict[str, Any], tokenizer: Any) -> Any:
    """A `transformers` config for ``architecture`` with the given sizes; ids and vocabulary from the tokenizer.

    Raises RecipeError for an unknown architecture, an unknown key, or sizes that do not fit together.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    sizes = dict(sizes)
    architecture = sizes.pop("architecture")
    if architecture not in KNOWN:
        raise RecipeError(
            f"model.architecture: unknown '{architecture}'{nearest(architecture, KNOWN)}",
            f"use a decoder of transformers, e.g. {listed(['llama', 'qwen3', 'gemma3_text', 'gpt2', 'mistral'])}",
        )
    config_class = type(AutoConfig.for_model(architecture))
    names = _names(config_class)
    for key in sizes:
        if key not in names:
            remedy = f"keys of {architecture}: {listed(names, 40)}"
            raise RecipeError(f"model.{key}: {architecture} has no such setting{nearest(key, names)}", remedy)
    given = {**_derived(sizes, names), **sizes, **_from_tokenizer(tokenizer)}
    _check(given, sizes)
    if "qk_rope_head_dim" in names:
        given.pop("head_dim", None)  # with latent attention it is the rotary part's alone, and set by the class
    known = {k: v for k, v in given.items() if k in names}
    try:
        return config_class(**known)
    except Exception as error:  # a config class checks its own fields, each in its own way
        raise RecipeError(
            f"model: {architecture} refuses these sizes: {said(error, 200)}", "mend the sizes in `model`"
        ) from None


def check_sizes(sizes: dict[str, Any]) -> None:
    """``new_config``'s checks without a tokenizer, for a recipe whose tokenizer has yet to be trained."""

    class Stands:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

        def __len__(self) -> int:
            vocabulary = sizes.get("vocab_size", 4096)
            return vocabulary if isinstance(vocabulary, int) and vocabulary > 2 else 4096

    config = new_config(sizes, Stands())
    _check_memory(config, sizes)


def _check_memory(config: Any, sizes: dict[str, Any]) -> None:
    """What cannot be made here is refused before anything is counted up to or allocated. Raises RecipeError."""
    sizes = {k: v for k, v in sizes.items() if isinstance(v, int)}  # what is no number has an error of its own
    for key, most in (("num_hidden_layers", MOST_LAYERS), ("vocab_size", MOST_VOCABULARY)):
        if sizes.get(key, 0) > most:
            raise RecipeError(f"model.{key}: {sizes[key]:,}, where {most:,} is the most", "mend the sizes in `model`")
    width, layers = sizes.get("hidden_size", 0), sizes.get("num_hidden_layers", 0)
    inner = min(v for key in INNER if isinstance(v := getattr(config, key, None) or width, int))
    needed = 4 * width * (sizes.get("vocab_size", 0) + layers * inner)  # at the least, in float32
    if needed > (free := free_memory("cpu")):
        told = ", ".join(
            f"{key} {sizes[key]:,}" for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key in sizes
        )
        what = f"model: weights of these sizes take {size(needed)} and more ({told}), and {size(free)} are free"
        raise RecipeError(what, "mend the sizes in `model`")


def new_model(config: Any, seed: int) -> Any:
    """Random weights, the same for the same seed; float32."""
    from transformers import AutoModelForCausalLM

    ready()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _names(config_class: Any) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters) | set(vars(config_class()))
    names |= set(getattr(config_class, "attribute_map", {}))
    common = {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"}
    return {n for n in names | common if not n.startswith("_") and n not in ("self", "kwargs", "transformers_version")}


def _derived(sizes: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Sizes that were left out, from the width. Experts together hold about one dense gated MLP per active expert."""
    for key in ("hidden_size", "num_hidden_layers"):
        if key not in sizes:
            raise RecipeError(
                f"model.{key} is missing", f"give model.{key}; e.g. hidden_size: 192, num_hidden_layers: 6"
            )
    for key in WHOLE:
        value = sizes.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecipeError(f"model.{key}: {value!r} is not a whole number", f"e.g. {key}: 8")
    width = sizes["hidden_size"]
    heads = sizes.get("num_attention_heads") or max(1, width // 64)
    head = sizes.get("head_dim") or width // heads
    inner = sizes.get("intermediate_size") or max(64, 64 * round(width * 8 / 3 / 64))
    active = sizes.get("num_experts_per_tok") or 2
    derived = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": head,
        "sliding_window": min(sizes.get("max_position_embeddings", 2048), 512),
        "num_experts": 8,
        "num_local_experts": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": active,
        "moe_intermediate_size": max(32, inner // active),
        "shared_expert_intermediate_size": inner,
        "kv_lora_rank": max(16, width // 4),
        "q_lora_rank": max(16, width // 2),
        "qk_rope_head_dim": max(8, head // 4 * 2),
        "qk_nope_head_dim": head,
        "v_head_dim": head,
        "hidden_size_per_layer_input": max(16, width // 4),
        "vocab_size_per_layer_input": None,  # filled with the vocabulary below
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": min(1, sizes["num_hidden_layers"]),
    }
    mapped = {k: v for k, v in derived.items() if k in names and k not in sizes and v is not None}
    # GPT-2 and its kind call the inner width n_inner and use four times the width, without gates
    if "n_inner" in names:
        mapped.pop("intermediate_size", None)
    if "sliding_window" in mapped and "layer_types" not in names:
        mapped.pop("sliding_window")  # mistral and its kind: full attention unless asked for
    return mapped


def _from_tokenizer(tokenizer: Any) -> dict[str, Any]:
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), **ids}


def _check(given: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Contradictions that would otherwise surface as a shape error deep inside the model."""
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if given.get(key) == 0:
            raise RecipeError(f"model.{key}: 0 leaves no model", f"give model.{key} a positive number")
    width, heads = given["hidden_size"], given.get("num_attention_heads")
    kv = given.get("num_key_value_heads") or heads
    for key, value in given.items():
        if isinstance(value, int) and not key.endswith("_id") and not isinstance(value, bool) and value < 0:
            raise RecipeError(f"model.{key}: {value} is negative", f"give model.{key} a positive number")
    if heads and "head_dim" not in sizes and width % heads:
        raise RecipeError(
            f"model.hidden_size: {width} cannot be split into num_attention_heads: {heads}",
            f"make hidden_size a multiple of {heads}, or give head_dim",
        )
    if heads and kv and heads % kv:
        raise RecipeError(
            f"model.num_key_value_heads: {kv} does not divide num_attention_heads: {heads}",
            f"use one of {[n for n in range(1, heads + 1) if heads % n == 0]}",
        )
