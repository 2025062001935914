"""LitGPT's side of a job: its own `finetune lora`, on weights converted once, with the job's rows and rates.

It averages over the tokens of each pass and then over passes, and clips no gradient: it has no setting for either. So
its losses are those of other tools only in the first step of a padded pass, and near them afterwards.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import common


def checkpoint(told: dict[str, Any]) -> Path:
    """The model's folder with LitGPT's weights beside it, made once for a job."""
    from litgpt.config import name_to_config
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    made = Path(told["folder"]) / "litgpt"
    source = Path(told["model"])
    if not made.is_dir():
        part = made.with_name("litgpt.part")
        part.mkdir()
        for file in source.iterdir():
            if file.is_file():
                (part / file.name).symlink_to(file)
        name_to_config["bench"] = config_of(json.loads((source / "config.json").read_text()))
        convert_hf_checkpoint(part, model_name="bench", dtype="float32")
        part.rename(made)
    return made


def config_of(config: dict[str, Any]) -> dict[str, Any]:
    """A Llama's config in LitGPT's words."""
    words, rope = config["vocab_size"], config.get("rope_parameters") or config
    return {
        "name": "bench", "hf_config": {"org": "bench", "name": "bench"},
        "block_size": config["max_position_embeddings"], "vocab_size": words, "padded_vocab_size": words,
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"], "n_embd": config["hidden_size"],
        "n_query_groups": config["num_key_value_heads"], "intermediate_size": config["intermediate_size"],
        "rotary_percentage": 1.0, "rope_base": int(rope.get("rope_theta") or 10000), "parallel_residual": False,
        "bias": False, "norm_class_name": "RMSNorm", "norm_eps": config["rms_norm_eps"], "mlp_class_name": "LLaMAMLP",
    }  # fmt: skip


def data_of(rows: list[dict[str, Any]], together: int) -> Any:
    """The rows as LitGPT's data module, in the given order."""
    import torch
    from litgpt.data import DataModule
    from litgpt.prompts import Default
    from torch.utils.data import DataLoader

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        made = common.padded([{"ids": r["input_ids"], "labels": r["labels"]} for r in batch], 0)
        lengths = torch.tensor([[len(r["input_ids"])] for r in batch])
        counts = {"raw": lengths, "raw_plus_prompt_template": lengths}
        return {"input_ids": made["input_ids"], "labels": made["labels"], "token_counts": counts}

    class Rows(DataModule):
        prompt_style = Default()

        def connect(self, *_: Any, **more: Any) -> None:
            pass

        def loader(self, of: list[dict[str, Any]]) -> Any:
            return DataLoader(
                [{"input_ids": r["ids"], "labels": r["labels"]} for r in of], batch_size=together, collate_fn=collate
            )  # fmt: skip

        def train_dataloader(self) -> Any:
            return self.loader(rows)

        def val_dataloader(self) -> Any:
            return self.loader(rows[:1])

    return Rows()


class Kept:
    """What is noted while it trains."""

    def __init__(self, passes: int) -> None:
        self.passes, self.began = passes, 0.0
        self.model: Any = None
        self.of_passes: list[Any] = []
        self.losses: list[float] = []
        self.ended: list[float] = []

    def hang_in_pretraining(self, module: Any, rates: list[float]) -> None:
        """Its pretraining asks for the rate before every pass, and saves after the last: that is when steps end."""
        kept, loss, save, start = self, module.chunked_cross_entropy, module.save_checkpoint, module.initialize_weights

        def rate(peak: float, number: int, *_: Any) -> float:
            if number == 0:
                kept.began = time.time()
                kept.of_passes.clear()  # those before were a trial of its evaluation
            elif number % kept.passes == 0:
                kept.step_ends()
            return peak * rates[number // kept.passes]

        def saved(*args: Any, **more: Any) -> None:
            kept.step_ends()
            module.save_hyperparameters = lambda *_: None
            save(*args, **more)

        def noted(*args: Any, **more: Any) -> Any:
            found = loss(*args, **more)
            kept.of_passes.append(found.detach())
            return found

        def started(fabric: Any, model: Any, **more: Any) -> None:
            kept.model = model
            start(fabric, model, **more)

        module.get_lr, module.save_checkpoint = rate, saved
        module.chunked_cross_entropy, module.initialize_weights = noted, started

    def step_ends(self) -> None:
        self.ended.append(time.time())
        self.losses.append(sum(float(loss) for loss in self.of_passes[-self.passes :]) / self.passes)

    def hang_in(self, module: Any, rates: list[float]) -> None:
        """Puts the job's rates, and what keeps time and losses, in LitGPT's module."""
        import torch

        kept, loss, mark = self, module.chunked_cross_entropy, module.mark_only_lora_as_trainable

        class Rates(torch.optim.lr_scheduler.LambdaLR):
            def step(self, *args: Any, **more: Any) -> None:
                super().step(*args, **more)
                if kept.began:  # the first is its own, when it is made
                    kept.step_ends()

        class Passes(module.CycleIterator):  # type: ignore[misc, name-defined]
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **more)
                kept.began = time.time()

        def noted(*args: Any, **more: Any) -> Any:
            found = loss(*args, **more)
            kept.of_passes.append(found.detach())
            return found

        def marked(model: Any, *args: Any, **more: Any) -> Any:
            kept.model = model
            return mark(model, *args, **more)

        module.get_lr_scheduler = lambda optimizer, **_: Rates(optimizer, lambda n: rates[min(n, len(rates) - 1)])
        module.CycleIterator, module.chunked_cross_entropy = Passes, noted
        module.mark_only_lora_as_trainable = marked
        # both read the command line, which is not LitGPT's here; the adapter itself is saved
        module.save_hyperparameters = module.merge_lora = lambda *_, **more: None


NEVER = 10**9


def optimizer_of(told: dict[str, Any]) -> dict[str, Any]:
    how = {"lr": told["rate"], "betas": told["betas"], "weight_decay": 0.0}
    return {"class_path": "torch.optim.AdamW", "init_args": how}


def finetune(told: dict[str, Any], rows: list[dict[str, Any]], together: int, kept: Kept) -> None:
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import lora

    kept.hang_in(lora, told["rates"])
    lora.setup(
        checkpoint(told), Path(told["out"]) / "run", "32-true", lora_r=told["method"]["r"],
        lora_alpha=told["method"]["alpha"], lora_dropout=0.0, lora_key=True, lora_projection=True, lora_mlp=True,
        data=data_of(rows, together), seed=told["seed"], optimizer=optimizer_of(told),
        train=TrainArgs(save_interval=NEVER, log_interval=1, global_batch_size=told["batch"], micro_batch_size=together,
                        lr_warmup_steps=1, epochs=1, max_steps=len(told["rates"])),
        eval=EvalArgs(interval=NEVER, max_new_tokens=1, max_iters=1, final_validation=False),
    )  # fmt: skip


def pretrain(told: dict[str, Any], rows: list[dict[str, Any]], together: int, kept: Kept) -> None:
    """Of rows of one length; the model is compiled, as LitGPT always does, in its first pass."""
    import torch
    from litgpt import Config, pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader

    length = len(rows[0]["ids"]) - 1
    assert all(len(row["ids"]) == length + 1 for row in rows), "LitGPT pretrains on rows of one length"

    class Rows(DataModule):
        def connect(self, *_: Any, **more: Any) -> None:
            pass

        def train_dataloader(self) -> Any:
            return DataLoader([torch.tensor(row["ids"]) for row in rows], batch_size=together)

        def val_dataloader(self) -> Any:
            return DataLoader([torch.tensor(rows[0]["ids"])], batch_size=1)

    kept.hang_in_pretraining(pretrain, told["rates"])
    made = checkpoint(told)
    config = json.loads((Path(told["model"]) / "config.json").read_text())
    pretrain.setup(
        "bench", Config(**config_of(config)), Path(told["out"]) / "run", "32-true", made, data=Rows(), devices=1,
        train=TrainArgs(save_interval=NEVER, log_interval=1, global_batch_size=told["batch"], micro_batch_size=together,
                        max_tokens=len(rows) * length, max_seq_length=length, max_norm=1.0, min_lr=0.0,
                        lr_warmup_steps=1, tie_embeddings=True),
        eval=EvalArgs(interval=NEVER, max_iters=1, final_validation=False), optimizer=optimizer_of(told),
        logger_name="csv", seed=told["seed"],
    )  # fmt: skip


def main() -> None:
    told = common.task()
    rows, batch = common.rows_of(told), told["batch"]
    together = min(told["setting"]["together"] or batch, batch)
    kept = Kept(batch // together)
    with contextlib.redirect_stdout(sys.stderr):
        (pretrain if told["kind"] == "pretrain" else finetune)(told, rows, together, kept)
    print(json.dumps(common.result(kept.losses, kept.began, kept.ended, rows, kept.model)))


if __name__ == "__main__":
    main()
