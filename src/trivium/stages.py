"""The table: what makes a stage. Its rows, its objective, its defaults; the loop knows none of it.

A setting that the recipe leaves out comes from the parent stage if it is one that goes with the model, else from this
table; each such value is printed once. CONTRIBUTING.md tells how to add a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trivium.errors import RecipeError
from trivium.objectives import OBJECTIVES, defaults, shares
from trivium.peft.settings import only_named, rate_of
from trivium.train.machine import pick_device

if TYPE_CHECKING:
    from trivium.data.formats import Kind
    from trivium.recipe import Recipe, Stage


@dataclass(frozen=True)
class StageKind:
    """``rows`` is what a row of its data becomes (see `data.formats`), where its loss has no rows of its own;
    ``losses`` are those that it may have. ``reads`` is what comes out of the model: log-probabilities, or a reward."""

    rows: Kind
    losses: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    reads: Literal["logprob", "reward"] = "logprob"


COMMON = {
    "schedule": "cosine",
    "optimizer": "adamw",
    "max_grad_norm": 1.0,
    "recompute": "auto",
    "dropout": 0.0,
    "dtype": "auto",
    "epochs": 1.0,
    "eval_data": 0.05,
    "bad_rows": 0.01,
    "duplicates": "keep",
    "skip_non_finite": 0,
    "keep_checkpoints": 2,
    "result": "last",
    "method": {"name": "full"},
}

STAGES = {
    "pretrain": StageKind(
        "text",
        ("next_token",),
        {**COMMON, "loss": "next_token", "batch_tokens": 8192, "learning_rate": 1e-3, "warmup_ratio": 0.02,
         "weight_decay": 0.1, "max_length": 512},
    ),
    "sft": StageKind(
        "conversation",
        ("next_token",),
        {**COMMON, "loss": "next_token", "batch_size": 16, "learning_rate": 2e-5, "warmup_ratio": 0.03,
         "weight_decay": 0.0, "train_on": "assistant"},
    ),
    "preference": StageKind(
        "pair",
        tuple(name for name, entry in OBJECTIVES.items() if entry.rows is not None and name != "bradley_terry"),
        {**COMMON, "loss": "dpo", "batch_size": 16, "learning_rate": 1e-6, "warmup_ratio": 0.1,
         "schedule": "linear", "weight_decay": 0.0, "scored": "best_worst", "reference": "auto"},
    ),
    "reward": StageKind(
        "pair",
        ("bradley_terry",),
        {**COMMON, "loss": "bradley_terry", "batch_size": 16, "learning_rate": 1e-5, "warmup_ratio": 0.1,
         "schedule": "linear", "weight_decay": 0.0, "scored": "all"},
        "reward",
    ),
}  # fmt: skip

# What one forward pass holds, in tokens: enough to keep the device busy, few enough to keep memory low.
PASS_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}

# What goes with the model and is taken over from the stage before.
INHERITED = ("method", "dtype", "device", "recompute", "micro_batch_tokens", "memory")

# What only arranges or shows the work: it does not enter a stage's identity.
NOT_IDENTITY = {
    "name",
    "from_",
    "data",
    "eval_data",
    "eval_every",
    "bad_rows",
    "micro_batch_tokens",
    "recompute",
    "memory",
    "device",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "skip_non_finite",
    "reference",
}

# What changes only which of a training's models is taken: another choice needs no other training.
RESULT = {"result"}


# Settings that came in later: as they are here, nothing is done otherwise than before, and nothing is trained again.
USUAL = {"duplicates": "keep", "scored": "best_worst", "result": "last", "label_smoothing": 0.0}


def rows_of(stage: Stage) -> Kind:
    """What a row of a stage's data becomes."""
    kind = STAGES[stage.stage]
    entries = [OBJECTIVES[name] for name in shares(stage.loss or kind.losses[0])]
    return entries[0].rows or kind.rows


def resolve(stage: Stage, recipe: Recipe, parent: dict[str, Any] | None, parent_name: str) -> tuple[Stage, list[str]]:
    """The stage with every setting filled in, and a line for each kind of value that was not written in the recipe.

    ``parent`` holds the settings of what it starts from: a stage's, or just the method of a given adapter folder.
    Raises RecipeError where the device asked for is not there, or an inherited value contradicts a given one.
    """
    parent = parent or {}
    known = {k: v for k in type(stage).model_fields if (v := getattr(stage, k)) is not None}
    inherited: dict[str, Any] = {k: parent[k] for k in INHERITED if k not in known and parent.get(k) is not None}
    for one, other in (("memory", "recompute"), ("recompute", "memory")):  # the one that is written decides
        if one in known and known[one] != "auto":
            inherited.pop(other, None)
    defaulted: dict[str, Any] = {}
    method = parent.get("method") or {}
    if stage.method is not None and only_named(stage.method) and stage.method.items() <= method.items():
        inherited["method"] = method  # `method: lora` on a LoRA parent goes on with that adapter
    have = {**known, **inherited}
    alternatives = {"epochs": "max_steps", "batch_size": "batch_tokens", "batch_tokens": "batch_size"}
    usual = STAGES[stage.stage].defaults
    for key, value in {**usual, **defaults(have.get("loss") or usual["loss"])}.items():
        if key not in have and alternatives.get(key) not in have:
            defaulted[key] = value
    if {**have, **defaulted}["method"]["name"] != "full":
        if have.get("optimizer") == "muon":
            remedy = "use adamw, or method: full"
            raise RecipeError(f"stages.{stage.name}.optimizer: muon is for full training, not for an adapter", remedy)
        if "learning_rate" in defaulted:
            defaulted["learning_rate"] *= rate_of({**have, **defaulted}["method"])
    elif have.get("reference") == "computed":
        what = f"stages.{stage.name}.reference: full training changes the parent's weights, so it cannot be computed"
        raise RecipeError(f"{what} in every step", "use reference: kept, or leave it out")
    device = pick_device(have.get("device"))
    if "device" not in have:
        defaulted["device"] = device
    if "micro_batch_tokens" not in have:
        defaulted["micro_batch_tokens"] = PASS_TOKENS[device.split(":")[0]]
    if "seed" not in have:
        inherited["seed"] = recipe.seed
    lines = []
    shown = {k: v for k, v in inherited.items() if k != "seed"}
    if shown:
        lines.append(f"from {parent_name}: " + ", ".join(_shown(k, v) for k, v in sorted(shown.items())))
    if defaulted:
        lines.append(f"defaults of {stage.stage}: " + ", ".join(_shown(k, v) for k, v in sorted(defaulted.items())))
    return stage.model_copy(update={**inherited, **defaulted}), lines


def _shown(key: str, value: Any) -> str:
    if isinstance(value, dict) and "name" not in value:  # a mixture of losses
        return f"{key} " + " + ".join(f"{share:g} {name}" for name, share in value.items())
    if isinstance(value, dict):
        rest = {k: v for k, v in value.items() if k != "name"}
        value = value["name"] + (f" ({', '.join(f'{k} {v}' for k, v in rest.items())})" if rest else "")
        return f"{key} {value}"
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def identity_settings(stage: Stage) -> dict[str, Any]:
    """The settings that can change the result, for the stage's identity."""
    values = {k: v for k, v in stage.model_dump().items() if USUAL.get(k) != v}
    share = {"eval_share": stage.eval_data} if isinstance(stage.eval_data, (int, float)) else {}
    return {**{k: v for k, v in values.items() if k not in NOT_IDENTITY and v is not None}, **share}
