"""One GPU in one call of under ten minutes: the same numbers as float32, then speed and memory beside TRL.

    python benchmarks/gpu.py --out gpu.json [--seconds 540] [--only equality,rate,8B] [--line 4096]
    python benchmarks/gpu.py --out gpu.json --device cpu --tiny        # the whole script on shapes that say nothing

It needs torch, transformers and trivium (beside this file, or installed); what else is missing (bitsandbytes, trl,
peft, liger_kernel, flash_attn) is a row with the reason. Nothing is downloaded: models are made of configs, with random
weights, on the device.

    equality    a small Llama shape, a packed and a shared-prefix batch: log-probabilities and LoRA gradients of the
                line (FlexAttention on CUDA) in bfloat16 and float32, against the unmodified model on one row after
                the other in float32, of the same weights; and, to judge by, the unmodified model in bfloat16
    rate        products in the card's bfloat16: the most that was measured is what shares are of
    1B, 8B      LoRA r=16 on all linear layers, SFT on packed lines and DPO on pairs with a shared prompt, in turns:
                trivium, plainly, with recomputed layers, with each layer compiled, on an NF4 base; and TRL with PEFT

SFT is documents of random lengths that fill lines of ``--line`` tokens, all of them trained, each document a row of its
own for TRL: padded, and without padding (`padding_free`); with FlashAttention where it is installed, else SDPA, which
takes a mask of the line's length squared for it. DPO is pairs of equal lengths, half of them prompt, which is the best
case of padding; its reference is computed in every step. Both tools are given the same rows, and that their first
losses agree is checked; trivium needs fewer tokens for the pairs, so speed is in tokens of the rows, each answer with
its prompt. TRL recomputes layers only where it does not fit otherwise.

The share of the rate is of model arithmetic alone: for each token that a tool has to compute (its own, without what it
fills up, and without what it recomputes), 2 N forward and 2 N for the gradient of what a layer reads, N the weights of
the linear layers (those of the lowest layer, too, whose input needs none); LoRA's own; attention's scores and values,
causal; the head where something is trained. What is compiled, is so in the steps before the measured ones.

A part that fails or takes too long is a row with its error, and the others go on. The file is written after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if importlib.util.find_spec("trivium") is None:
    sys.path.insert(0, str(HERE.parent / "src"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402
from gpu_parts import RANK, Bench, Case, Skipped, equality, rate  # noqa: E402
from gpu_training import free_all, trained_by_trivium, trained_by_trl  # noqa: E402

LOSS_APART = 0.01  # of first losses, relative


class OutOfTime(BaseException):
    """Not an Exception, which a library might take for its own."""


CASES = [  # what matters most comes first: time may run out
    Case("8B", "sft"),
    Case("8B", "sft", "TRL"),
    Case("8B", "dpo"),
    Case("8B", "dpo", "TRL"),
    Case("1B", "sft"),
    Case("1B", "sft", "TRL"),
    Case("1B", "dpo"),
    Case("1B", "dpo", "TRL"),
    Case("8B", "sft", recompute=True),
    Case("8B", "sft", nf4=True),
    Case("8B", "sft", "TRL", unpadded=True),
    Case("1B", "sft", compiled=True),
    Case("8B", "sft", compiled=True),
    Case("1B", "sft", "TRL", unpadded=True),
    Case("1B", "dpo", recompute=True),
    Case("8B", "dpo", recompute=True),
]


class Results:
    """Rows so far, written after each of them."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self.file, self.about, self.rows = file, about, list[dict[str, Any]]()
        self.began = time.perf_counter()

    def add(self, row: dict[str, Any]) -> None:
        if row["part"] == "training":
            alike = [r for r in self.rows if r["part"] == "training" and self._alike(r) == self._alike(row)]
            if alike:  # all of them start as the same model on the same rows
                row["loss_apart"] = abs(row["losses"][0] / alike[0]["losses"][0] - 1)
        self.rows.append(row)
        print(line_of(row), flush=True)
        self.write()

    def write(self, **more: Any) -> None:
        whole = {**self.about, "seconds": time.perf_counter() - self.began, "rows": self.rows, **more}
        temporary = self.file.with_name(self.file.name + ".partial")
        temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.file)

    def _alike(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["kind"], row["nf4"]

    def compared(self) -> list[str]:
        """The fastest of trivium beside the fastest of TRL, for each model and kind."""
        lines = []
        trained = [row for row in self.rows if row["part"] == "training" and not row["nf4"]]
        for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in trained):
            by_tool = {
                tool: max(
                    (r for r in trained if (r["model"], r["kind"], r["tool"]) == (model, kind, tool)),
                    key=lambda r: r["tokens_per_second"],
                    default=None,
                )
                for tool in ("trivium", "TRL")
            }
            ours, theirs = by_tool["trivium"], by_tool["TRL"]
            if ours and theirs:
                ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
                memory = ours["peak_bytes"] / theirs["peak_bytes"]
                beside = f"{ours['name']} : {theirs['name']}"
                lines.append(f"{beside:<50} {ratio:.2f} times the tokens/s, {memory:.2f} times the memory")
        return lines

    @property
    def best(self) -> float | None:
        return max((row["flops"] for row in self.rows if row["part"] == "rate" and "flops" in row), default=None)


def guarded(results: Results, bench: Bench, name: str, seconds: float, run: Callable[[], Iterator[Any]]) -> None:
    """The rows of a part, or why there are none; the next part begins with the card's memory free."""
    began = time.perf_counter()
    try:
        with within(seconds):
            for row in run():
                results.add({**row, "part_seconds": time.perf_counter() - began})
    except Skipped as error:
        results.add({"part": "skipped", "name": name, "reason": str(error)})
    except (OutOfTime, Exception) as error:
        kind = "took too long" if isinstance(error, OutOfTime) else type(error).__name__
        said = str(error).strip().splitlines()
        reason = f"{kind}: {said[0][:300]}" if said else f"{kind} ({seconds:.0f} s)"
        results.add({"part": "failed", "name": name, "reason": reason, "traceback": traceback.format_exc()[-4000:]})
    free_all(bench)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises OutOfTime within the block, as soon as Python runs after that time."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"{row['name']:<42}"
    if "reason" in row:
        return f"{name} {row['part']}: {row['reason']}"
    if row["part"] == "equality":
        return (
            f"{name} log-probabilities within {row['logprob_most']:.1e} (mean {row['logprob_mean']:.1e}), gradients "
            f"{row['gradient']:.1e}{'' if row['holds'] else '  TOO FAR'}"
        )
    if row["part"] == "rate":
        return f"{name} {row['flops'] / 1e12:,.2f} TFLOP/s"
    share = f"{row['of_rate']:>6.1%} of the rate" if row["of_rate"] is not None else ""
    notes = list(row.get("notes", []))
    if row.get("loss_apart", 0.0) > LOSS_APART:
        notes.append(f"ITS FIRST LOSS DIFFERS by {row['loss_apart']:.1%}")
    speed, memory = f"{row['tokens_per_second']:>9,.0f} tokens/s", f"{row['peak_bytes'] / 1e9:>6.2f} GB"
    return f"{name} {speed}  {memory}  {share}  {'; '.join(notes)}".rstrip()


def about(bench: Bench) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "transformers", "triton", "peft", "trl", "bitsandbytes", "liger_kernel", "flash_attn"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    card = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    return {"card": card, **asdict(bench), "rank": RANK, "versions": versions,
            "date": time.strftime("%Y-%m-%d"), "shapes": bench.shapes}  # fmt: skip


def no_silent_fallback() -> None:
    """Shapes and models in one process are more than a compiled function takes by default; beyond what it takes it runs
    uncompiled, which is to be an error here and not a slow row."""
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = 64
    for name, value in (("fail_on_recompile_limit_hit", True), ("suppress_errors", False)):
        if hasattr(config, name):
            setattr(config, name, value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, a few steps: to try the script")
    parser.add_argument("--seconds", type=float, default=540.0, help="of the whole call")
    parser.add_argument("--only", default="", help="parts, by the beginnings of their names, with commas between")
    parser.add_argument("--line", type=int, help="tokens of a line; left out: 4096")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu --tiny tries the script", file=sys.stderr)
        return 2
    line = asked.line or (128 if asked.tiny else 4096)
    few = asked.tiny or asked.device == "cpu"
    bench = Bench(asked.device, asked.tiny, line, 2 if few else 4, 1.0 if few else 8.0, 1 if few else 10)
    no_silent_fallback()
    results = Results(asked.out, about(bench))
    began = time.perf_counter()

    def end() -> None:  # a part that hangs in the driver hears no alarm
        results.write(ended="the time was over")
        os._exit(1)

    watch = threading.Timer(asked.seconds + 15, end)
    watch.daemon = True
    watch.start()

    def training(case: Case) -> tuple[str, float, Callable[[], Iterator[Any]]]:
        run = trained_by_trivium if case.tool == "trivium" else trained_by_trl
        return case.name, 120 if case.compiled else 90, lambda: iter([run(bench, case, results.best)])

    parts = [
        ("rate", 30, lambda: rate(bench)),
        ("equality", 120, lambda: equality(bench)),
        *(training(case) for case in CASES if not asked.tiny or case.model == "8B" or case.name == "1B sft trivium"),
    ]
    wanted = [name for name in asked.only.split(",") if name]
    for name, most, run in parts:
        if wanted and not name.startswith(tuple(wanted)):
            continue
        left = asked.seconds - (time.perf_counter() - began)
        if left < 1 or (not few and left < 15):
            results.add({"part": "skipped", "name": name, "reason": "the time of the whole call is used up"})
            continue
        guarded(results, bench, name, min(most, left), run)
    watch.cancel()
    results.write(ended="all parts", compared=results.compared())
    print("", *results.compared(), "", asked.out, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
