"""A training of `gpu.py`: the same rows and first weights by trivium, and by TRL with PEFT."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from gpu_parts import (
    BETA,
    RANK,
    SEED,
    WARM,
    Bench,
    Case,
    Skipped,
    documents,
    examples_of,
    made,
    pairs,
    rows_tokens,
    step_flop,
    sync,
    with_lora,
)


class Enough(Exception):
    """Measured for long enough."""


class Steps:
    """Seconds of steps; the first ``WARM`` are not counted. Raises Enough."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seconds, self.losses = bench, list[float](), list[float]()
        self.warm: list[float] = []

    def add(self, seconds: float, loss: float) -> None:
        self.losses.append(loss)
        (self.warm if len(self.warm) < WARM else self.seconds).append(seconds)
        if len(self.warm) == WARM and not self.seconds and self.bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if len(self.seconds) >= self.bench.most_steps or sum(self.seconds) > self.bench.seconds:
            raise Enough

    def report(self, case: Case, tokens: Callable[[int], tuple[int, int, int]], best: float | None) -> dict[str, Any]:
        """``tokens(step)``: places computed, keys seen, entries trained; ``best``: operations a second of the card."""
        if not self.seconds:
            raise Skipped("no step was finished")
        seconds = statistics.median(self.seconds)
        steps = range(WARM, WARM + len(self.seconds))
        sizes, bench = self.bench.shapes[case.model], self.bench
        flop = statistics.mean(step_flop(sizes, case.kind, *tokens(n)) for n in steps)
        of_rows = statistics.mean(sum(t for t, _ in rows_tokens(bench, case.kind, n)) for n in steps)
        peak = torch.cuda.max_memory_allocated() if bench.device == "cuda" else _resident()
        return {
            "part": "training", "name": case.name, **asdict(case), "line": bench.line, "lines": bench.lines,
            "steps": len(self.seconds), "seconds": seconds, "seconds_each": self.seconds, "seconds_warm": self.warm,
            "tokens_per_second": of_rows / seconds, "computed_per_second": tokens(WARM)[0] / seconds,
            "peak_bytes": peak, "flops": flop / seconds, "of_rate": flop / seconds / best if best else None,
            "losses": self.losses,
        }  # fmt: skip


def _resident() -> int:
    """This process's peak, which on a CPU is of all parts so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trained_by_trivium(bench: Bench, case: Case, best: float | None) -> dict[str, Any]:
    from trivium.forest import lay_out
    from trivium.objectives import objective
    from trivium.peft.targets import decoder_layers
    from trivium.stage_reference import as_parent
    from trivium.train.loop import StepLog, Task, train
    from trivium.train.optimizer import build_optimizers
    from trivium.train.recompute import recomputed
    from trivium.train.reference import UnderParent, no_reference

    model = with_lora(made(bench, case.model, bench.dtype), bench.dtype, case.nf4)
    layers = list(decoder_layers(model.hf).values())
    again = layers if case.recompute else []
    steps, seen = Steps(bench), dict[int, tuple[int, int, int]]()

    def batches(step: int) -> Iterator[Any]:
        forests = [lay_out(examples_of(bench, case.kind, step, n)) for n in range(bench.lines)]
        seen[step] = (
            sum(len(f.tokens) for f in forests),
            sum(int(f.position.sum()) + len(f.tokens) for f in forests),
            sum(len(f.source) for f in forests),
        )
        return (f.to(model.device) for f in forests)

    def after(log: StepLog) -> None:
        sync(bench)
        steps.add(log.seconds, log.loss)

    goal = objective({"loss": "next_token"} if case.kind == "sft" else {"loss": "dpo", "beta": BETA})
    task = Task(
        objective=goal,
        logprob=model.logprob,
        reference=UnderParent(model.logprob, lambda: as_parent(model, None)) if goal.needs_reference else no_reference,
        batches=batches,
        steps=WARM + bench.most_steps,
        rate=lambda n: 1.0,
        optimizers=build_optimizers(model.hf, set(), "adamw", 1e-4, 0.0),
        max_grad_norm=1.0,
    )
    with model.laid_out("forest"), recomputed(again, model.adapters), contextlib.suppress(Enough):
        if case.compiled:
            _compile(bench, layers)
        train(task, after)
    return steps.report(case, lambda n: seen[n], best)


def _compile(bench: Bench, layers: list[Any]) -> None:
    """Each layer by itself; FlexAttention is compiled as it is without this."""
    for layer in layers:
        layer.compile(dynamic=False, backend="eager" if bench.tiny else "inductor")


def trained_by_trl(bench: Bench, case: Case, best: float | None) -> dict[str, Any]:
    """TRL at its best: without recomputed layers where that fits; with Liger where it is installed."""
    for package in ("trl", "peft", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    liger = importlib.util.find_spec("liger_kernel") is not None
    tried = ""
    for recompute in (False, True):
        try:
            row = _by_trl(bench, case, recompute, liger, best)
            used = liger and bench.device == "cuda"
            notes = [trl_attention(bench), "with liger" if used else "without liger", *([tried] if tried else [])]
            return {**row, "recompute": recompute, "notes": notes}
        except torch.OutOfMemoryError as error:
            tried = f"without recomputed layers: {str(error).splitlines()[0][:120]}"
        free_all(bench)
    raise Skipped(f"out of memory with recomputed layers, too ({tried})")


def _by_trl(bench: Bench, case: Case, recompute: bool, liger: bool, best: float | None) -> dict[str, Any]:
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from peft import LoraConfig

    kind = "SFT" if case.kind == "sft" else "DPO"
    dpo = case.kind == "dpo"
    rows: list[dict[str, Any]] = []
    total = WARM + bench.most_steps
    for step in range(total):
        for line in range(bench.lines):
            if dpo:
                rows += [{f"{k}_ids": v.tolist() for k, v in row.items()} for row in pairs(bench, step, line)]
            else:
                rows += [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in documents(bench, step, line)]
    each = len(rows) // total // bench.lines
    steps = Steps(bench)

    class Clock(TrainerCallback):
        began = loss = 0.0

        def on_step_begin(self, *_: Any, **more: Any) -> None:
            sync(bench)
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            sync(bench)
            try:
                steps.add(time.perf_counter() - self.began, self.loss)
            except Enough:
                control.should_training_stop = True
            self.loss = 0.0

    clock = Clock()

    class Watched(getattr(trl, f"{kind}Trainer")):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **more: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *_: Any, **more: Any) -> Any:
            return dataset  # tokens as both tools have them

        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            clock.loss += loss.detach()
            return loss

    cuda = bench.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        lean = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if recompute else {}
        own = {"beta": BETA} if dpo else {"padding_free": case.unpadded}
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=folder, per_device_train_batch_size=each, gradient_accumulation_steps=bench.lines,
            max_steps=total, learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            seed=SEED, use_cpu=not cuda, bf16=cuda, gradient_checkpointing=recompute, **lean, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=cuda, use_liger_kernel=liger and cuda, max_length=None, optim="adamw_torch_fused",
            **own,
        )  # fmt: skip
        trainer = Watched(
            model=made(bench, case.model, bench.dtype, trl_attention(bench)),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=stand_in(),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def tokens(step: int) -> tuple[int, int, int]:
        own = rows_tokens(bench, case.kind, step)
        return sum(t for t, _ in own), sum(t * (t + 1) // 2 for t, _ in own), sum(k for _, k in own)

    steps.losses = [float(loss) for loss in steps.losses]
    return steps.report(case, tokens, best)


def trl_attention(bench: Bench) -> str:
    """The fastest there is for it."""
    flash = bench.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def stand_in() -> Any:
    """A tokenizer for a Trainer that is given tokens: it only has to have its special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), **special)


def free_all(bench: Bench) -> None:
    gc.collect()
    if bench.device == "cuda":
        with contextlib.suppress(RuntimeError):  # a card that has failed says so in every part
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
