"""Hostile folders of trivium's own making: a record that points elsewhere, a checkpoint to go on from that lies."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.crash.process import Process
from tests.hostile.conftest import STAGE, Sound, check_refused, command, some, ways_in
from tests.hostile.spoil import (
    change_tensor,
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
from tests.hostile.test_models import json_bomb
from tests.hostile.watch import Ground, watched

from trivium import files

pytestmark = pytest.mark.promise(18)

RECORD, MANIFEST, STATE, WEIGHTS = "trivium.json", "manifest.json", "state.json", "weights.safetensors"


def record(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: rewrite(folder / RECORD, **changes)


def at_base(**changes: Any) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        base = json.loads((folder / RECORD).read_text())["base"]
        rewrite(folder / RECORD, base={**base, **changes})

    return spoil


RECORDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a base that is /etc/passwd": (at_base(path="/etc/passwd", source="/etc/passwd"), "is no model"),
    "a base far above": (at_base(path="../" * 20 + "etc", source="/etc"), ""),
    "a base that is itself": (at_base(path=".", source="."), "is itself an adapter"),
    "a base that is a device": (at_base(path="/dev/zero", source="/dev/zero"), "is no model"),
    "a base at a URL": (at_base(path="https://example.org/x", source="https://example.org/x"), ""),
    "a base of another identity": (at_base(identity="0" * 64), "an adapter for another base"),
    "a base that is a list": (record(base=["x"]), "not a record"),
    "an identity that is a path": (record(identity=["../../x"]), "not a record"),
    "a lineage that is a number": (record(lineage=5), "not a record"),
    "a lineage of paths": (record(lineage=["../../x"]), "not a record"),
    "a method in a module": (record(settings={"method": {"name": "evil.Method"}}), "no method"),
    "a method with a target": (record(settings={"method": {"name": "lora", "_target_": "os.system"}}), "_target_"),
    "a method that is a list": (record(settings={"method": {"name": ["lora"]}}), "no method"),
    "a record that is a pipe": (lambda f: pipe(f / RECORD), ""),
    "a record that is a link out": (lambda f: moved_out(f / RECORD), "a link out of its folder"),
    "a record of 10 GB": (lambda f: sparse(f / RECORD, 10 * 10**9), "is the most"),
    "a record nested 100,000 deep": (lambda f: json_bomb(100_000)(f / RECORD), RECORD),
}  # fmt: skip


@pytest.mark.parametrize("name", some(RECORDS))
def test_a_record_is_refused(name, sound, tmp_path, tried):
    tried(folders=1)
    spoil, says = RECORDS[name]
    folder = Path(shutil.copytree(sound.run, tmp_path / "run")) / "chat"
    spoil(folder)
    outside = list((tmp_path / "run" / "outside").glob("*")) if (tmp_path / "run" / "outside").exists() else []
    seen = watched(ways_in(folder, tmp_path, sound), Ground((tmp_path / "run", sound.here), tmp_path, tuple(outside)))
    harmless = (
        "URL",
        "far above",
        "method",
        "pipe",
    )  # what is asked of the base, or of how to train on, is asked by some
    check_refused(seen, says, tuple(range(7)) if any(word in name for word in harmless) else (4,))


# --- checkpoints


@pytest.fixture(scope="session")
def interrupted(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped, with checkpoints to go on from."""
    here = tmp_path_factory.mktemp("interrupted")
    stage = {**STAGE, "data": "chats.jsonl", "max_steps": 4, "save_every": 1, "keep_checkpoints": 1}
    recipe = {"name": "r", "prompts": [], "model": str(sound.run / "base"), "stages": [stage]}
    (here / "chats.jsonl").write_bytes((sound.here / "chats.jsonl").read_bytes())
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert Process(here / "recipe.yaml", meanwhile=dies_after_a_checkpoint).wait().killed
    return here


def dies_after_a_checkpoint() -> None:
    def operation(name: str, path: Path, act: Callable[[], Any]) -> Any:
        done = act()
        if name == "rename" and path.name == "step-00000002":
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    files.operation = operation


def sealed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and seal it again as if it had been written so."""
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    change(body)
    (folder / MANIFEST).write_text(files._sealed(body))


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda folder: sealed(folder, change)


def again(spoil: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """What is spoilt is sealed as if it were right."""

    def both(folder: Path) -> None:
        about = json.loads((folder / MANIFEST).read_text())["about"]
        spoil(folder)
        (folder / MANIFEST).unlink()
        files.seal(folder, about)

    return both


PASSWD = [Path("/etc/passwd").stat().st_size, files.sha256_file(Path("/etc/passwd"))]
CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "a file above": manifest(lambda b: b["files"].update({"../../../../../../../../etc/passwd": PASSWD})),
    "an absolute file": manifest(lambda b: b["files"].update({"/etc/passwd": PASSWD})),
    "files that are a list": manifest(lambda b: b.update(files=["/etc/passwd"])),
    "files that are numbers": manifest(lambda b: b.update(files={WEIGHTS: 5})),
    "a length that is a text": manifest(lambda b: b["files"].update({WEIGHTS: ["x", "y"]})),
    "about that is a list": manifest(lambda b: b.update(about=[])),
    "a manifest that is a list": lambda f: (f / MANIFEST).write_text("[]"),
    "a manifest that is a pipe": lambda f: pipe(f / MANIFEST),
    "a manifest that is a device": lambda f: device(f / MANIFEST),
    "a manifest of 10 GB": lambda f: sparse(f / MANIFEST, 10 * 10**9),
    "a manifest nested 100,000 deep": lambda f: (f / MANIFEST).write_text("[" * 100_000),
    "weights that are a pickle": again(lambda f: pickle_in(f, WEIGHTS)),
    "weights of 2**63 bytes": again(lambda f: with_header(f / WEIGHTS, b"{}", 2**63)),
    "weights that are a link out": lambda f: moved_out(f / WEIGHTS),
    "weights that are a pipe": lambda f: pipe(f / WEIGHTS),
    "weights that are a device": lambda f: device(f / WEIGHTS),
    "weights that are a folder": lambda f: directory(f / WEIGHTS),
    "a state that is a list": again(lambda f: (f / STATE).write_text("[]")),
    "a state of other types": again(lambda f: rewrite(f / STATE, best=["../../x"])),
    "a state of other times": again(lambda f: rewrite(f / STATE, elapsed="x")),
    "a state of other costs": again(lambda f: rewrite(f / STATE, costs={"seconds": ["x"]})),
    "weights of another name": again(lambda f: rename_tensor(f / WEIGHTS, "../../x")),
    "moments of another shape": again(lambda f: change_tensor(f / "optimizer.safetensors", dtype="I32")),
    "random numbers of another name": again(lambda f: rename_tensor(f / "rng.safetensors", "evil")),
    "no weights at all": again(lambda f: (f / WEIGHTS).unlink()),
    "a state that is a link out": lambda f: moved_out(f / STATE),
    "a state nested 100,000 deep": again(lambda f: (f / STATE).write_text("[" * 100_000)),
    "a pipe besides": lambda f: pipe(f / "more.safetensors"),
    "a device besides": lambda f: device(f / "more.safetensors"),
    "a pickle besides": lambda f: pickle_in(f, "optimizer.pt"),
}
GOES_ON = ("a pipe besides", "a device besides", "a pickle besides")  # as if it were not there


@pytest.mark.parametrize("name", some(CHECKPOINTS))
def test_a_checkpoint_is_refused(name, interrupted, sound, tmp_path, tried):
    tried(folders=1)
    here = Path(shutil.copytree(interrupted, tmp_path / "here"))
    for folder in here.rglob("step-*"):
        CHECKPOINTS[name](folder)
    bait = [*here.rglob("*.pt"), *here.rglob("outside/*")]
    act = command("run", here / "recipe.yaml", "--out", here / "out")
    ground = Ground((here, sound.here), here / "out", tuple(bait))
    seen = watched([act], ground)
    code, said = seen.ended[0] if seen.ended else (1, str(seen))
    assert seen.faults == [], said
    assert "Traceback" not in said
    assert code == (0 if name in GOES_ON else 4), said
    assert "goes on after step 2" in said if code == 0 else "checkpoint" in said[said.index("error: ") :]
