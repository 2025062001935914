"""The kinds of cases: how the files of one are mutated, and what the program would do with them."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml
from tests.fuzz.harness import Kind
from tests.fuzz.mutate import ODD, Raw, as_json, bytes_of, json_of, misspelt, value_of
from tests.fuzz.world import ABOUT, PACKINGS, ROWS, World, packed

from trivium import chain
from trivium.checks import check_fit
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
from trivium.peft.settings import METHODS, PRESETS
from trivium.recipe_file import read_recipe
from trivium.report.write import page, run_view
from trivium.train.checkpoint import Checkpoints, peek
from trivium.under_way import under_way

# --- recipes

YAML_ODD = (
    "!!python/object/apply:os.system [x]", "!!binary aGk=", "!!set {a, b}", "&a [*a]", "*nowhere", "1:30", "0o17",
    "2020-01-01",
    "2020-13-45", "~", ".nan", "-.inf", "1_000", "yes", "|\n  a\n b", "? a\n: b", "---", "'", '"', "{", "- - -",
    "\t- a", "%TAG ! x",
    "<<: *a", "<<: {a: 1}", "@a", "`a`", "[a, b", "{a: {b: {c: [1, {d: 2}]}}}", "\ufeff", "\u2028", "a: b: c",
    "!!int x", "!!timestamp x",
    "0x" + "f" * 400, "1" + "0" * 5000, "[" * 400, "{a: " * 400, "9" * 30 + ":1", "=", "!!float 1e999", "1e999",
    "2020-01-01T25:61:00",
)  # fmt: skip
BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
GOOD = {
    "epochs": [1, 0.5], "max_steps": [1, 3], "batch_size": [1, 4], "batch_tokens": [64], "micro_batch_tokens": [64],
    "learning_rate": [1e-3],
    "schedule": ["cosine", "wsd"], "warmup_ratio": [0, 0.1], "optimizer": ["adamw", "muon"], "weight_decay": [0.1],
    "max_grad_norm": [1],
    "max_length": [32, 64], "on_overflow": ["drop", "split", "truncate_left"], "bad_rows": [0, 1],
    "duplicates": ["drop"], "scored": ["all"],
    "date": ["2024-01-01"], "train_on": ["last", "all"], "recompute": ["layers", 1], "memory": ["2GB", "1.5 GiB"],
    "dropout": [0.1],
    "eval_data": [0.1, "pairs.jsonl", ["text.jsonl"]], "eval_every": [2], "save_every": [3], "save_minutes": [1.5],
    "keep_checkpoints": [1],
    "result": ["best"], "skip_non_finite": [1], "seed": [3], "dtype": ["float32", "auto"], "device": ["cpu", "cuda:7",
    "mps"], "beta": [0.2],
    "loss": ["ipo", "kto", "orpo", {"dpo": 1, "hinge": 0.5}, "simpo"], "sft_weight": [0.1], "label_smoothing": [0.1],
    "gamma": [0.5],
    "divergence": ["js", "alpha"], "divergence_alpha": [0.5], "ld_alpha": [0.5], "desirable_weight": [1],
    "undesirable_weight": [2],
    "center_rewards": [0.01], "reference": ["kept"], "reference_sync_steps": [5], "reference_mixup": [0.5],
    "data": [["text.jsonl", {"path": "chats.jsonl", "weight": 2}], "*.jsonl", {"path": "pairs.jsonl",
    "fields": {"prompt": "q"}}, "."],
}  # fmt: skip
TOP = {"track": ["tensorboard", "wandb"], "prompts": [[], ["a"]], "judge": [{"reward": "taste"},
    {"endpoint": "http://localhost:1/v1", "model": "x"}],
       "judge_prompts": [0, 2], "eval_text": ["text.jsonl"], "seed": [1]}  # fmt: skip
METHOD_VALUES = (
    1,
    2,
    0.5,
    "q_proj",
    ["q_proj", "v_proj"],
    {"q_proj": 4},
    "all-linear",
    "nf4",
    True,
    "pissa",
    "houlsby",
    "(a+)+$",
    "*",
    "[",
)


class Far(Exception):
    """The recipe was found good; what comes now takes a model."""


def _make_recipe(world: World, folder: Path, rng: Random) -> None:
    for file in world.folder.glob("*.jsonl"):
        shutil.copy(file, folder)
    value = copy.deepcopy(rng.choice(world.recipes))
    for _ in range(rng.choice((0, 1, 3))):
        name = rng.choice([*GOOD, "method"])
        rng.choice(value["stages"])[name] = _method(rng) if name == "method" else rng.choice(GOOD[name])
    if rng.random() < 0.2:
        name = rng.choice(list(TOP))
        value[name] = rng.choice(TOP[name])
    how = rng.random()
    if how < 0.5:
        text = as_json(value_of(rng, value), indent=rng.random() < 0.5)
    else:
        text = yaml.safe_dump(value, sort_keys=False)
        text = _lines(rng, text) if how < 0.75 else text
    data = text.encode("utf-8", "surrogatepass")
    if how >= 0.75:
        data = bytes_of(rng, data, yaml.safe_dump(rng.choice(world.recipes), sort_keys=False).encode())
    (folder / "recipe.yaml").write_bytes(data)


def _method(rng: Random) -> Any:
    """Any method, with some of its settings."""
    name = rng.choice([*METHODS, *PRESETS])
    known = [f.name for f in fields(METHODS[PRESETS.get(name, {"name": name})["name"]].settings)]
    return {"name": name, **{k: rng.choice(METHOD_VALUES) for k in known if rng.random() < 0.2}}


def _lines(rng: Random, text: str) -> str:
    """Lines of a YAML file changed: another value, another indent, a line twice or elsewhere."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        odd = rng.choice(YAML_ODD)
        ways = (f"{key}{colon} {odd}", f"{key}{colon} {odd}", lines[at][1:], f" {lines[at]}",
            f"{lines[at]}\n{lines[at]}", odd, "",
                lines[rng.randrange(len(lines))], f"{misspelt(rng, key)}{colon} 1",
                    f"{key}{colon} *b{rng.randrange(9)}")  # fmt: skip
        lines[at] = rng.choice(ways)
    text = "\n".join(lines)
    return BOMB + text if "*b" in text else text


def _call_recipe(world: World, folder: Path, rng: Random) -> None:
    overrides = []
    while rng.random() < 0.15:
        place = f"{rng.choice(('chat', 'base', 'x', '0'))}.{rng.choice([*GOOD, 'method', 'method.r', 'name'])}"
        others = ("model", "model.hidden_size", "stages", "", "a.b", "stages.chat", "model.path")
        key = rng.choice([f"stages.{place}", *TOP, *others])
        odd = rng.choice((*YAML_ODD, *(as_json(o) for o in ODD), "1", "lora", "text.jsonl"))
        overrides.append(rng.choice((f"{key}={odd}", key, f"={odd}")))
    recipe = read_recipe(folder / "recipe.yaml", overrides)
    with mock.patch.object(chain, "make_folder", side_effect=Far), contextlib.suppress(Far):
        chain.run_recipe(recipe, folder / "out")
    settings, _ = chain._resolved(recipe, recipe.stages)
    check_fit(world.model, recipe, [*settings.values()])


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
    "recipe": (_make_recipe, _call_recipe),
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
