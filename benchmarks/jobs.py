"""The table of jobs: what is trained on what, by whom, and what is aimed at. A line of `JOBS` is a job.

Every tool gets the same rows in the same steps, AdamW at the same rate in every step, float32, two threads, and where
it trains LoRA the same first weights. Peers run in each of their settings; the fastest and the leanest are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["sft", "dpo", "pretrain"]
Trained = Literal["full", "lora", "qlora", "bottleneck"]

LORA = {"name": "lora", "r": 16, "alpha": 32}
QLORA = {"name": "qlora", "r": 16, "alpha": 32}
BOTTLENECK = {"name": "pfeiffer", "reduction_factor": 16}
LEAN: dict[str, Any] = {"memory": "1.4GB"}  # what trivium is told to keep to
LEAN_PAIRS: dict[str, Any] = {"memory": "1.8GB"}
SMALL = {  # 5.4 million parameters, for pretraining; its vocabulary is learnt from the text
    "architecture": "llama", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 688, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a peer runs: examples of a pass (None: a whole step, padded), and its savers of time and memory."""

    together: int | None = 1
    grouped: bool = False  # batches of like length, over the whole data: other rows meet in a step
    recompute: bool = False  # gradient checkpointing
    kept: bool = False  # DPO: the reference's log-probabilities are computed before


SETTINGS = {
    "padded": Setting(None),
    "single": Setting(1),
    "grouped": Setting(None, grouped=True),
    "padded lean": Setting(None, recompute=True),
    "single lean": Setting(1, recompute=True),
    "padded4": Setting(4),
    "padded4 kept": Setting(4, kept=True),
    "single kept": Setting(1, kept=True),
    "single kept lean": Setting(1, kept=True, recompute=True),
}
QUICK = ("single", "single kept")  # with --quick a peer runs only in the first of these that it has

SFT = ("padded", "single", "grouped", "padded lean", "single lean")
DPO = ("padded4", "single", "padded4 kept", "single kept", "single kept lean")


@dataclass(frozen=True)
class Job:
    """``ours``: what trivium runs, by the name shown, as recipe keys of its stage; ``trained``: what its peers train.
    The first is what the job is about; others stand beside it. ``aim`` is against the best peer, or another of ours."""

    name: str
    kind: Kind
    data: str  # a name of `rows.SOURCES`
    rows: int
    batch: int
    trained: Trained
    ours: dict[str, dict[str, Any]]
    peers: dict[str, tuple[str, ...]]
    aim: str
    rate: float = 2e-4
    steps: int | None = None  # left out: each row once
    stage: dict[str, Any] = field(default_factory=dict)  # recipe keys of all of ours
    shown: Literal["training", "first step"] = "training"  # which seconds count


def _lora(**more: Any) -> dict[str, Any]:
    return {"method": LORA, **more}


HH, SHORT, LONG, SYSTEM, BOOKS = "hh", "short hh", "long prompts", "shared system", "books"
TOGETHER = {"micro_batch_tokens": 2048}  # a whole step in a pass: what its rows share is shared within a pass
SCORED = {"scored": "all"}  # of answers scored 1 0 0 0: the best against each other one

JOBS = (
    Job("sft-lora", "sft", HH, 64, 4, "lora", {"trivium": _lora()},
        {"trl": SFT, "trainer": SFT, "litgpt": ("padded", "single"),
         "llamafactory": ("padded", "single")}, "≥ 2.2× faster, ≥ 80% of the limit"),
    Job("sft-lora-lean", "sft", HH, 64, 4, "lora", {"trivium lean": _lora(**LEAN), "trivium": _lora()},
        {"trl": ("single", "single lean")}, "≤ 1.4 GB at ≥ 1.7× faster"),
    Job("sft-bottleneck", "sft", HH, 64, 4, "bottleneck", {"trivium": {"method": BOTTLENECK}, "trivium lora": _lora()},
        {"adapters": ("padded", "single", "single lean")}, "within trivium's LoRA time"),
    Job("sft-qlora", "sft", HH, 64, 4, "qlora", {"trivium": {"method": QLORA}, "trivium lora": _lora()},
        {"trl": ("padded", "single", "single lean")}, "within 1.25× of trivium's LoRA time"),
    Job("sft-full", "sft", HH, 64, 4, "full", {"trivium": {"method": "full"}}, {"trl": SFT, "trainer": SFT},
        "≥ 1.8× faster, ≤ 2/3 of the memory", rate=2e-5),
    Job("sft-shared-system", "sft", SYSTEM, 32, 8, "lora", {"trivium": _lora()},
        {"trl": ("padded", "single", "single lean")}, "≥ 3.5× faster", stage=TOGETHER),
    Job("dpo-lora", "dpo", HH, 32, 8, "lora", {"trivium": _lora()}, {"trl": DPO},
        "≥ 3.3× faster, ≥ 80% of the limit", rate=1e-4),
    Job("dpo-lora-lean", "dpo", HH, 32, 8, "lora", {"trivium lean": _lora(**LEAN_PAIRS), "trivium": _lora()},
        {"trl": ("single kept", "single kept lean")}, "≤ 1.8 GB at ≥ 2.5× faster", rate=1e-4),
    Job("dpo-long-prompt", "dpo", LONG, 8, 2, "lora", {"trivium": _lora()},
        {"trl": ("single", "single kept", "single kept lean")}, "≥ 8× faster", rate=1e-4, stage=SCORED),
    Job("pretrain", "pretrain", BOOKS, 96, 16, "full", {"trivium": {"method": "full"}},
        {"trainer": ("padded", "single", "padded lean"), "litgpt": ("padded", "single")},
        "≥ 1.6× faster, ≥ 75% of the limit", rate=1e-3, stage={"max_length": 512, "on_overflow": "split"}),
    Job("start", "sft", SHORT, 4, 4, "lora", {"trivium": _lora()}, {"trl": ("single",)}, "≤ 3 s to the first step",
        shown="first step"),
)  # fmt: skip


def job_of(name: str) -> Job:
    """The job of a name. Raises KeyError with the names there are."""
    found = {job.name: job for job in JOBS}
    if name not in found:
        raise KeyError(f"there is no job '{name}'; jobs: {', '.join(found)}")
    return found[name]
