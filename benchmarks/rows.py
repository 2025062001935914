"""A job's rows: the file that trivium reads, and what its steps hold as token ids, which every peer is given.

trivium's own preparation and order are carried out here once; a benchmark afterwards asserts that each tool has
trained these tokens. Rows that do not fit the model's context (of a small stand-in, say) are left out.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from environments import ROOT
from jobs import Job
from shared import NEVER, SEED, WARMUP, Failed, digest

DATA = ROOT.parent / "shared" / "data"
SYSTEM_SHARE, SYSTEM_LENGTH = 2 / 3, 600  # of a row: 400 of 600 tokens are the shared system prompt
SHORT = 96  # tokens
PROMPT_LENGTH, ANSWER_LENGTH, ANSWERS = 800, 50, 4


def read(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a file of the data folder. Raises Failed where it is not there."""
    path = DATA / name
    if not path.is_file():
        raise Failed(f"{name} is not among the shared data")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def pairs_of(rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Rows with a prompt and one plain answer on either side, in the form that TRL calls conversational."""
    from trivium.data.formats import RowError, parse

    for row in rows:
        try:
            parsed: Any = parse(row, "pair")
            answers = [answer for answer, _ in parsed.answers_by_score()]
        except RowError:
            continue
        pair = dict(zip(("prompt", "chosen", "rejected"), (parsed.prompt, *answers), strict=True))
        plain = all(set(m) == {"role", "content"} for messages in pair.values() for m in messages)
        if plain and not parsed.tools and all(len(answer) == 1 for answer in answers):
            yield pair


# --- what a job is trained on


@dataclass(frozen=True)
class Reader:
    """What tells how long a row is: the model's tokenizer, its chat template, and its context."""

    tokenizer: Any
    template: Any
    context: int

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fits(self, messages: list[dict[str, Any]], least: int = 0, most: float = math.inf) -> bool:
        from trivium.data.formats import RowError

        try:
            longest = max(len(s.tokens) for s in self.template.encode(messages))
        except RowError:
            return False
        return least <= longest <= min(most, self.context)


def hh(job: Job, reader: Reader) -> Iterator[dict[str, Any]]:
    """People's choices between two answers: as pairs, or the chosen conversations alone; each prompt once."""
    seen: set[str] = set()
    for pair in pairs_of(read("pref/hh_harmless-base.jsonl.gz")):
        sides = [pair["prompt"] + pair[side] for side in ("chosen", "rejected")]
        said = json.dumps(pair["prompt"])
        if said in seen or not all(reader.fits(side) for side in sides):
            continue
        seen.add(said)
        yield pair if job.kind == "dpo" else {"messages": sides[0]}


def short_hh(job: Job, reader: Reader) -> Iterator[dict[str, Any]]:
    """Such conversations as take no time to train on: where the start is what is measured."""
    return hh(job, replace(reader, context=min(reader.context, SHORT)))


def book() -> str:
    return str(next(read("pretrain/gutenberg_children12.jsonl.gz"))["text"])


def passages(reader: Reader, text: str) -> Callable[[int], str]:
    """What cuts the next so many tokens off a text, as text."""
    words, at = text.split(" "), 0
    per_token = len(words) / max(1, len(reader.tokens(text)))

    def cut(tokens: int) -> str:
        nonlocal at
        count = max(1, round(tokens * per_token * 1.3))
        found = " ".join(words[at : at + count])
        while (over := len(reader.tokens(found)) - tokens) > 0 and count > 1:
            count -= max(1, int(over * per_token))
            found = " ".join(words[at : at + count])
        at += count
        return found

    return cut


def shared_system(job: Job, reader: Reader) -> Iterator[dict[str, Any]]:
    """Instructions under one long system prompt, a passage of a book."""
    length = min(SYSTEM_LENGTH, int(reader.context * 0.9))
    system = {"role": "system", "content": passages(reader, book())(round(length * SYSTEM_SHARE))}
    for row in read("sft/dolly2k.jsonl.gz"):
        messages = [system, *(m for m in row["messages"] if m["role"] != "system")]
        if reader.fits(messages, int(length * 0.9), length * 1.1):
            yield {"messages": messages}


def long_prompts(job: Job, reader: Reader) -> Iterator[dict[str, Any]]:
    """A long passage to go on with, and four answers: what does follow, and three from elsewhere in the book."""
    room = min(PROMPT_LENGTH, int(reader.context * 0.8))
    text = book()
    ahead, elsewhere = passages(reader, text[: len(text) // 2]), passages(reader, text[len(text) // 2 :])
    while prompt := ahead(room - 45):
        asked = [{"role": "user", "content": f"Go on with this story.\n\n{prompt}"}]
        answers = [ahead(ANSWER_LENGTH), *(elsewhere(ANSWER_LENGTH) for _ in range(ANSWERS - 1))]
        if not all(answers):
            return
        yield {"prompt": asked, "answers": answers, "scores": [1.0] + [0.0] * (ANSWERS - 1)}


def books(job: Job, reader: Reader) -> Iterator[dict[str, Any]]:
    for row in read("pretrain/gutenberg_children12.jsonl.gz"):
        yield {"text": row["text"]}


SOURCES: dict[str, Callable[[Job, Reader], Iterator[dict[str, Any]]]] = {
    "hh": hh, "short hh": short_hh, "shared system": shared_system, "long prompts": long_prompts, "books": books,
}  # fmt: skip


# --- what its steps are


@dataclass(frozen=True)
class Prepared:
    """A job ready to run: ``steps`` are those that peers get, ``passes`` per step and pass of trivium's plan
    (tokens on the line, trained entries), ``counts`` of a step (tokens, trained tokens) as trivium logs them."""

    folder: Path
    model: str
    steps: list[list[dict[str, Any]]]
    passes: list[list[tuple[int, int]]]
    rates: list[float]
    sha256: str
    config: dict[str, Any]

    @property
    def counts(self) -> list[tuple[int, int]]:
        return [(sum(t for t, _ in step), sum(k for _, k in step)) for step in self.passes]

    @property
    def tokens(self) -> int:
        """Of all sequences as the peers read them, nothing shared and nothing padded."""
        return sum(len(s) for step in self.steps for row in step for s in sequences(row))


def sequences(row: dict[str, Any]) -> list[list[int]]:
    """The whole sequences of a peer's row."""
    return [row["prompt"] + row[s] for s in ("chosen", "rejected")] if "prompt" in row else [row["ids"]]


def stage_of(job: Job, ours: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """The recipe's stage."""
    kinds: dict[str, dict[str, Any]] = {
        "sft": {"stage": "sft"}, "pretrain": {"stage": "pretrain"},
        "dpo": {"stage": "preference", "loss": "dpo", "beta": 0.1},
    }  # fmt: skip
    return {
        "name": "bench", **kinds[job.kind], "data": str(folder / "train.jsonl"), "eval_data": 0,
        "batch_size": job.batch, "max_steps": steps, "learning_rate": job.rate, "schedule": "linear",
        "warmup_ratio": WARMUP, "weight_decay": 0.0, "device": "cpu", "dtype": "float32", "save_every": NEVER,
        **job.stage, **ours,
    }  # fmt: skip


def recipe_of(job: Job, ours: dict[str, Any], ready_model: str, folder: Path, steps: int) -> dict[str, Any]:
    stage = stage_of(job, ours, folder, steps)
    return {"name": "bench", "model": ready_model, "seed": SEED, "prompts": [], "judge_prompts": 0, "stages": [stage]}


def prepare(job: Job, model: str, rows: int | None, folder: Path) -> Prepared:
    """Writes train.jsonl, steps.json and, where LoRA is trained, its first weights as adapter/. Raises Failed."""
    from trivium.data.templates import chat_template
    from trivium.folder import reading_of

    if job.kind == "pretrain":
        model = new_model(folder)
    tokenizer, context = reading_of(model)
    template = chat_template(tokenizer)
    count = max(job.batch, (rows or job.rows) // job.batch * job.batch)
    wanted = 12 if job.kind == "pretrain" else count  # books, which are cut into rows of one length
    reader = Reader(tokenizer, template, context or NEVER)
    found = [row for row, _ in zip(SOURCES[job.data](job, reader), range(wanted), strict=False)]
    if len(found) < wanted:
        raise Failed(f"only {len(found)} rows of '{job.data}' fit: ask for fewer with --rows")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    first = next(iter(job.ours.values()))
    recipe = recipe_of(job, first, model, folder, job.steps or count // job.batch)
    ready = planned(job, recipe, reader, folder)
    if job.trained in ("lora", "qlora"):
        write_adapter(model, recipe["stages"][0]["method"], folder / "adapter")
    (folder / "steps.json").write_text(json.dumps(ready.steps))
    return ready


def planned(job: Job, recipe: dict[str, Any], reader: Reader, folder: Path) -> Prepared:
    """What trivium will make of a recipe: its examples in its order."""
    from trivium.recipe import Recipe
    from trivium.stage_data import packed, run_order, stage_examples
    from trivium.stages import resolve
    from trivium.train.schedule import factor

    whole = Recipe(**recipe)
    stage, _ = resolve(whole.stages[0], whole, None, "the model")
    reads: Any = SimpleNamespace(context=reader.context, tokenizer=reader.tokenizer)
    data, _ = stage_examples(stage, reads, reader.template)
    order = run_order(stage, data)
    steps, passes = [], []
    for number in range(len(order)):
        steps.append([row for i in order.chosen(number) for row in rows_of(data.examples[i], job)])
        forests = packed(data.examples.at(order.chosen(number)), int(stage.micro_batch_tokens or 1), "cpu")
        passes.append([(len(f.tokens), len(f.source)) for f in forests])
    rates = [factor(n, len(order), "linear", WARMUP) for n in range(len(order))]
    config = json.loads((Path(recipe["model"]) / "config.json").read_text())
    return Prepared(folder, recipe["model"], steps, passes, rates, digest(steps), config)


def rows_of(example: Any, job: Job) -> list[dict[str, Any]]:
    """An example as rows of token ids: a text with its labels, or the pairs of several answers to a prompt."""
    if job.kind != "dpo":
        labels = [np.where(s.weights > 0, s.tokens, -100) for s in example.sequences]
        return [
            {"ids": s.tokens.tolist(), "labels": of.tolist()} for s, of in zip(example.sequences, labels, strict=True)
        ]
    parted = [
        (s.tokens[: int(s.weights.argmax())].tolist(), s.tokens[s.weights > 0].tolist()) for s in example.sequences
    ]
    return [{"prompt": parted[a][0], "chosen": parted[a][1], "rejected": parted[b][1]} for a, b in example.pairs]


def new_model(folder: Path) -> str:
    """A small model with random weights, and a tokenizer learnt from the books, as a folder for all tools."""
    from jobs import SMALL

    from trivium.data.tokenizer import train_tokenizer
    from trivium.model.new import new_config
    from trivium.model.new import new_model as built

    made = folder / "small"
    tokenizer = train_tokenizer([book()], int(SMALL["vocab_size"]))
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    built(new_config(sizes, tokenizer), SEED).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return str(made)


def write_adapter(model: str, method: dict[str, Any], folder: Path) -> None:
    """The LoRA that trivium starts with, for PEFT."""
    from trivium.folder import attach, open_folder, save
    from trivium.peft.settings import settings_of

    opened = open_folder(model)
    settings = settings_of({**method, "name": "lora"})
    attach(opened.model, settings, seed=SEED)
    save(opened.model, settings, model, folder)
