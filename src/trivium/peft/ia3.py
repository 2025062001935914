"""(IA)³: trained scales on keys, values and the MLP's inner activations (Liu et al. 2022, "Few-Shot Parameter-Efficient
Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3).

    k = l_k * (W_k x),    v = l_v * (W_v x),    h = W_down (l_ff * f(x))          every l starts at 1

out trained weights per key and value matrix, in per down projection. Linear, so that it merges into the weights.

Shapes:  N tokens (all leading dimensions),  in, out: the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivium.errors import RecipeError
from trivium.peft.delta import Delta, Plan
from trivium.peft.kinds import IA3Settings
from trivium.peft.targets import (
    add_to_weight,
    decoder_layers,
    find_targets,
    linear_shape,
    matches,
    weight_of,
)

# What the field's decoders call their key and value matrices (alone or with the query), and the MLP's last one.
KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "key_value", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
DOWN = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "mlp.c_proj", "wo")


class IA3(Delta):
    """A scale on the output of a linear target, or (``feedforward``) on its input."""

    def __init__(self, target: nn.Module, feedforward: bool) -> None:
        super().__init__()
        self.feedforward = feedforward
        n_in, n_out = linear_shape(target)
        self.ia3_l = nn.Parameter(torch.empty(n_in if feedforward else n_out, dtype=torch.float32))

    @property
    def changes_input(self) -> bool:  # type: ignore[override]
        return self.feedforward

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        nn.init.ones_(self.ia3_l)

    def inputs(self, x: Tensor) -> Tensor:
        return x * self.ia3_l.to(x.dtype) if self.feedforward else x

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        return output if self.feedforward else output * self.ia3_l.to(output.dtype)

    def merge(self, target: nn.Module) -> None:
        scale = self.ia3_l if self.feedforward else self.ia3_l[:, None]
        add_to_weight(target, weight_of(target).float() * (scale - 1))
        if not self.feedforward and getattr(target, "bias", None) is not None:
            bias = target.get_parameter("bias")
            bias.copy_(bias.float() * self.ia3_l)


def build(model: nn.Module, settings: IA3Settings) -> Plan:
    """A scale on every key and value matrix and every down projection, or on what the settings name.

    Raises RecipeError where these match nothing.
    """
    if settings.target_modules is None:
        names = [n for n in find_targets(model, "all-linear") if _called(n, (*KEYS_VALUES, *DOWN))]
        down = {n for n in names if _called(n, DOWN)}
        if not names:
            raise RecipeError(
                "ia3: found no key, value or down projection among the linear modules", "name them in target_modules"
            )
    else:
        names = find_targets(model, settings.target_modules)
        chosen = settings.feedforward_modules or ()
        down = {n for n in names if any(matches(n, pattern) for pattern in chosen)}
        for pattern in chosen:
            if not any(matches(n, pattern) for n in names):
                raise RecipeError(
                    f"feedforward_modules {pattern!r} matches none of the target_modules", "name it in both"
                )
    out_of_reach = settings.target_modules is None and len(down) < len(decoder_layers(model))
    notes = ["some layers have no MLP that ia3 reaches, such as bare experts"] if out_of_reach else []
    return Plan({n: IA3(model.get_submodule(n), n in down) for n in names}, notes)


def _called(name: str, which: tuple[str, ...]) -> bool:
    return any(name.endswith("." + own) for own in which)
