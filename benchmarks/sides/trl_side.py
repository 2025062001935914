"""TRL's side of a job: SFTTrainer or DPOTrainer on rows that are tokenised already."""

import json
import time
from typing import Any

import common


def sft(told: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": row["ids"], "labels": row["labels"]} for row in rows])
    config = SFTConfig(**common.arguments(told), max_length=None)
    peft = {} if told["trained"] == "full" else {"peft_config": common.lora(told)}
    model = common.load(told, **(common.in_4_bit() if told["trained"] == "qlora" else {}))
    trainer = common.watched(SFTTrainer)(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, **peft
    )
    return trainer, [{"ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


def dpo(told: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any) -> tuple[Any, list[dict[str, Any]]]:
    """DPO's trainer, which keeps count of the seconds that a reference computed before takes."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Timed(common.watched(DPOTrainer)):  # type: ignore[misc]
        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any, **more: Any) -> Any:
            return dataset  # tokenised as all tools have it

        def _precompute_ref_logps(self, *args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            done = super()._precompute_ref_logps(*args, **more)
            self.reference_seconds += time.perf_counter() - started
            return done

    data = Dataset.from_list([{f"{name}_ids": ids for name, ids in row.items()} for row in rows])
    kept = told["setting"]["kept"]
    config = DPOConfig(**common.arguments(told), beta=0.1, max_length=None, precompute_ref_log_probs=kept)
    lora, model = common.lora(told), common.load(told)
    trainer = Timed(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    names = ("prompt", "chosen", "rejected")
    return trainer, [{name: row[f"{name}_ids"] for name in names} for row in trainer.train_dataset]


def main() -> None:
    from transformers import AutoTokenizer

    told = common.task()
    tokenizer = AutoTokenizer.from_pretrained(told["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer, rows = (dpo if told["kind"] == "dpo" else sft)(told, common.rows_of(told), tokenizer)
    if told["trained"] != "full":
        common.start_alike(trainer.model, told)
    print(json.dumps(common.trained(trainer, told, rows, getattr(trainer, "reference_seconds", 0.0))))


if __name__ == "__main__":
    main()
