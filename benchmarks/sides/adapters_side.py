"""AdapterHub's side of a job: one bottleneck after every MLP (Pfeiffer), trained by its own Trainer."""

import common


def main() -> None:
    import adapters
    from adapters import AdapterTrainer, SeqBnConfig

    told = common.task()
    model = common.load(told)
    adapters.init(model)
    how = SeqBnConfig(
        reduction_factor=told["method"]["reduction_factor"], non_linearity="gelu", original_ln_before=False
    )
    model.add_adapter("bench", config=how)
    model.train_adapter("bench")
    common.carried_out(AdapterTrainer, model, told)


if __name__ == "__main__":
    main()
