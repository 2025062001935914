"""What a step of each method costs, against LoRA and against PEFT's version of it: seconds and memory.

    python benchmarks/methods.py MODEL [--methods lora,dora,qlora,...] [--tokens 512] [--steps 4] [--threads 1]

One step is forward and backward over four rows packed on a line, half of their tokens trained; PEFT gets the same rows
as a padded batch, its logits for all tokens, and its loss (which is how it is used). Each side runs in a process of
its own, the sides taking turns; what counts are the ratios. Memory is the process's peak during the steps, loading left
out; the base is held as the method holds it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

METHODS = (
    "lora,dora,pissa,vera,qlora,houlsby,pfeiffer,parallel,compacter,ia3,prompt,prefix,bitfit,layer_norms,top_layers"
)
THEIRS = ("lora", "dora", "vera", "ia3", "prompt", "prefix")


def rows(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 500, (4, tokens // 4))


def measured(step: Any, steps: int) -> dict[str, Any]:
    from trivium.train.machine import PeakMemory

    step()  # the first one makes what stays
    gc.collect()
    peak = PeakMemory("cpu")
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "peak": peak.read()}


def ours(source: str, method: str, tokens: int, steps: int) -> dict[str, Any]:
    from trivium.folder import attach, open_folder
    from trivium.forest import Example, TokenSequence, lay_out
    from trivium.peft.settings import settings_of

    model = open_folder(source).model
    attach(model, settings_of(method), seed=0)
    weights = (np.arange(tokens // 4) >= tokens // 8).astype(np.float32)
    forest = lay_out([Example((TokenSequence(row, weights),)) for row in rows(tokens)])
    with model.laid_out("forest"):
        return measured(lambda: model.logprob(forest).sum().backward(), steps)


def theirs(source: str, method: str, tokens: int, steps: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    import peft

    linear = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    tuned = {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}
    down = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    config = {
        "lora": lambda: peft.LoraConfig(r=16, lora_alpha=32, **linear),
        "dora": lambda: peft.LoraConfig(r=16, lora_alpha=32, use_dora=True, **linear),
        "vera": lambda: peft.VeraConfig(r=256, **linear),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", **down),
        "prompt": lambda: peft.PromptTuningConfig(**tuned),
        "prefix": lambda: peft.PrefixTuningConfig(**tuned),
    }[method]()
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), config).train()
    ids = torch.from_numpy(rows(tokens))
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] // 2, -100)
    mask = torch.ones_like(ids)
    return measured(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward(), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--methods", default=METHODS)
    for name, value in (("tokens", 512), ("steps", 4), ("threads", 1), ("runs", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.side:
        print(json.dumps(globals()[asked.side](asked.model, asked.methods, asked.tokens, asked.steps)))
        return
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    wanted = [(s, m) for m in asked.methods.split(",") for s in ("ours", "theirs") if s == "ours" or m in THEIRS]
    for side, method in wanted * asked.runs:
        own = [asked.model, "--methods", method, "--side", side]
        own += [f"--{name}={getattr(asked, name)}" for name in ("tokens", "steps", "threads")]
        done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=True)
        found.setdefault((side, method), []).append(json.loads(done.stdout.splitlines()[-1]))
    head = ("s a step", "x lora", "peak MB", "x lora", "PEFT s", "ratio", "PEFT MB")
    print(f"{'method':<12}", *(f"{name:>8}" for name in head))
    told = {key: (statistics.median(s for r in runs for s in r["seconds"]), max(r["peak"] for r in runs) / 2**20)
            for key, runs in found.items()}  # fmt: skip
    base = told.get(("ours", "lora"), next(iter(told.values())))
    for method in asked.methods.split(","):
        seconds, peak = told["ours", method]
        line = f"{method:<12} {seconds:8.2f} {seconds / base[0]:8.2f} {peak:8,.0f} {peak / base[1]:8.2f}"
        if (other := told.get(("theirs", method))) is not None:
            line += f" {other[0]:8.2f} {other[0] / seconds:8.2f} {other[1]:8,.0f}"
        print(line)


if __name__ == "__main__":
    main()
