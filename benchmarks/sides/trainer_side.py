"""The plain Trainer of transformers, with PEFT where LoRA is trained: no more than its own batches and loss."""

import json

import common


def main() -> None:
    from transformers import Trainer, TrainingArguments

    told = common.task()
    rows = common.rows_of(told)
    model = common.load(told)
    if told["trained"] == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, common.lora(told))
        common.start_alike(model, told)
    trainer = common.watched(Trainer)(
        model=model, args=TrainingArguments(**common.arguments(told)), train_dataset=rows,
        data_collator=lambda batch: common.padded(batch, 0),
    )  # fmt: skip
    print(json.dumps(common.trained(trainer, told, rows)))


if __name__ == "__main__":
    main()
