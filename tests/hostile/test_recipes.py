"""Hostile recipes: each is refused by ``trivium run`` before anything is read that it should not name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.hostile.conftest import MODEL, check_refused, command, nothing_left, some
from tests.hostile.spoil import code_in, device, directory, pipe, sparse
from tests.hostile.watch import Ground, watched

pytestmark = pytest.mark.promise(18)

PLAIN = {
    "name": "x",
    "stage": "sft",
    "data": "chats.jsonl",
    "max_steps": 1,
    "batch_size": 2,
    "eval_data": 0,
    "device": "cpu",
}
NEW = {**PLAIN, "stage": "pretrain", "data": "text.jsonl"}
PAIRS = {**PLAIN, "stage": "preference", "data": "pairs.jsonl"}


def recipe(stage: dict[str, Any] | None = None, **top: Any) -> Callable[[Path, str], Any]:
    """A sound recipe but for these keys, of its one stage or of the whole."""

    def write(here: Path, base: str) -> None:
        value = {"name": "r", "model": base, "prompts": [], "stages": [{**PLAIN, **(stage or {})}], **top}
        (here / "r.yaml").write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")

    return write


def text(written: str) -> Callable[[Path, str], Any]:
    """``BASE`` in it is the sound model."""
    return lambda here, base: (here / "r.yaml").write_text(written.replace("BASE", base), encoding="utf-8")


def besides(make: Callable[[Path], Any], write: Callable[[Path, str], Any]) -> Callable[[Path, str], Any]:
    """And something lies beside the recipe, at ``given``."""
    return lambda here, base: (make(here / "given"), write(here, base))


def new(**sizes: Any) -> Callable[[Path, str], Any]:
    return recipe(NEW, model={**MODEL, **sizes})


def changed(**config: Any) -> Callable[[Path, str], Any]:
    """A given model, with this changed in its config."""
    return lambda here, base: recipe(model={"path": base, **config})(here, base)


HEAD = "name: r\nmodel: BASE\nstages:\n- {name: x, stage: sft, data: chats.jsonl, max_steps: 1}\n"
LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else '1'}]\n" for n in range(12))
RECIPES: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    # YAML
    "a call in YAML": (text(HEAD + "prompts: !!python/object/apply:os.system ['touch it_ran']\n"), "r.yaml:5"),
    "an object in YAML": (text(HEAD + "judge: !!python/object:evil.Judge {}\n"), "r.yaml:5"),
    "a module in YAML": (text(HEAD + "prompts: !!python/module:evil\n"), "r.yaml:5"),
    "a tag of its own": (text(HEAD + "prompts: !include /etc/passwd\n"), "r.yaml:5"),
    "a billion laughs": (text(HEAD + LAUGHS), "r.yaml"),
    "a billion laughs as prompts": (text(LAUGHS.replace("a11:", "prompts:") + HEAD), "r.yaml"),
    "a billion laughs as a model": (text(LAUGHS + HEAD.replace("BASE", "{path: BASE, x: *a11}")), "r.yaml"),
    "an anchor that holds itself": (text(HEAD + "prompts: &a [*a]\n"), "r.yaml"),
    "a merge of itself": (text(HEAD + "judge: &a {<<: *a, reward: x}\n"), "r.yaml"),
    "nested 100,000 deep": (text(HEAD + "prompts: " + "[" * 100_000), "r.yaml"),
    "nested 5,000 deep": (text(HEAD + "prompts: " + "[" * 5_000 + "]" * 5_000), "r.yaml"),
    "a number of 100,000 digits": (text(HEAD + "seed: " + "9" * 100_000), "r.yaml"),
    "a number in base 60": (text(HEAD + "seed: 1" + ":59" * 2000), "seed"),
    # the recipe's own file
    "a recipe that is a pipe": (lambda here, base: pipe(here / "r.yaml"), "r.yaml"),
    "a recipe that is a device": (lambda here, base: device(here / "r.yaml"), "r.yaml"),
    "a recipe that is a folder": (lambda here, base: directory(here / "r.yaml"), "r.yaml"),
    "a recipe of 10 GB": (lambda here, base: sparse(here / "r.yaml", 10 * 10**9), "r.yaml"),
    "a recipe that is no text": (lambda here, base: (here / "r.yaml").write_bytes(b"\xff\xfe\x00"), "r.yaml"),
    # names and paths
    "a name with path parts": (recipe(name="../../x"), "name"),
    "a stage's name with path parts": (recipe({"name": "../../x"}), "name"),
    "a stage's name that is absolute": (recipe({"name": "/elsewhere/x"}), "name"),
    "a stage's name that is two dots": (recipe({"name": ".."}), "name"),
    "a stage's name of ten lines": (recipe({"name": "x\n" * 10}), "name"),
    "a stage's name of 300 signs": (recipe({"name": "x" * 300}), "name"),
    "a parent with path parts": (recipe({"from": "../../x"}), "from"),
    "an out of its own": (recipe(out="/etc"), "out"),
    "data that is /etc/passwd": (recipe({"data": "/etc/passwd"}), "/etc/passwd"),
    "data that is a device": (recipe({"data": "/dev/zero"}), "/dev/zero"),
    "data that is a pipe": (besides(pipe, recipe({"data": "given"})), "given"),
    "data of a pipe in a folder": (
        besides(lambda p: (p.mkdir(), pipe(p / "rows.jsonl")), recipe({"data": "given"})), "no data files in",
    ),
    "data of a link to a device": (
        besides(lambda p: (p.mkdir(), device(p / "rows.jsonl")), recipe({"data": "given/*.jsonl"})), "no data files in",
    ),
    "data at a URL": (recipe({"data": "https://example.org/rows.jsonl"}), "no such file"),
    "data at a file URL": (recipe({"data": "file:///etc/passwd"}), "file:"),
    "data on the hub, with path parts": (recipe({"data": "hf://../../etc/passwd"}), "hf://"),
    "held-out data that is a device": (recipe({"eval_data": "/dev/zero"}), "/dev/zero"),
    "data with a zero byte": (text(HEAD.replace("chats.jsonl", '"a\\0b"')), "data"),
    "data of 300 signs": (recipe({"data": "x" * 300}), "data"),
    "eval_text that is a device": (recipe(eval_text="/dev/zero"), "/dev/zero"),
    "eval_text that is a pipe": (besides(pipe, recipe(eval_text="given")), "given"),
    "eval_text that is /etc/passwd": (recipe(eval_text="/etc/passwd"), "/etc/passwd"),
    # code
    "a method in a module": (recipe({"method": {"name": "evil.Method"}}), "no method"),
    "a method with a target": (recipe({"method": {"name": "lora", "_target_": "os.system"}}), "_target_"),
    "a loss in a module": (recipe({"loss": "evil.loss"}), "evil.loss"),
    "an optimizer in a module": (recipe({"optimizer": "evil.Adam"}), "optimizer"),
    "a device in a module": (recipe({"device": "evil.device"}), "device"),
    "a tracker in a module": (recipe(track="evil"), "track"),
    "target_modules that hang": (
        recipe({"method": {"name": "lora", "target_modules": ["*a" * 40 + "*b"]}}), "target_modules",
    ),
    "attention of the hub": (changed(_attn_implementation="owner/kernel"), "_attn_implementation"),
    "code in the config": (changed(auto_map={"AutoConfig": "evil.Config"}), "auto_map"),
    "a quantiser in the config": (changed(quantization_config={"quant_method": "evil.Q"}), "quantization_config"),
    "an architecture in a module": (new(architecture="evil.Model"), "evil.Model"),
    "an architecture with path parts": (new(architecture="../../evil"), "../../evil"),
    "a new model's attention of the hub": (new(attn_implementation="owner/kernel"), "attn_implementation"),
    "a new model's code": (new(auto_map={"AutoConfig": "evil.Config"}), "auto_map"),
    "a new model of a billion layers": (new(num_hidden_layers=10**9), "num_hidden_layers"),
    "a new model of a billion wide": (new(hidden_size=10**9), "hidden_size"),
    "a new model's vocabulary of 10**12": (new(vocab_size=10**12), "vocab_size"),
    "a tokenizer at a device": (new(tokenizer="/dev/zero"), "/dev/zero"),
    "a model at a URL": (recipe(model="https://example.org/model"), "no such model folder"),
    "a model that is a device": (recipe(model="/dev/zero"), "/dev/zero"),
    # a judge
    "a judge at a file URL": (recipe(PAIRS, judge={"endpoint": "file:///etc/passwd", "model": "m"}), "file:"),
    "a judge at an FTP URL": (recipe(PAIRS, judge={"endpoint": "ftp://example.org", "model": "m"}), "ftp:"),
    "a judge with a line end": (recipe(PAIRS, judge={"endpoint": "http://h/v1\r\nX: y", "model": "m"}), "http"),
    "a judge that is a device": (recipe(PAIRS, judge={"reward": "/dev/zero"}), "/dev/zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", some(RECIPES))
def test_a_recipe_is_refused(name, sound, tmp_path, tried):
    tried(folders=1)
    write, says = RECIPES[name]
    for rows in sound.here.glob("*.jsonl"):
        (tmp_path / rows.name).write_bytes(rows.read_bytes())
    code_in(tmp_path)
    write(tmp_path, str(sound.run / "base"))
    act = command("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    check_refused(watched([act], Ground((tmp_path, sound.here), tmp_path / "out", (tmp_path / "evil.py",))), says)
    nothing_left(tmp_path, tmp_path)


def test_a_sound_recipe_is_run(sound, tmp_path):
    """What the cases are spoilt from."""
    for rows in sound.here.glob("*.jsonl"):
        (tmp_path / rows.name).write_bytes(rows.read_bytes())
    recipe()(tmp_path, str(sound.run / "base"))
    act = command("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    seen = watched([act], Ground((tmp_path, sound.here), tmp_path / "out"))
    assert (seen.faults, [code for code, _ in seen.ended]) == ([], [0]), seen
