"""Preference tuning in trivium and in TRL: the same rows and settings, each training in a process of its own.

    python benchmarks/preference.py MODEL ROWS [--rows 64] [--held-out 64] [--losses dpo,ipo,...] [--against trl]
                                    [--threads 2] [--max-length N] [--lr 1e-4] [--batch-size 8] [--epochs 1]
                                    [--runs 1] [--out results.json]

MODEL is a folder or hub id; ROWS a file of pairs in any format that trivium reads. Both tools read two files made of
its first rows whose pair fits and whose prompt is new: {"prompt": messages, "chosen": [answer], "rejected": [answer]}.
All train LoRA (r 16, alpha 32, all linear layers, no dropout) in float32 with AdamW, at the same rate in each step, and
write no checkpoints; their orders of rows and first adapters differ, so that held-out numbers agree in size only.

TRL runs twice: as it comes, 4 pairs a pass, and tuned for a CPU, one pair a pass (less is padded) with the reference
computed before; never with gradient checkpointing, though that is its default. Its tokenizer gets the chat template
that trivium trains this model with (a plain one where it has none), but ended at the answer's stop token: by itself TRL
also trains what the template puts behind it, a line end, say. Whether both have the same tokens is printed.

Seconds are those of the training loop and the reference, without loading, preparing, evaluating and saving. Memory is
the process's peak once the model is loaded, evaluations included; TRL's are one pair a pass, so that its averages are
over pairs, and the file also has its peak right after the training. Before the first step of a loss with a reference
all pairs are ties, which trivium counts as half right and TRL as wrong. A loss that a tool does not know is a row with
its error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import pairs_of
from shared import NEVER, SEED, WARMUP, Failed, digest, in_turns, run_alone

LOSSES = "dpo,ipo,kto,orpo,simpo,reward"
TRIVIUM = "from trivium.cli.main import main; main()"
WAYS = {"TRL": False, "TRL tuned": True}


# --- the rows, for both


def encoded(template: Any, pair: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of both sides as trivium trains them: all that is trained is the answer. Raises RowError."""
    laid = [template.lay_out_answer(pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
    sequences = [template.weigh(r, t) for r, t in zip(laid, template.tokenize([r.text for r in laid]), strict=True)]
    starts = [int(s.weights.argmax()) for s in sequences]
    return [(s.tokens[:n].tolist(), s.tokens[s.weights > 0].tolist()) for s, n in zip(sequences, starts, strict=True)]


def counted(rows: list[list[tuple[list[int], list[int]]]]) -> dict[str, Any]:
    """What tells whether two tools train the same tokens."""
    sides = [side for row in rows for side in row]
    return {
        "answer_tokens": sum(len(answer) for _, answer in sides),
        "tokens": sum(len(prompt) + len(answer) for prompt, answer in sides),
        "sha256": digest(sides),
    }


def ending_at_the_stop(template: Any) -> str:
    """The chat template with nothing behind an answer's stop token, which it gets where the template puts none."""
    tail, more = json.dumps(template.ending[len(template.stop_text) :]), json.dumps(template.appended)
    ended = "not add_generation_prompt and messages[-1]['role'] == 'assistant'"
    source = template.source.removesuffix("\n")
    return "{% set whole %}" + source + "{% endset %}" + (
        "{% if " + ended + " %}{{ whole.removesuffix(" + tail + ") + " + more + " }}{% else %}{{ whole }}{% endif %}"
    )  # fmt: skip


def write_rows(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both files and TRL's template; what they hold, in trivium's tokens."""
    from trivium.data.formats import RowError
    from trivium.data.rows import good_rows
    from trivium.data.templates import chat_template
    from trivium.folder import reading_of

    tokenizer, context = reading_of(asked.model)
    template = chat_template(tokenizer)
    longest = asked.max_length or context or math.inf
    rows: list[str] = []
    tokens: list[list[tuple[list[int], list[int]]]] = []
    seen: set[str] = set()
    for pair in pairs_of(good_rows([Path(asked.data)])):
        if len(rows) == asked.rows + asked.held_out:
            break
        try:
            sides = encoded(template, pair)
        except RowError:
            continue
        said = json.dumps(pair["prompt"])
        if said not in seen and max(len(p) + len(a) for p, a in sides) < longest:  # one less: a line end may follow
            seen.add(said)
            rows.append(json.dumps(pair, ensure_ascii=False) + "\n")
            tokens.append(sides)
    if len(rows) < asked.rows + asked.held_out:
        sys.exit(f"only {len(rows)} usable pairs in {asked.data}: lower --rows or --held-out")
    (folder / "train.jsonl").write_text("".join(rows[: asked.rows]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("".join(rows[asked.rows :]), encoding="utf-8")
    (folder / "template.jinja").write_text(ending_at_the_stop(template), encoding="utf-8")
    return {"train": counted(tokens[: asked.rows]), "held_out": counted(tokens[asked.rows :])}


# --- trivium


def ours(asked: argparse.Namespace, folder: Path, loss: str) -> dict[str, Any]:
    """The recipe of one stage, carried out."""
    stage = {
        "name": loss, "data": str(folder / "train.jsonl"), "eval_data": str(folder / "held_out.jsonl"),
        **({"stage": "reward"} if loss == "reward" else {"stage": "preference", "loss": loss}),
        "method": {"name": "lora", "r": 16, "alpha": 32}, "batch_size": asked.batch_size, "epochs": asked.epochs,
        "learning_rate": asked.lr, "schedule": "linear", "warmup_ratio": WARMUP, "weight_decay": 0.0,
        "device": "cpu", "dtype": "float32", "save_every": NEVER, "eval_every": NEVER,
        **({"max_length": asked.max_length} if asked.max_length else {}),
    }  # fmt: skip
    recipe = {"name": "preference", "model": asked.model, "seed": SEED, "prompts": [], "stages": [stage]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    out = Path(tempfile.mkdtemp(dir=folder))
    run_alone([sys.executable, "-c", TRIVIUM, "run", str(folder / "recipe.yaml"), "--out", str(out)],
              asked.threads, folder / "cache")  # fmt: skip
    told = json.loads((out / "summary.json").read_text(encoding="utf-8"))["stages"][0]
    metrics = told["metrics"]
    return {
        "seconds": told["seconds"],  # the reference is in it
        **{f"{name}_seconds": told[f"{name}_seconds"] for name in ("reference", "setup", "eval")},
        "peak_bytes": told["peak_memory_bytes"],
        **{k: [metrics.get(f"{when}_{k}") for when in ("before", "after")] for k in ("accuracy", "margin")},
        "trained_parameters": told["trained_parameters"],
        "trained_tokens": told["trained_tokens"],
        "tokens": told["tokens"],  # a prompt counts once for both answers
    }


# --- TRL, in a process of this file


def dpo(common: dict[str, Any], tuned: bool) -> tuple[type, Any]:
    """DPO's trainer, which keeps count of the seconds that a reference computed before takes, and its settings."""
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        reference_seconds = 0.0

        def _precompute_ref_logps(self, dataset: Any, name: str, *rest: Any, **more: Any) -> Any:
            started = time.perf_counter()
            done = super()._precompute_ref_logps(dataset, name, *rest, **more)
            self.reference_seconds += (time.perf_counter() - started) * (name == "train")
            return done

    return Timed, DPOConfig(**common, beta=0.1, precompute_ref_log_probs=tuned)


# Another loss is a line here: what takes the common settings, and whether it is tuned, and gives a trainer and its own
TRAINERS: dict[str, Callable[[dict[str, Any], bool], tuple[type, Any]]] = {"dpo": dpo}


def settings(asked: argparse.Namespace, out: str, tuned: bool) -> dict[str, Any]:
    from trivium.train.optimizer import BETAS

    together = 1 if tuned else math.gcd(4, asked.batch_size)  # 4 pairs a pass, or what of them divides a step
    return {
        "output_dir": out, "per_device_train_batch_size": together, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": asked.batch_size // together, "num_train_epochs": asked.epochs,
        "max_length": asked.max_length, "learning_rate": asked.lr, "weight_decay": 0.0, "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1], "max_grad_norm": 1.0, "seed": SEED, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


def trainer_of(asked: argparse.Namespace, folder: Path, loss: str, tuned: bool, model: Any) -> Any:
    """TRL's trainer with the rate that trivium has at every step: the Trainer's own warm-up begins with a step at 0."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from peft import LoraConfig
    from trivium.train.schedule import factor

    rows = {n: Dataset.from_list([json.loads(line) for line in (folder / f"{n}.jsonl").open(encoding="utf-8")])
            for n in ("train", "held_out")}  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokenizer.chat_template = (folder / "template.jinja").read_text(encoding="utf-8")
    kind, config = TRAINERS[loss](settings(asked, tempfile.mkdtemp(dir=folder), tuned), tuned)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = kind(model=model, args=config, train_dataset=rows["train"], eval_dataset=rows["held_out"],
                   processing_class=tokenizer, peft_config=lora)  # fmt: skip
    steps = math.ceil(asked.epochs * math.ceil(len(rows["train"]) / asked.batch_size))
    trainer.create_optimizer()
    course = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda n: factor(n, steps, "linear", WARMUP))
    trainer.lr_scheduler = course
    return trainer


def tokens_of(trainer: Any) -> dict[str, Any]:
    """What TRL has made of the rows."""
    data = {"train": trainer.train_dataset, "held_out": trainer.eval_dataset}
    sides = ("chosen", "rejected")
    return {n: counted([[(r["prompt_ids"], r[f"{s}_ids"]) for s in sides] for r in rows]) for n, rows in data.items()}


def theirs(asked: argparse.Namespace, folder: Path, loss: str, tuned: bool) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    from trivium.train.machine import PeakMemory

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **more: Any) -> None:
            self.started = time.perf_counter()

        def on_train_end(self, *_: Any, **more: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    peak, clock = PeakMemory("cpu"), Clock()
    trainer = trainer_of(asked, folder, loss, tuned, model)
    trainer.add_callback(clock)
    reference = trainer.reference_seconds
    before = trainer.evaluate()
    trainer.train()
    trained = peak.read()
    after = trainer.evaluate()
    tokens = tokens_of(trainer)
    names = {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    return {
        "seconds": clock.seconds + reference,
        "reference_seconds": reference,
        "peak_bytes": peak.read(),
        "peak_training_bytes": trained,
        **{key: [found.get(name) for found in (before, after)] for key, name in names.items()},
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "trained_tokens": round(tokens["train"]["answer_tokens"] * asked.epochs),
        "tokens": round(tokens["train"]["tokens"] * asked.epochs),  # without padding
        "steps": trainer.state.global_step,
        "data": tokens,
    }


# --- one after the other


def in_process(asked: argparse.Namespace, folder: Path, loss: str, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, asked.model, str(folder), "--losses", loss, "--side", way]
    for name in ("lr", "batch_size", "epochs", "max_length"):
        if (value := getattr(asked, name)) is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    return dict(json.loads(run_alone(command, asked.threads, folder / "cache").printed.splitlines()[-1]))


def measured(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A result for each tool and loss; the seconds are the medians of its runs, every other round the other way."""
    losses = asked.losses.split(",")
    wanted = [("trivium", loss) for loss in losses]
    if asked.against == "trl":
        wanted += [(way, loss) for loss in losses if loss in TRAINERS for way in WAYS]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {one: [] for one in wanted}
    for _, (tool, loss) in in_turns(wanted, asked.runs):
        started = time.perf_counter()
        try:
            one = ours(asked, folder, loss) if tool == "trivium" else in_process(asked, folder, loss, tool)
        except Failed as error:
            one = {"error": str(error)}
        found[tool, loss].append(one | {"wall_seconds": time.perf_counter() - started})
    results = []
    for (tool, loss), runs in found.items():
        good = [one for one in runs if "error" not in one]
        one = {"tool": tool, "loss": loss, **(good or runs)[-1]}
        if good:
            one["runs"] = [run["seconds"] for run in good]
            one["seconds"] = statistics.median(one["runs"])
            one["peak_bytes"] = max(run["peak_bytes"] for run in good)
            one["pairs_per_second"] = asked.rows * asked.epochs / one["seconds"]
        results.append(one)
    return results


def show(results: list[dict[str, Any]], data: dict[str, Any], epochs: float) -> None:
    head = ("seconds", "ratio", "peak MB", "trained", "accuracy", "margin", "pairs/s")
    widths = (8, 6, 8, 9, 13, 9, 8)
    print(f"{'tool':<10} {'loss':<7}", *(f"{name:>{w}}" for name, w in zip(head, widths, strict=True)))
    bases = [r.get("seconds") for r in results if (r["tool"], r["loss"]) == ("trivium", "dpo")]
    base = bases[0] if bases else None
    for r in results:
        if "error" in r:
            print(f"{r['tool']:<10} {r['loss']:<7} {r['error'][:160]}")
            continue
        before, after = ("-" if v is None else f"{v:.1%}" for v in r["accuracy"])
        margin = "-" if r["margin"][1] is None else f"{r['margin'][1]:.4f}"
        told = (f"{r['seconds']:.2f}", f"{r['seconds'] / base:.2f}" if base else "-", f"{r['peak_bytes'] / 2**20:,.0f}",
                f"{r['trained_tokens']:,}", f"{before}→{after}", margin, f"{r['pairs_per_second']:.2f}")  # fmt: skip
        print(f"{r['tool']:<10} {r['loss']:<7}", *(f"{text:>{w}}" for text, w in zip(told, widths, strict=True)))
    answers = data["train"]["answer_tokens"] * epochs
    print(f"\n{answers:,.0f} answer tokens to train; ratio: to trivium's dpo")
    for r in results:
        if "data" in r:
            same = all(r["data"][n]["sha256"] == data[n]["sha256"] for n in data)
            whose = "the tokens of trivium" if same else "OTHER TOKENS than trivium"
            print(f"{r['tool']} {r['loss']}: {whose}, of rows trained on and held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", metavar="rows")
    parser.add_argument("--losses", default=LOSSES)
    parser.add_argument("--against", choices=("trl", "none"), default="trl")
    for name, value in (("rows", 64), ("held-out", 64), ("threads", 2), ("batch-size", 8), ("runs", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--max-length", type=int, help="left out: the model's context")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--side", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if Path(asked.model).exists():
        asked.model = str(Path(asked.model).resolve())
    if asked.side:
        print(json.dumps(theirs(asked, Path(asked.data), asked.losses, WAYS[asked.side])))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(asked, Path(folder))
        results = measured(asked, Path(folder))
    show(results, data, asked.epochs)
    if asked.out:
        told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(asked).items() if k not in ("side", "out")}
        asked.out.write_text(json.dumps({"settings": told, "data": data, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
