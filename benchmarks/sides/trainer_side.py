"""The plain Trainer of transformers, with PEFT where LoRA is trained: no more than its own batches and loss."""

import common


def main() -> None:
    from transformers import Trainer

    told = common.task()
    model = common.load(told)
    if told["trained"] == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, common.lora(told))
        common.start_alike(model, told)
    common.carried_out(Trainer, model, told)


if __name__ == "__main__":
    main()
