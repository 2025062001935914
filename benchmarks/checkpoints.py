"""What checkpoints cost: the same training with one every so many steps, written beside it, at once, and with none.

    python benchmarks/checkpoints.py [--width 256] [--steps 20] [--every 5] [--runs 3]

Everything runs in one process, the sides taking turns; what counts are the ratios. The seconds are those of the whole
loop, saves included. The model is of random weights and trained in full: 16 bytes a parameter are written.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import trivium
from trivium import stage_saving, stage_training
from trivium.files import read_json
from trivium.train.loop import train

SIDES = ("none", "beside", "at once")


def loop_seconds(recipe: dict[str, Any], out: Path, side: str) -> tuple[float, dict[str, Any]]:
    """Seconds from the first step to the last save, and what the stage's record says of its checkpoints."""
    took = [0.0]

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        train(*arguments)
        took[0] = time.perf_counter() - started

    due, beside, loop = stage_saving.Saving.due, stage_saving.BESIDE, stage_training.train
    stage_training.train = timed
    if side == "none":
        stage_saving.Saving.due = lambda self, done: False  # type: ignore[method-assign]
    if side == "at once":
        stage_saving.BESIDE = 0.0
    try:
        trivium.run(recipe, out)
    finally:
        stage_saving.Saving.due, stage_saving.BESIDE, stage_training.train = due, beside, loop  # type: ignore[method-assign]
    record = read_json(out / "x" / "trivium.json")
    return took[0], record["events"]["checkpoints"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("steps", 20), ("every", 5), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        words = [" ".join(rng.choice(["red", "cat", "sat", "tree", "old"]) for _ in range(100)) for _ in range(400)]
        (here / "text.txt").write_text("\n".join(words), encoding="utf-8")
        model = {"architecture": "llama", "hidden_size": asked.width, "num_hidden_layers": 6,
                 "num_attention_heads": 8, "vocab_size": 400}  # fmt: skip
        stage = {"name": "x", "stage": "pretrain", "data": str(here / "text.txt"), "max_steps": asked.steps,
                 "batch_size": 8, "max_length": 128, "eval_data": 0, "save_every": asked.every}  # fmt: skip
        recipe = {"name": "cost", "model": model, "prompts": [], "stages": [stage]}
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        told: dict[str, Any] = {}
        for number in range(asked.runs):
            for side in SIDES:
                took, told[side] = loop_seconds(recipe, here / f"{side}{number}".replace(" ", ""), side)
                seconds[side].append(took)
    print(f"{asked.steps} steps, a checkpoint of {told['beside']['bytes'] / 1e6:.0f} MB every {asked.every}:")
    for side in SIDES:
        median = statistics.median(seconds[side])
        ratios = [a / b for a, b in zip(seconds[side], seconds["none"], strict=True)]
        print(f"  {side:8} {median:6.1f} s, {statistics.median(ratios):.3f} of none; the training waited "
              f"{told[side]['seconds']:.2f} s, a thread wrote {told[side]['seconds_beside']:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
