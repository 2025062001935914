"""What a stage holds at its peak, by what it is for; and what would make it fit, the cheapest first.

Units: bytes, tokens. Nothing here measures: all is reckoned from sizes (`trivium.train.budget`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trivium.peft.kinds import quantization
from trivium.peft.settings import settings_of
from trivium.recipe import Stage
from trivium.train.budget import OVERHEAD_TOKENS, Cost, Plan, amount, fit

NF4 = 0.5 + 4 / 64  # bytes a weight: four bits, and a float32 scale for 64 of them (Dettmers et al. 2023, sec. 3)
FLOAT = 4


@dataclass(frozen=True)
class Way:
    """A change of the recipe, what it then holds, and what it costs."""

    change: str
    bytes: float
    price: str


def parts(cost: Cost, tokens: int, recomputed: int, measured: float | None = None) -> dict[str, float]:
    """The peak by what it is for; with what was ``measured`` in all, ``other`` is the rest of that."""
    found = {
        "weights": cost.weights,
        "gradients": cost.gradients,
        "moments": cost.moments,
        "activations": cost.activations(min(tokens, cost.step_tokens), recomputed),
        "log-probabilities": cost.readout,
        "other": cost.runtime,
    }
    if measured is not None:
        found["other"] = max(0.0, measured - sum(found.values()) + found["other"])
    return found


def ways(stage: Stage, hf: Any, cost: Cost, there: float, longest: int, frozen: int) -> list[Way]:
    """What would make a stage fit into ``there`` bytes, the cheapest first; none where nothing would.

    ``frozen``: bytes of a weight that is not trained.
    """
    asked, found = int(stage.micro_batch_tokens or 1), []
    if (plan := fit(there, cost, longest, asked)) is not None:
        found.append(Way(f"memory: {amount(there)}", plan.bytes, _slower(plan, cost, asked)))
    for change, other, price in _lighter(stage, hf, cost, frozen):
        if (plan := fit(there, other, longest, asked)) is not None:
            found.append(Way(change, plan.bytes, f"{price}; {_slower(plan, other, asked)}"))
    return found


def _lighter(stage: Stage, hf: Any, cost: Cost, frozen: int) -> Iterator[tuple[str, Cost, str]]:
    """Other methods, and what they hold."""
    settings = settings_of(stage.method)
    if stage.full:
        small = FLOAT * lora_parameters(hf)
        cost = replace(cost, weights=cost.weights * frozen / FLOAT + small, gradients=small, moments=2 * small)
        yield "method: lora", cost, f"trains {small // FLOAT:,} weights instead of all"
    if quantization(settings) is None:
        cost = replace(cost, weights=cost.weights - linear_weights(hf) * (frozen - NF4))
        yield "method: qlora", cost, "the frozen weights in 4 bits: a little less exact, about a tenth slower"


def lora_parameters(hf: Any) -> int:
    """Weights that LoRA with its usual settings would train."""
    from trivium.peft.base import plan_for, small_weights

    plan = plan_for(hf, settings_of({"name": "lora"}))
    assert plan is not None, "LoRA hangs something"
    return sum(t.numel() for t in small_weights(plan.deltas).values())


def linear_weights(hf: Any) -> int:
    """How many weights the linear modules of all layers have."""
    from trivium.peft.checks import ALL_LINEAR
    from trivium.peft.targets import find_targets

    return sum(hf.get_submodule(name).weight.numel() for name in find_targets(hf, ALL_LINEAR))


def _slower(plan: Plan, cost: Cost, asked: int) -> str:
    """How much more time a step takes, in words."""
    before, after = 1 + OVERHEAD_TOKENS / asked, 1 + OVERHEAD_TOKENS / plan.tokens + plan.layers / cost.layers / 3
    layers = f", {plan.layers} of {cost.layers} layers recomputed" if plan.layers else ""
    share = after / before - 1
    return f"{plan.tokens:,} tokens a pass{layers}" + (f": about {share:.0%} slower" if share >= 0.005 else "")
