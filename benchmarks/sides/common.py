"""What the sides that are built on transformers' Trainer have in common: rows, arguments, and keeping time."""

import json
import random
import sys
import time
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NAMES = ("torch", "transformers", "trl", "peft", "adapters", "litgpt", "llamafactory", "accelerate", "bitsandbytes")


def task() -> dict[str, Any]:
    return dict(json.loads(Path(sys.argv[1]).read_text()))


def steps_of(told: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return list(json.loads((Path(told["folder"]) / "steps.json").read_text()))


def rows_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows in order: that of trivium's steps, or batches of like length, drawn at random."""
    rows = [row for step in steps_of(told) for row in step]
    if not told["setting"]["grouped"]:
        return rows
    batch = told["batch"]
    rows.sort(key=lambda row: len(row["ids"]))
    batches = [rows[n : n + batch] for n in range(0, len(rows), batch)]
    random.Random(told["seed"]).shuffle(batches)
    return [row for one in batches for row in one]


def digest(rows: list[dict[str, Any]]) -> str:
    """Of rows in whatever order."""
    return sha256("\n".join(sorted(json.dumps(row, sort_keys=True) for row in rows)).encode()).hexdigest()


def arguments(told: dict[str, Any]) -> dict[str, Any]:
    """What every Trainer gets."""
    setting, batch = told["setting"], told["batch"]
    together = min(setting["together"] or batch, batch)
    lean = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if setting["recompute"] else {}
    return {
        "output_dir": told["out"], "per_device_train_batch_size": together,
        "gradient_accumulation_steps": batch // together, "max_steps": len(told["rates"]),
        "learning_rate": told["rate"], "weight_decay": 0.0,
        "adam_beta1": told["betas"][0], "adam_beta2": told["betas"][1], "max_grad_norm": 1.0,
        "seed": told["seed"], "use_cpu": True, "bf16": False, "gradient_checkpointing": setting["recompute"], **lean,
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "remove_unused_columns": False, "dataloader_pin_memory": False,
    }  # fmt: skip


def watched(kind: type) -> type:
    """A Trainer that takes rows in the given order and keeps the loss and the end of every step."""
    import torch

    class Watched(kind):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any, **more: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            self.clock.loss += float(loss)
            return loss

    return Watched


def carried_out(kind: type, model: Any, told: dict[str, Any]) -> None:
    """Train by a Trainer of this kind on its padded batches, and print what it gave."""
    from transformers import TrainingArguments

    rows = rows_of(told)
    trainer = watched(kind)(
        model=model, args=TrainingArguments(**arguments(told)), train_dataset=rows,
        data_collator=lambda batch: padded(batch, 0),
    )  # fmt: skip
    print(json.dumps(trained(trainer, told, rows)))


def clock_of() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        loss = 0.0
        began = 0.0

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, *_: Any, **more: Any) -> None:
            self.began = self.began or time.time()

        def on_step_end(self, *_: Any, **more: Any) -> None:
            self.ended.append(time.time())
            self.losses.append(self.loss)
            self.loss = 0.0

    return Clock()


def trained(
    trainer: Any, told: dict[str, Any], rows: list[dict[str, Any]], reference: float = 0.0, train: Any = None
) -> dict[str, Any]:
    """Runs a trainer at trivium's rates; the Trainer's own warm-up would begin with a step at 0."""
    import torch

    clock = clock_of()
    trainer.clock = clock
    trainer.add_callback(clock)
    trainer.create_optimizer()
    rates = told["rates"]
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda n: rates[min(n, len(rates) - 1)])
    (train or trainer.train)()
    trainer.save_model(told["out"])
    return result(clock.losses, clock.began, clock.ended, rows, trainer.model, reference)


def result(
    losses: list[float],
    began: float,
    ended: list[float],
    rows: list[dict[str, Any]],
    model: Any,
    reference: float = 0.0,
) -> dict[str, Any]:
    return {
        "losses": losses,
        "seconds": ended[-1] - began + reference,
        "step_seconds": [b - a for a, b in zip([began, *ended], ended)],  # noqa: B905
        "reference_seconds": reference,
        "first_step_at": ended[0],
        "sha256": digest(rows),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def padded(batch: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Rows of ids and labels as one padded batch; what ``pad`` is is masked, and so is of no account."""
    import torch

    longest = max(len(row["ids"]) for row in batch)

    def fill(values: list[list[int]], by: int) -> Any:
        return torch.tensor([v + [by] * (longest - len(v)) for v in values])

    ids = [row["ids"] for row in batch]
    return {
        "input_ids": fill(ids, pad), "labels": fill([row["labels"] for row in batch], -100),
        "attention_mask": fill([[1] * len(i) for i in ids], 0),
    }  # fmt: skip


def load(told: dict[str, Any], **more: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32, **more)


def in_4_bit() -> dict[str, Any]:
    """How QLoRA's base is loaded: NF4, its scales quantised too."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": config, "device_map": "cpu"}


def lora(told: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=told["method"]["r"],
        lora_alpha=told["method"]["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def start_alike(model: Any, told: dict[str, Any]) -> None:
    """Gives PEFT's LoRA the first weights of trivium's."""
    from safetensors.torch import load_file

    from peft import set_peft_model_state_dict

    weights = load_file(Path(told["folder"]) / "adapter" / "adapter_model.safetensors")
    found = set_peft_model_state_dict(model, weights)
    assert not found.unexpected_keys, found.unexpected_keys[:3]
