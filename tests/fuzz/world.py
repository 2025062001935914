"""The sound files that are mutated: small, of every kind that the program reads, made once and never written to."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from trivium.chain import run_recipe
from trivium.data.rows import _zstd
from trivium.data.templates import CHATML, PLAIN
from trivium.data.tokenizer import train_tokenizer
from trivium.folder import attach, save, save_model
from trivium.model.reward import as_reward_model
from trivium.peft import folder as adapter
from trivium.peft.settings import PRESETS, settings_of
from trivium.recipe_file import read_recipe
from trivium.start import fresh_model
from trivium.train.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
WORDS = [
    "red",
    "blue",
    "green",
    "old",
    "young",
    "small",
    "big",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "saw",
    "ate",
    "tree",
    "10",
    "é",
    "😀",
]
SIZES = {"architecture": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 300,
         "max_position_embeddings": 160}  # fmt: skip
SHORT = {"max_steps": 2, "batch_size": 4, "eval_data": 0.2, "learning_rate": 1e-2}
RUN: dict[str, Any] = {
    "name": "run",
    "model": SIZES,
    "prompts": ["a cat"],
    "judge_prompts": 2,
    "stages": [
        {"name": "base", "stage": "pretrain", "data": "text.jsonl", **SHORT},
        {
            "name": "chat",
            "stage": "sft",
            "from": "base",
            "data": "chats.jsonl",
            "method": {"name": "lora", "r": 2},
            **SHORT,
        },
        {"name": "aligned", "stage": "preference", "from": "chat", "data": "pairs.jsonl", **SHORT},
    ],
}
METHODS = (
    "lora",
    "dora",
    "pissa",
    "vera",
    "bottleneck",
    "compacter",
    "ia3",
    "prompt",
    "prefix",
    "bitfit",
    "layer_norms",
    "top_layers",
)
SMALL = {"lora": {"r": 2}, "vera": {"r": 2}, "bottleneck": {"r": 2}, "prompt": {"num_virtual_tokens": 2},
         "prefix": {"num_virtual_tokens": 2}, "top_layers": {"layers": 1}}  # fmt: skip
ABOUT = {"training": "3fa9c1d2e4b5", "parent": "given", "settings": {"epochs": 1.0}, "data": {"rows.jsonl": "12ab"}}


def words(n: int, at: int) -> str:
    return " ".join(WORDS[(at * 7 + k * k) % len(WORDS)] for k in range(n))


def chat(n: int) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": words(3, n)}, {"role": "assistant", "content": words(4, n + 1)}]
    return [{"role": "system", "content": "Be brief."}] * (n % 3 == 0) + turns * (1 + n % 2)


def calls(n: int) -> dict[str, Any]:
    """A row with tools, a call and its answer, and reasoning."""
    call = {"type": "function", "id": f"c{n}", "function": {"name": "look", "arguments": {"at": words(1, n)}}}
    shape = {"type": "object", "properties": {"at": {"type": "string"}}}
    messages = [
        {"role": "user", "content": words(3, n)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": words(2, n), "tool_call_id": f"c{n}"},
        {"role": "assistant", "content": words(3, n), "reasoning_content": words(2, n)},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": {"name": "look", "parameters": shape}}]}


# Every format, by the kind of row that it becomes.
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "text": ("text", [{"text": words(12, n)} for n in range(6)]),
    "content": ("text", [{"content": words(12, n), "meta": {"source": "x", "n": n}} for n in range(4)]),
    "messages": ("conversation", [{"messages": chat(n)} for n in range(5)]),
    "calls": ("conversation", [calls(n) for n in range(3)]),
    "sharegpt": ("conversation", [{"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"],
    "system"),
                                                      "value": m["content"]} for m in chat(n)]} for n in range(4)]),
    "alpaca": ("conversation", [{"instruction": words(3, n), "input": words(n % 3, n), "output": words(3, n),
                                 "history": [["a", "b"]] * (n % 2)} for n in range(4)]),
    "question": ("conversation", [{"question": words(3, n), "answer": words(3, n), "system": "x"} for n in range(4)]),
    "completion": ("conversation", [{"prompt": words(3, n), "completion": words(3, n)} for n in range(4)]),
    "pairs": ("pair", [{"prompt": words(3, n), "chosen": words(3, n), "rejected": words(2, n + 1), "margin": 1.5,
    "weight": 2}
                       for n in range(4)]),
    "whole pairs": ("pair", [{"chosen": [*chat(n), {"role": "user", "content": "b"}, {"role": "assistant",
    "content": "yes"}],
                              "rejected": [*chat(n), {"role": "user", "content": "b"}, {"role": "assistant",
                              "content": "no"}]}
                             for n in range(4)]),
    "hh": ("pair", [{"chosen": f"\n\nHuman: {words(3, n)}\n\nAssistant: {words(2, n)}",
                     "rejected": f"\n\nHuman: {words(3, n)}\n\nAssistant: {words(3, n + 2)}"} for n in range(4)]),
    "scored": ("pair", [{"prompt": words(3, n), "answers": [words(2, n), words(3, n), words(1, n)], "scores": [1, 2.5,
    3]}
                        for n in range(4)]),
    "scores inside": ("pair", [{"prompt": words(3, n), "answers": [{"text": words(2, n), "score": 1}, {"text": "b",
    "score": n}]}
                               for n in range(3)]),
    "ratings": ("rating", [{"prompt": words(3, n), "completion": words(3, n), "label": n % 2 == 0} for n in range(6)]),
    "prompts": ("prompt", [{"prompt": words(3, n)} for n in range(4)]),
}  # fmt: skip
FLAT = [
    name
    for name, (_, rows) in ROWS.items()
    if all(isinstance(v, (str, int, float, bool)) for r in rows for v in r.values())
]
TEXT = ("\n\n".join(words(9, n) for n in range(30)) + "\n").encode()


def file_of(name: str, ending: str) -> bytes:
    """Rows of a format as the bytes of a file with this ending, without compression."""
    rows = ROWS[name][1]
    if ending in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, ensure_ascii=len(name) % 2 == 0) + "\n" for row in rows).encode()
    if ending == ".json":
        return json.dumps(rows, indent=1).encode()
    if ending == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if ending in (".csv", ".tsv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
        return out.getvalue().encode()
    return TEXT


def packed(data: bytes, ending: str) -> bytes:
    return gzip.compress(data) if ending == ".gz" else _zstd().compress(data) if ending == ".zst" else data


PACKINGS = ("", ".gz") + ((".zst",) if _zstd() is not None else ())


@dataclass
class World:
    """Where everything lies, and what is opened once."""

    folder: Path
    recipes: list[dict[str, Any]]  # as values, their data beside them
    files: dict[str, list[bytes]]  # rows, by the file's ending
    templates: list[str]
    tokenizers: list[Path]
    models: list[Path]
    adapters: list[Path]
    tokenizer: Any
    model: Any  # a LanguageModel
    run: Path
    checkpoints: Path


def make(folder: Path) -> World:
    """Write the sound files into ``folder``. Some seconds."""
    torch.manual_seed(0)
    for name in ("text", "messages", "pairs", "ratings"):
        file = folder / f"{ {'messages': 'chats'}.get(name, name) }.jsonl"
        rows = [row for n in range(8) for row in ROWS[name][1][n % 3 :]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    tokenizer = train_tokenizer([words(9, n) for n in range(40)], 300)
    model = fresh_model(SIZES, tokenizer, 0, "float32", "cpu")
    model.hf.requires_grad_(False)
    run_recipe(read_recipe(folder / "run.yaml"), folder / "run")
    files = {ending: [file_of(name, ending) for name in (FLAT if ending in (".csv", ".tsv") else ROWS)]
             for ending in (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md")}  # fmt: skip
    templates = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "tests/data/templates").glob("*.jinja"))]
    return World(
        folder, _recipes(), files, [CHATML, PLAIN, tokenizer.chat_template, *templates], _tokenizers(folder, tokenizer),
        _models(folder, model), _adapters(folder, model), tokenizer, model, folder / "run", _checkpoints(folder),
    )  # fmt: skip


def _recipes() -> list[dict[str, Any]]:
    """The recipes that are published, with data that is here, and the one that was run."""
    found = [RUN]
    for path in [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "src/trivium/demo/recipe.yaml"]:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        found.append(copy.deepcopy(value))
        for stage in value["stages"]:
            kind = {"pretrain": "text", "sft": "chats"}.get(stage["stage"], "pairs")
            stage["data"] = f"{kind}.jsonl"
            for key in ("eval_data", "max_length"):
                stage.pop(key, None)
        found += [{k: v for k, v in value.items() if k != "eval_text"}] * 2
    return found


def _tokenizers(folder: Path, ours: Any) -> list[Path]:
    """Byte-level BPE, words, and unigrams of pieces, each as `transformers` writes it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    by_word = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    by_word.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        *((c, -3.0) for c in "abcdeghilnorstuwy1é"),
        ("▁cat", -1.0),
    ]
    unigram = Tokenizer(models.Unigram(pieces, 0, False))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    found = [folder / "tokenizer-ours"]
    ours.save_pretrained(found[0])
    for name, one in (("words", by_word), ("unigram", unigram)):
        fast = PreTrainedTokenizerFast(tokenizer_object=one, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        fast.chat_template = CHATML
        found.append(folder / f"tokenizer-{name}")
        fast.save_pretrained(found[-1])
    return found


def _models(folder: Path, model: Any) -> list[Path]:
    """A language model whole and in two parts with their index, one of another family, and a reward model."""
    from trivium.data.templates import chat_template

    template = chat_template(model.tokenizer)
    qwen = fresh_model({**SIZES, "architecture": "qwen3"}, model.tokenizer, 0, "float32", "cpu")
    rewards = as_reward_model(fresh_model(SIZES, model.tokenizer, 0, "float32", "cpu"), 0)
    found = [folder / f"model-{name}" for name in ("llama", "parts", "qwen3", "reward")]
    for one, place in zip((model, model, qwen, rewards), found, strict=True):
        place.mkdir()
        save_model(one, place, template)
    (found[1] / "model.safetensors").unlink()
    model.hf.save_pretrained(found[1], max_shard_size="40KB")
    assert (found[1] / "model.safetensors.index.json").is_file()
    return found


def _adapters(folder: Path, model: Any) -> list[Path]:
    """One of every method, on the first model."""
    found = []
    for method in METHODS:
        one = copy.deepcopy(model)
        name = PRESETS.get(method, {"name": method})["name"]
        settings = settings_of({**PRESETS.get(method, {"name": method}), **SMALL.get(name, {})})
        attached = attach(one, settings, seed=0)
        found.append(folder / f"adapter-{method}")
        save(one, attached.settings, str(folder / "model-llama"), found[-1])
    rewards = as_reward_model(copy.deepcopy(model), 0)
    for method in ("lora", "ia3"):
        one = copy.deepcopy(rewards)
        attached = attach(one, settings_of({"name": method, **SMALL.get(method, {})}), seed=0)
        found.append(folder / f"adapter-reward-{method}")
        adapter.save(one.hf, found[-1], str(folder / "model-llama"), attached.settings)
    return found


def _checkpoints(folder: Path) -> Path:
    """The folder of a training under way: three checkpoints and a journal."""
    place = folder / "chat.training" / ABOUT["training"]
    kept = Checkpoints(place, {"training": "same"}, last=9)
    for step in (2, 4, 6):
        state = {"step": step, "steps": 8, "about": ABOUT, "accepted": [], "date": None, "best": {"step": 4,
            "loss": 1.0},
                 "costs": {"seconds": 1.0, "tokens": 9}, "saving": {"saved": 1, "bytes": 9},
                 "how": {"device": "cpu"}}  # fmt: skip
        tensors = {"weights": {"a": torch.ones(3, 2) * step}, "rng": {"cpu": torch.arange(16, dtype=torch.uint8)}}
        kept.save(step, tensors, state, {"metrics.jsonl": '{"step": 1, "loss": 2.0}\n'})
    (place / "journal.jsonl").write_text('{"pid": 1, "host": "a"}\n' * 2, encoding="utf-8")
    return place
