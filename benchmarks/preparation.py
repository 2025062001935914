"""How fast chats become token ids with a mask, against `datasets.map` with `apply_chat_template` doing the same work.

    python benchmarks/preparation.py [--rows 40000] [--runs 3] [--model DIR] [--data FILES...]

All start from one JSON-lines file and end with ids and the mask of trained tokens of every row on disk. `datasets` does
it row by row in one process (as TRL's trainers call it when nothing is said), row by row on all cores, and at its best:
batched, on all cores; its chat template has generation markers, so that its mask is right. Sides take turns; each run
is a process of its own with an empty cache, and its clock starts after the imports. What is told are the medians of the
ratios, and that all made the same number of tokens and of trained tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = sorted((SHARED / "sft").glob("*.jsonl.gz"))


SIDES = ("ours", "datasets, batched, all cores", "datasets, row by row, all cores", "datasets, row by row")


def rows_of(files: Sequence[Path], count: int) -> list[dict[str, Any]]:
    """``count`` rows of messages, each with a number of its own so that none is a duplicate."""
    found = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            found += [json.loads(line)["messages"] for line in stream]
    rows = []
    for n, messages in enumerate(islice(cycle(found), count)):
        first = {"role": messages[0]["role"], "content": f"{n}. {messages[0]['content']}"}
        rows.append({"messages": [first, *({"role": m["role"], "content": m["content"]} for m in messages[1:])]})
    return rows


def tokenizer_at(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ours(folder: Path, file: Path) -> tuple[float, int, int]:
    """(seconds, tokens, trained tokens)."""
    from trivium.data.prepare import prepare
    from trivium.data.templates import chat_template

    tokenizer = tokenizer_at(folder)
    started = time.perf_counter()
    done = prepare(file, kind="conversation", tokenizer=tokenizer, template=chat_template(tokenizer), context=2**20)
    return time.perf_counter() - started, done.ledger.tokens, done.ledger.trained_tokens


def theirs(folder: Path, file: Path, side: str) -> tuple[float, int, int]:
    """The same by `datasets`; an "input_ids" of one row or of many come in the same form."""
    from datasets import load_dataset

    tokenizer = tokenizer_at(folder)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        done = tokenizer.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": done["input_ids"], "mask": done["assistant_masks"]}

    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=os.environ["HF_DATASETS_CACHE"])
    cores = len(os.sched_getaffinity(0)) if "cores" in side else None
    done = rows.map(encode, batched="batched" in side, num_proc=cores, remove_columns=rows.column_names)
    seconds = time.perf_counter() - started
    import pyarrow.compute as pc

    table = done.data.table
    counted = pc.sum(pc.list_value_length(table["input_ids"])).as_py()
    return seconds, counted, pc.sum(pc.list_flatten(table["mask"])).as_py()


def one(side: str, folder: Path, file: Path) -> dict[str, Any]:
    """A run of one side in a process and a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRIVIUM_CACHE": cache, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1",
                                    "TOKENIZERS_PARALLELISM": "true" if side == "ours" else "false"}  # fmt: skip
        command = [sys.executable, __file__, "--side", side, "--model", str(folder), "--data", str(file)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = dict(json.loads(done.stdout.splitlines()[-1]))
        return found | {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def made_tokenizer(folder: Path, texts: list[str]) -> Path:
    """A byte-level BPE of 16,384 tokens, trained on the data, with a template that has generation markers."""
    from trivium.data.tokenizer import train_tokenizer

    train_tokenizer(texts, 16_384).save_pretrained(folder)
    return folder


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=40_000)
    ask.add_argument("--runs", type=int, default=3)
    ask.add_argument("--model", type=Path)
    ask.add_argument("--data", type=Path, nargs="+", default=DATA)
    ask.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.side:
        where = given.model, given.data[0]
        seconds, tokens, trained = ours(*where) if given.side == "ours" else theirs(*where, given.side)
        print(json.dumps({"seconds": seconds, "tokens": tokens, "trained": trained}))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(given.data, given.rows)
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        texts = [m["content"] for row in rows[:4000] for m in row["messages"]]
        model = given.model or made_tokenizer(Path(folder) / "tokenizer", texts)
        size = file.stat().st_size / 1e6
        print(f"{given.rows:,} rows, {size:.0f} MB", flush=True)
        ratios: dict[str, list[float]] = {side: [] for side in SIDES[1:]}
        for n in range(given.runs):
            found = {side: one(side, model, file) for side in (SIDES if n % 2 else SIDES[::-1])}
            assert len({(f["tokens"], f["trained"]) for f in found.values()}) == 1, f"not the same work: {found}"
            for side in SIDES:
                f = found[side]
                rate = f["tokens"] / f["seconds"]
                print(
                    f"  {side:32} {f['seconds']:6.1f} s, {rate:9,.0f} tokens/s, {f['cpu']:6.1f} s of cores", flush=True
                )
            for side, of_it in ratios.items():
                of_it.append(found[side]["seconds"] / found["ours"]["seconds"])
        for side, of_it in ratios.items():
            print(
                f"ours is {statistics.median(of_it):.2f} times as fast as {side} ({min(of_it):.2f} to {max(of_it):.2f})"
            )


if __name__ == "__main__":
    main()
