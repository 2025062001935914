"""Prefix tuning: trained keys and values in every layer, before every sequence (Li and Liang 2021, "Prefix-Tuning:
Optimizing Continuous Prompts for Generation", section 4.2).

2 L P G H trained weights, which start as the keys and values that tokens drawn from the vocabulary have in the base
(section 7.4: a start from real activations; the reparametrisation of section 4.3 is for starts from noise, and left
out). In a forest the prefix is the ancestor of everything (`virtual.py`): positions count on behind it, as in PEFT.

Shapes:  L layers,  P virtual tokens,  G key/value heads,  H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivium.errors import ModelError
from trivium.peft import targets
from trivium.peft.delta import Delta, Plan
from trivium.peft.kinds import PrefixSettings
from trivium.peft.prompt import NoPlace, refuse_lookups
from trivium.virtual import Virtual

ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class Prefix(NoPlace):
    """The keys and values of one layer; they hang under its attention."""

    def __init__(self, heads: int, tokens: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(heads, tokens, width, dtype=torch.float32))
        self.values = nn.Parameter(torch.empty(heads, tokens, width, dtype=torch.float32))

    def virtual(self) -> Virtual:
        return Virtual(self.keys.shape[1], keys_values=((self.keys, self.values),))


def build(model: nn.Module, settings: PrefixSettings) -> Plan:
    """Keys and values for every layer. Raises ModelError for an attention that has none of the usual kind."""
    config = targets.text_config(model)
    refuse_lookups(model, "prefix")
    kinds = set(getattr(config, "layer_types", None) or ()) - {*ATTENTION_KINDS}
    if kinds:
        has = ", ".join(sorted(kinds))
        raise ModelError(f"prefix: {type(model).__name__} has layers of {has}", "choose another method")
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(f"prefix: {type(model).__name__} keeps compressed keys and values", "choose another method")
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    made: dict[str, Delta] = {
        targets.block(name, layer, targets.ATTENTION): Prefix(heads, settings.num_virtual_tokens, width)
        for name, layer in targets.decoder_layers(model).items()
    }
    return Plan(made, fill=_from_tokens)


def _from_tokens(model: nn.Module, hung: dict[str, Delta], generator: torch.Generator) -> None:
    """The keys and values of random tokens in the base. Raises ModelError where its cache has another form."""
    from transformers import DynamicCache

    first = next(iter(hung.values()))
    assert isinstance(first, Prefix)
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.randint(len(weight), (1, first.keys.shape[1]), generator=generator).to(weight.device)
    cache = DynamicCache()  # of no config: one that forgets what left a sliding window would be too short
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        for delta, layer in zip(hung.values(), cache.layers, strict=True):
            assert isinstance(delta, Prefix)
            for mine, which in ((delta.keys, "keys"), (delta.values, "values")):
                found = getattr(layer, which, None)
                if found is None or mine.shape != found.shape[1:]:
                    raise ModelError(
                        f"prefix: the layers of {type(model).__name__} keep no keys and values of {list(mine.shape)}",
                        "choose another method",
                    )
                mine.copy_(found[0])
