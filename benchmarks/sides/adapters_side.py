"""AdapterHub's side of a job: one bottleneck after every MLP (Pfeiffer), trained by its own Trainer."""

import json

import common


def main() -> None:
    import adapters
    from adapters import AdapterTrainer, SeqBnConfig
    from transformers import TrainingArguments

    told = common.task()
    rows = common.rows_of(told)
    model = common.load(told)
    adapters.init(model)
    how = SeqBnConfig(
        reduction_factor=told["method"]["reduction_factor"], non_linearity="gelu", original_ln_before=False
    )
    model.add_adapter("bench", config=how)
    model.train_adapter("bench")
    trainer = common.watched(AdapterTrainer)(
        model=model, args=TrainingArguments(**common.arguments(told)), train_dataset=rows,
        data_collator=lambda batch: common.padded(batch, 0),
    )  # fmt: skip
    print(json.dumps(common.trained(trainer, told, rows)))


if __name__ == "__main__":
    main()
