"""The kinds of cases: how the files of one are mutated, and what the program would do with them."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.harness import Kind
from tests.fuzz.mutate import ODD, Raw, as_json, bytes_of, json_of, value_of
from tests.fuzz.recipes import call_recipe, make_recipe
from tests.fuzz.world import ABOUT, PACKINGS, ROWS, World, packed

from trivium.data.check import format_of_file
from trivium.data.prepare import Prepared, prepare
from trivium.data.rows import Listed, Mix, read_rows, texts_of
from trivium.data.templates import chat_template
from trivium.files import MANIFEST, _sealed, damage, read_lines
from trivium.folder import base_of, method_of, open_folder, record_of, rewards_in
from trivium.folder import load_tokenizer as load_tokenizer_of
from trivium.inspect import described, header, shown
from trivium.model.load import shape_of
from trivium.peft import folder as adapter
from trivium.report.write import page, run_view
from trivium.train.checkpoint import Checkpoints, peek
from trivium.under_way import under_way

# --- rows


def _make_rows(world: World, folder: Path, rng: Random) -> None:
    ending = rng.choice(list(world.files))
    data = rng.choice(world.files[ending])
    how = rng.random()
    if ending in (".jsonl", ".ndjson", ".json") and how < 0.6:
        rows = json.loads(data) if ending == ".json" else [json.loads(line) for line in data.splitlines()]
        rows = value_of(rng, rows)
        one_line = ending != ".json" and isinstance(rows, list)
        data = ("\n".join(map(as_json, rows)) if one_line else as_json(rows, rng.random() < 0.5)).encode()
    else:
        data = bytes_of(rng, data, rng.choice(world.files[ending]))
    packing = rng.choice(PACKINGS) if rng.random() < 0.3 else ""
    data = packed(data, packing)
    if packing and rng.random() < 0.5:
        data = bytes_of(rng, data, packed(rng.choice(world.files[ending]), packing))
    ending = rng.choice(list(world.files)) if rng.random() < 0.05 else ending
    (folder / f"rows{ending}{packing}").write_bytes(data)


def _call_rows(world: World, folder: Path, rng: Random) -> None:
    file = next(folder.glob("rows*"))
    kind: Any = rng.choice(("text", "conversation", "pair", "rating"))
    names = ["prompt", "chosen", "text", "messages", "a", "meta.n", "", "prompt."]
    mapping = tuple(
        (rng.choice(("prompt", "text", "messages", "chosen")), rng.choice(names))
        for _ in range(rng.choice((0, 0, 0, 1, 2)))
    )
    mix = Mix(file, None, mapping)
    for _ in read_rows(file):
        pass
    for _ in texts_of([mix]):
        pass
    format_of_file(mix, None)
    template = _template_of(world, rng)
    found = prepare(
        mix, kind=kind, tokenizer=world.tokenizer, template=template, context=rng.choice((2, 16, 64)),
        max_length=rng.choice((None, None, 32)), on_overflow=_overflow(kind, rng), train_on=rng.choice(("assistant",
            "last", "all")),
        pairs=rng.choice(("best_worst", "all")), duplicates=rng.choice(("keep", "drop")), holdout=rng.choice((0.0,
            0.3)),
        bad_rows=rng.choice((1.0, 1.0, None, 0.01)),
    )  # fmt: skip
    _looked_at(found, folder)


def _overflow(kind: str, rng: Random) -> Any:
    ways = (None, "error", "drop", "truncate_left", "truncate_right")
    return rng.choice((*ways, "split") if kind == "text" else ways)


def _looked_at(found: Prepared, folder: Path) -> None:
    """Every example can be read, and every row accounted for and written down."""
    for examples in (found.examples, found.held_out):
        for n in range(len(examples)):
            assert all(len(s.tokens) == len(s.weights) for s in examples[n].sequences), "a weight for each token"
    found.ledger.balance()
    found.ledger.lines()
    json.dumps(found.ledger.as_dict())
    quarantine = folder / "cache" / "quarantine.jsonl"
    quarantine.parent.mkdir(exist_ok=True)
    found.ledger.write_quarantine(quarantine)


def _template_of(world: World, rng: Random) -> Any:
    world.tokenizer.chat_template = rng.choice((world.templates[1].replace("BOS", "true"), world.templates[2]))
    return chat_template(world.tokenizer)


# --- chat templates

JINJA_ODD = (
    "{{ 'a' * 10**9 }}", "{% for i in range(10**9) %}a{% endfor %}", "{{ messages.__class__ }}", "{{ self }}",
    "{{ 10**10**10 }}", "{{ 1/0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ [messages] * 10**8 }}", "{% set ns = namespace(a=[]) %}",
    "{{ raise_exception(1) }}",
    "{{ raise_exception('\\x1b[31m' ~ 'a' * 5000) }}", "{{ strftime_now('%' * 100) }}", "{{ strftime_now(1) }}",
    "{% include 'a' %}", "{{ '\\ud800' }}",
    "{% extends 'a' %}", "{% import 'a' as b %}", "{{ messages | tojson(indent=10**9) }}", "{{ 'a'.ljust(10**9) }}",
    "{{ cycler(1) }}", "{{ tools }}",
    "{% generation %}", "{% endgeneration %}", "{% break %}", "{{ loop }}", "{{ messages[0].content[::-1] }}",
    "{{ messages | map('x') | list }}",
    "{{ namespace }}", "{{ '%s' % messages }}", "{{ '{0.__class__}'.format(1) }}", "{{ messages[10**9] }}",
    "{{ (" * 300, "{% if 1 %}" * 300,
    "{{ messages | sort(attribute='content') }}", "{{ messages | groupby('role') }}", "{{ lipsum() }}",
    "{{ joiner }}", "{{ '\\0' }}", "{{ none + 1 }}",
    "{% set x = messages.append(1) %}", "{{ 'a' | center(10**9) }}", "{% raw %}", "{# ", "{{ 1.e999 }}",
    "{{ '9' * 5000 | int }}", "{{ 'a'|replace('', 'b'*9999) }}",
)  # fmt: skip
TALK: list[dict[str, Any]] = [*ROWS["messages"][1], *ROWS["calls"][1][:1]]


def _make_template(world: World, folder: Path, rng: Random) -> None:
    text = rng.choice(world.templates)
    if rng.random() < 0.5:
        data = bytes_of(rng, text.encode(), rng.choice(world.templates).encode())
    else:
        for _ in range(rng.choice((1, 1, 2))):
            places = [n for n, c in enumerate(text) if c == "{" and text[n : n + 2] in ("{{", "{%")] or [0]
            at = rng.choice(places)
            end = max(at, text.find("}", at) + 2)
            text = text[:at] + rng.choice(JINJA_ODD) + text[rng.choice((at, end)) :]
        data = text.encode("utf-8", "surrogatepass")
    (folder / "chat_template.jinja").write_bytes(data)


def _call_template(world: World, folder: Path, rng: Random) -> None:
    world.tokenizer.chat_template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    template = chat_template(world.tokenizer)
    found = prepare(
        Listed(TALK), kind="conversation", tokenizer=world.tokenizer, template=template, context=512, bad_rows=None,
        train_on=rng.choice(("assistant", "last", "all")),
    )  # fmt: skip
    _looked_at(found, folder)


# --- tokenizers, models, adapters


def _spoilt(folder: Path, rng: Random, names: list[str], others: list[Path]) -> None:
    """One or two of the files ``names``, of those that are there, mutated."""
    there = [name for name in names if (folder / name).is_file()]
    for name in rng.sample(there, min(len(there), rng.choice((1, 1, 1, 2)))):
        data = (folder / name).read_bytes()
        other = rng.choice([o / name for o in others if (o / name).is_file()]).read_bytes()
        structural = name.endswith(".json") and rng.random() < 0.7
        (folder / name).write_bytes(json_of(rng, data) if structural else _weights(rng, data, other, name))


def _weights(rng: Random, data: bytes, other: bytes, name: str) -> bytes:
    """Bytes mutated; of safetensors at times the header alone, so that its length still is the one it says."""
    if not name.endswith(".safetensors") or rng.random() < 0.4:
        return bytes_of(rng, data, other)
    size = int.from_bytes(data[:8], "little")
    head = json_of(rng, data[8 : 8 + size])
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


def _make_tokenizer(world: World, folder: Path, rng: Random) -> None:
    shutil.copytree(rng.choice(world.tokenizers), folder / "tokenizer")
    names = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    _spoilt(folder / "tokenizer", rng, ["tokenizer.json", *rng.sample(names, 1)], world.tokenizers)


def _call_tokenizer(world: World, folder: Path, rng: Random) -> None:
    tokenizer = load_tokenizer_of(folder / "tokenizer")
    template = chat_template(tokenizer)
    kind: Any = rng.choice(("conversation", "text"))
    found = prepare(Listed(TALK if kind == "conversation" else ROWS["text"][1]), kind=kind, tokenizer=tokenizer,
    template=template,
                    context=512, bad_rows=None)  # fmt: skip
    _looked_at(found, folder)


def _copy_model(world: World, folder: Path, rng: Random) -> Path:
    return Path(shutil.copytree(rng.choice(world.models), folder / "model"))


def _make_weights(world: World, folder: Path, rng: Random) -> None:
    place = _copy_model(world, folder, rng)
    names = [p.name for p in sorted(place.glob("*.safetensors"))] + ["model.safetensors.index.json"]
    _spoilt(place, rng, names, world.models)


def _make_config(world: World, folder: Path, rng: Random) -> None:
    place = _copy_model(world, folder, rng)
    _spoilt(place, rng, rng.choice((["config.json"], ["config.json"], ["generation_config.json"], ["config.json",
        "generation_config.json"])),
            world.models)  # fmt: skip


def _call_model(world: World, folder: Path, rng: Random) -> None:
    place = folder / "model"
    how = rng.random()
    if how < 0.25:
        for file in place.glob("*.safetensors"):
            header(file)
        shown(described(str(place)))
    elif how < 0.5:
        rewards_in(place)
        shape_of(str(place))
    else:
        open_folder(str(place))


def _make_adapter(world: World, folder: Path, rng: Random) -> None:
    place = rng.choice(world.adapters)
    shutil.copytree(place, folder / "adapter")
    _spoilt(folder / "adapter", rng, rng.choice((["adapter_config.json"], ["adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.safetensors"])),
            world.adapters)  # fmt: skip


def _call_adapter(world: World, folder: Path, rng: Random) -> None:
    place = folder / "adapter"
    if rng.random() < 0.2:
        shown(described(str(place)))
        open_folder(str(place))
        return
    method_of(place), adapter.quantization_of(place), adapter.gives_rewards(place)
    base_of(place)
    hf = copy.deepcopy(world.model.hf)
    before = list(hf.state_dict())
    try:
        adapter.load(hf, place)
    except BaseException:
        assert list(hf.state_dict()) == before, "the model is as it was"
        raise


# --- checkpoints and runs


def _make_checkpoint(world: World, folder: Path, rng: Random) -> None:
    place = Path(shutil.copytree(world.checkpoints.parent, folder / "chat.training")) / world.checkpoints.name
    file = rng.choice(sorted(p for p in place.rglob("*") if p.is_file() and p.suffix != ".safetensors"))
    data = file.read_bytes()
    if file.name == MANIFEST and rng.random() < 0.5:  # sealed again: what is wrong is not seen by its hash
        body = value_of(
            rng,
            {k: v for k, v in json.loads(data).items() if k != "sha256"},
            tuple(o for o in ODD if not isinstance(o, Raw)),
        )
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            data = _sealed(body).encode()
        file.write_bytes(data)
        return
    structural = file.suffix == ".json" and rng.random() < 0.7
    file.write_bytes(json_of(rng, data) if structural else bytes_of(rng, data, data))


def _call_checkpoint(world: World, folder: Path, rng: Random) -> None:
    place = folder / "chat.training" / world.checkpoints.name
    about = {**ABOUT, **rng.choice(({}, {"training": "another"}, {"settings": {"epochs": 2.0}}))}
    if about["training"] == "another":  # a training of other data is put in its place
        with contextlib.suppress(FileNotFoundError):
            under_way(folder, "chat", about)
        return
    mine = under_way(folder, "chat", about)
    mine.attempts()
    peek(place)
    read_lines(place / "step-00000002" / "metrics.jsonl")
    for step in sorted(place.glob("step-*")):
        damage(step, {"training": "same"})
    found = Checkpoints(place, {"training": "same"}).newest()
    assert found is None or found.tensors()


def _make_run(world: World, folder: Path, rng: Random) -> None:
    shutil.copytree(
        world.run,
        folder / "run",
        ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "report.html", "*.arrow"),
    )
    names = (
        "summary.json",
        "measures.json",
        "base/trivium.json",
        "chat/trivium.json",
        "aligned/trivium.json",
        "chat/metrics.jsonl",
    )
    file = folder / "run" / rng.choice([name for name in names if (folder / "run" / name).is_file()])
    structural = file.suffix == ".json" and rng.random() < 0.8
    data = file.read_bytes()
    file.write_bytes(json_of(rng, data) if structural else bytes_of(rng, data, data))


def _call_run(world: World, folder: Path, rng: Random) -> None:
    if rng.random() < 0.2:
        record_of(folder / "run" / "chat")
        method_of(folder / "run" / "chat")
        base_of(folder / "run" / "chat")
        return
    page([run_view(folder / "run")])


Make = Callable[[World, Path, Random], None]
_KINDS: dict[str, tuple[Make, Make]] = {
    "recipe": (make_recipe, call_recipe),
    "rows": (_make_rows, _call_rows),
    "template": (_make_template, _call_template),
    "tokenizer": (_make_tokenizer, _call_tokenizer),
    "weights": (_make_weights, _call_model),
    "config": (_make_config, _call_model),
    "adapter": (_make_adapter, _call_adapter),
    "checkpoint": (_make_checkpoint, _call_checkpoint),
    "run": (_make_run, _call_run),
}
KINDS = {name: Kind(name, make, call) for name, (make, call) in _KINDS.items()}
