"""LLaMA-Factory's side of a job: its own SFT workflow with LoRA, on rows that are tokenised already."""

import contextlib
import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import common


def settings(told: dict[str, Any], data: Path) -> dict[str, Any]:
    """The job in LLaMA-Factory's words."""
    usual = common.arguments(told)
    lean = usual.pop("gradient_checkpointing")
    usual.pop("gradient_checkpointing_kwargs", None)
    for name in ("disable_tqdm", "remove_unused_columns"):
        usual.pop(name)
    return {
        **usual, "model_name_or_path": told["model"], "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": told["method"]["r"], "lora_alpha": told["method"]["alpha"], "lora_dropout": 0.0,
        "lora_target": "all", "tokenized_path": str(data), "dataset": "bench", "template": "empty",
        "disable_gradient_checkpointing": not lean, "overwrite_output_dir": True, "cutoff_len": 10**6,
    }  # fmt: skip


def without_sound() -> None:
    """It imports torchaudio whatever it trains, which PyPI has for CUDA alone; nothing of it is used here."""
    if find_spec("torchaudio") is None:
        silent = ModuleType("torchaudio")
        silent.__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = silent


def main() -> None:
    without_sound()
    from datasets import Dataset, DatasetDict
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    told = common.task()
    rows = common.rows_of(told)
    data = Path(told["out"]) / "rows"
    columns = [
        {"input_ids": row["ids"], "attention_mask": [1] * len(row["ids"]), "labels": row["labels"]} for row in rows
    ]
    DatasetDict({"train": Dataset.from_list(columns)}).save_to_disk(str(data))
    found: dict[str, Any] = {}

    class Timed(common.watched(workflow.CustomSeq2SeqTrainer)):  # type: ignore[misc]
        def train(self, *_: Any, **more: Any) -> Any:
            common.start_alike(self.model, told)
            used = [{"ids": row["input_ids"], "labels": row["labels"]} for row in self.train_dataset]
            given: list[Any] = []
            run = super().train
            found.update(common.trained(self, told, used, train=lambda: given.append(run())))
            return given[0]

    workflow.CustomSeq2SeqTrainer = Timed
    with contextlib.redirect_stdout(sys.stderr):
        run_exp(settings(told, data))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
