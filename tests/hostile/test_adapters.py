"""Hostile adapter folders: a sound LoRA with one thing spoilt, refused in every way in, also by ``trivium merge``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hostile.conftest import check_refused, nothing_left, some, ways_in
from tests.hostile.spoil import (
    change_tensor,
    code_in,
    device,
    directory,
    moved_out,
    pickle_in,
    pipe,
    rename_tensor,
    rewrite,
    sparse,
    with_header,
)
from tests.hostile.test_models import file, json_bomb
from tests.hostile.watch import CODE, Ground, watched

pytestmark = pytest.mark.promise(18)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Spoil = Callable[[Path], Any]
SLOW = "(" * 20 + "a" + "*)" * 20 + "*b"  # a pattern that takes forever on a long name


def config(**changes: Any) -> Spoil:
    return lambda folder: (code_in(folder), rewrite(folder / CONFIG, **changes))


def on(base: str) -> Spoil:
    return config(base_model_name_or_path=base)


def circle(folder: Path) -> None:
    """A is an adapter on B, B one on A."""
    other = folder.parent / "other"
    other.mkdir()
    for one in folder.iterdir():
        (other / one.name).write_bytes(one.read_bytes())
    rewrite(folder / CONFIG, base_model_name_or_path=str(other))
    rewrite(other / CONFIG, base_model_name_or_path=str(folder))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return spoil


def base_that_is(make: Callable[[Path], Any]) -> Spoil:
    """Its base lies beside it, and is no model."""

    def spoil(folder: Path) -> None:
        make(folder.parent / "base")
        rewrite(folder / CONFIG, base_model_name_or_path="../base")

    return spoil


def first(held: dict[str, torch.Tensor]) -> str:
    return next(iter(held))


ADAPTERS: dict[str, tuple[Spoil, str]] = {
    # code
    "weights only as a pickle": (lambda f: ((f / WEIGHTS).unlink(), pickle_in(f, "adapter_model.bin")), "pickle"),
    "a pickle named .safetensors": (lambda f: pickle_in(f, WEIGHTS), "not a safetensors file"),
    "auto_mapping to a module": (
        config(auto_mapping={"base_model_class": "Model", "parent_library": "evil"}), "auto_mapping",
    ),
    "auto_map": (config(auto_map={"AutoConfig": "evil.Config"}), "auto_map"),
    "trust_remote_code": (config(trust_remote_code=True), "trust_remote_code"),
    "_target_": (config(_target_="os.system"), "_target_"),
    "a pickle as the start": (config(init_lora_weights="../../evil.pt"), "init_lora_weights"),
    # the base
    "its own base": (on("."), "is itself an adapter"),
    "a circle of two": (circle, "is itself an adapter"),
    "a base at a URL": (on("https://example.org/evil"), "its base model is not at"),
    "a base at a file URL": (on("file:///etc/passwd"), "its base model is not at"),
    "a base far above": (on("../../../../../../../../../etc"), "not a model folder"),
    "a base that is /etc/passwd": (on("/etc/passwd"), "is no model"),
    "a base that is a device": (on("/dev/zero"), "is no model"),
    "a base that is a number": (on(7), "names no base"),  # type: ignore[arg-type]
    "a base that is a pipe": (base_that_is(pipe), "is no model"),
    "a base of 10 kB of path": (on("../" * 3000 + "x"), "its base model is not at"),
    "a base with a zero byte": (on("a\0b"), "an adapter that names no base"),
    "a base that is hostile": (
        base_that_is(lambda p: (p.mkdir(), rewrite(p / "config.json", model_type="x", auto_map={"AutoConfig": "e.C"}),
                                (p / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}"))), "code of its own",
    ),
    # settings
    "an unknown peft_type": (config(peft_type="EVIL"), "peft_type"),
    "a peft_type with path parts": (config(peft_type="../../evil"), "peft_type"),
    "a peft_type that is a list": (config(peft_type=["LORA"]), "peft_type"),
    "our own type, a nonsense": (config(trivium_type="../evil", peft_type=None), "../evil"),
    "our own type, a list": (config(trivium_type=["lora"], peft_type=None), "no method"),
    "r of a billion": (config(r=10**9), "r is 1000000000"),
    "r of a million": (config(r=10**6), "given"),
    "a negative r": (config(r=-4), "r is -4"),
    "r that is true": (config(r=True), "r is True"),
    "r that is a list": (config(r=[2]), "r is [2]"),
    "alpha that is NaN": (config(lora_alpha=float("nan")), "lora_alpha"),
    "alpha that is infinite": (config(lora_alpha=float("inf")), "alpha is inf"),
    "alpha of 10**300": (config(lora_alpha=1e300), "alpha is 1"),
    "rank_pattern that hangs": (config(rank_pattern={SLOW: 2}), "rank_pattern"),
    "alpha_pattern that hangs": (config(alpha_pattern={SLOW: 2}), "alpha_pattern"),
    "rank_pattern that is a list": (config(rank_pattern=[1, 2]), "rank_pattern"),
    "modules_to_save without end": (config(modules_to_save=[f"m{n}" for n in range(10**5)]), "modules_to_save"),
    "modules_to_save of numbers": (config(modules_to_save=[1, None, {}]), "modules_to_save"),
    "target_parameters of code": (config(target_parameters=["__class__.__init__"]), "target_parameters"),
    "a setting nobody knows": (config(layer_replication=[[0, 10**9]]), "layer_replication"),
    "settings of 10 GB": (file(CONFIG, sparse, 10 * 10**9), "is the most"),
    "settings nested 100,000 deep": (file(CONFIG, json_bomb(100_000)), CONFIG),
    "settings that are a list": (file(CONFIG, lambda p: p.write_text("[]")), "does not hold settings"),
    "settings that are not text": (file(CONFIG, lambda p: p.write_bytes(b"\xff\xfe{}")), "not UTF-8"),
    # files
    "settings that are a link out": (file(CONFIG, moved_out), "a link out of its folder"),
    "settings that are a folder": (file(CONFIG, directory), ""),
    "settings that are a device": (file(CONFIG, device), ""),
    "weights that are a link out": (file(WEIGHTS, moved_out), "a link out of its folder"),
    "weights that are a pipe": (file(WEIGHTS, pipe), "no regular file"),
    "weights that are a device": (file(WEIGHTS, device), "a link out of its folder"),
    "weights that are a link to themselves": (file(WEIGHTS, device, WEIGHTS), "a link to nothing"),
    # weights
    "header of 2**63 bytes": (file(WEIGHTS, with_header, b"{}", 2**63), "longer than the file"),
    "a shape that overflows": (file(WEIGHTS, lambda p: change_tensor(p, shape=[2**62, 4])), "not a safetensors file"),
    "a tensor named as a path": (file(WEIGHTS, rename_tensor, "../../etc/passwd"), "../../etc/passwd"),
    "a tensor named as an attribute": (
        file(WEIGHTS, rename_tensor, "base_model.model.__class__.lora_A.weight"), "__class__",
    ),
    "a tensor of a module that is not there": (
        tensors(lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(2, 32)})), "x",
    ),
    "another rank": (tensors(lambda t: t.update({first(t): torch.zeros(64, 32)})), "given"),
    "numbers that are none": (
        tensors(lambda t: t.update({first(t): torch.full_like(t[first(t)], torch.nan)})), "no finite",
    ),
    "numbers that are whole": (tensors(lambda t: t.update({first(t): t[first(t)].int()})), "no finite fractions"),
}  # fmt: skip
SHOW, INSPECT, JUDGED, LOAD, MERGE = 2, 3, 4, 5, 6
# What is wrong with an adapter's own settings and weights is found when it is hung in its base: to show rows only its
# tokenizer is looked at, and to inspect it the headers.
LATE = (SHOW, INSPECT, JUDGED)


@pytest.mark.parametrize("name", some(ADAPTERS))
def test_an_adapter_folder_is_refused(name, sound, tmp_path, tried):
    tried(folders=1)
    spoil, says = ADAPTERS[name]
    folder = sound.copy("chat", tmp_path)
    rewrite(folder / CONFIG, base_model_name_or_path=str(sound.run / "base"))
    spoil(folder)
    bait = [p for p in folder.rglob("*") if p.suffix in CODE and p.is_file()]
    outside = list((tmp_path / "outside").glob("*")) if (tmp_path / "outside").exists() else []
    near = [tmp_path / beside for beside in ("other", "base")]
    seen = watched(ways_in(folder, tmp_path, sound), Ground((folder, *near, sound.here), tmp_path, (*bait, *outside)))
    check_refused(seen, says, LATE)
    nothing_left(folder, tmp_path)


HARMLESS: dict[str, Spoil] = {
    "pickles beside the weights": lambda f: [pickle_in(f, n) for n in ("adapter_model.bin", "optimizer.pt", "x.ckpt")],
    "target_modules that hang": config(target_modules=SLOW),
    "auto_mapping of transformers": config(
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        }
    ),
    "a module of megatron": config(megatron_core="evil.core"),
    "a revision": config(revision="../../evil"),
}


@pytest.mark.parametrize("name", some(HARMLESS))
def test_what_is_harmless_changes_nothing(name, sound, tmp_path, tried):
    """The tensors say what is adapted; what PEFT would import or match is read by nobody."""
    tried(folders=1)
    folder = sound.copy("chat", tmp_path)
    rewrite(folder / CONFIG, base_model_name_or_path=str(sound.run / "base"))
    HARMLESS[name](folder)
    bait = tuple(p for p in folder.rglob("*") if p.suffix in CODE)
    seen = watched(ways_in(folder, tmp_path, sound), Ground((folder, sound.here), tmp_path, bait))
    assert seen.faults == []
    assert [code for code, _ in seen.ended] == [0, 0, 0, 0, 2, 0, 0], seen.ended
