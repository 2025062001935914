"""What `trivium plan` says against what a run takes: the demo, the TinyStories recipe, SmolLM2 by four methods.

    python benchmarks/planned.py [--jobs demo,tinystories,full,lora,bottleneck,qlora] [--out planned.json]

Each recipe is planned and then run, in processes of their own. Aims: memory within 15%, time within 20%. The rows are
those of ../shared/data; the model of the last four comes from PyPI (environments.py). Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from environments import ROOT, smollm2

DATA = ROOT.parent / "shared" / "data"
MEMORY, TIME = 0.15, 0.20  # how far a plan may be off
SHORT = {"batch_size": 4, "eval_data": 0.03, "max_length": 1024, "on_overflow": "drop"}
METHODS: dict[str, Any] = {
    "full": "full",
    "lora": {"name": "lora", "r": 16},
    "bottleneck": {"name": "bottleneck", "r": 64},
    "qlora": {"name": "qlora", "r": 16},
}


def recipe_of(job: str, work: Path) -> tuple[Path, list[str]]:
    """A recipe's file, and what else a command is told."""
    if job == "demo":
        from trivium.demo import world

        (work / "data").mkdir()
        world.write(work / "data", 0, pairs=64)
        text = (ROOT / "src/trivium/demo/recipe.yaml").read_text(encoding="utf-8")
        (work / "recipe.yaml").write_text(text, encoding="utf-8")
        return work / "recipe.yaml", ["--until", "sft_bottleneck"]
    if job == "tinystories":
        files = {"base": "pretrain", "chat": "sft", "aligned": "pref"}
        steps = {"base": 100, "chat": 60, "aligned": 40}
        told = [f"stages.{stage}.data={DATA}/tinystories/{name}.jsonl.gz" for stage, name in files.items()]
        told += [f"stages.{stage}.max_steps={n}" for stage, n in steps.items()]
        told += [f"stages.{stage}.epochs=null" for stage in ("chat", "aligned")]
        return ROOT / "recipes/tinystories.yaml", [word for one in told for word in ("--set", one)]
    stage = {"name": "chat", "stage": "sft", "data": f"{DATA}/sft/dolly2k.jsonl.gz", "method": METHODS[job],
             "max_steps": 24, **SHORT}  # fmt: skip
    stages = [stage]
    if job == "lora":
        pairs = {"data": f"{DATA}/pref/hh_helpful-base.jsonl.gz", "max_steps": 12, **SHORT}
        stages.append({"name": "aligned", "stage": "preference", "from": "chat", **pairs})
    value = {"name": job, "model": str(smollm2()), "prompts": [], "stages": stages}
    (work / "recipe.yaml").write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return work / "recipe.yaml", []


def measured(job: str) -> list[dict[str, Any]]:
    """The stages of one recipe: what was planned, and what came."""
    with tempfile.TemporaryDirectory() as kept:
        work = Path(kept)
        recipe, more = recipe_of(job, work)
        trivium = [sys.executable, "-c", "from trivium.cli.main import main; main()"]
        for command in ("plan", "run"):
            told = [*trivium, command, str(recipe), "--out", str(work / "out"), *more]
            subprocess.run(told, check=True, env={**os.environ, "TRIVIUM_CACHE": str(work / "cache")})
        summary = json.loads((work / "out" / "summary.json").read_text(encoding="utf-8"))
        plan = json.loads((work / "out" / "plan.json").read_text(encoding="utf-8"))
    found = []
    for stage, planned in zip(summary["stages"], plan["stages"], strict=True):
        found.append({
            "job": job, "stage": stage["name"], "method": stage["method"], "steps": planned["steps"],
            "planned_seconds": stage["planned"]["seconds"], "seconds": stage["seconds"] + stage["eval_seconds"],
            "planned_bytes": planned["memory"]["peak"], "bytes": stage["peak_memory_bytes"],
            "reckoned_bytes": planned["tried"]["reckoned_bytes"],
        })  # fmt: skip
    return found


def told(found: list[dict[str, Any]]) -> str:
    """A table of it."""
    head = (
        "recipe",
        "stage",
        "method",
        "time planned",
        "taken",
        "off",
        "memory planned",
        "held",
        "off",
        "from sizes alone",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * 7]
    for one in found:
        time = one["planned_seconds"] / one["seconds"] - 1
        memory, reckoned = one["planned_bytes"] / one["bytes"] - 1, one["reckoned_bytes"] / one["bytes"] - 1
        cells = (
            one["job"], one["stage"], one["method"], f"{one['planned_seconds']:.1f} s", f"{one['seconds']:.1f} s",
            f"{time:+.0%}{' **missed**' if abs(time) > TIME else ''}", f"{one['planned_bytes'] / 1e9:.2f} GB",
            f"{one['bytes'] / 1e9:.2f} GB", f"{memory:+.0%}{' **missed**' if abs(memory) > MEMORY else ''}",
            f"{reckoned:+.0%}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(["demo", "tinystories", *METHODS]))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = [one for job in asked.jobs.split(",") for one in measured(job)]
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(told(found))


if __name__ == "__main__":
    main()
