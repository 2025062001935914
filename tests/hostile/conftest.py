"""Sound folders, made once; and the ways in which a folder is looked at, each in a process that is watched."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.crash.process import write_rows
from tests.hostile.spoil import RAN
from tests.hostile.watch import GIVEN_SECONDS, MOST_MEMORY, Seen

MODEL = {"architecture": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "vocab_size": 320, "max_position_embeddings": 128}  # fmt: skip
STAGE = {"name": "x", "stage": "sft", "max_steps": 1, "batch_size": 2, "eval_data": 0, "device": "cpu"}
PAIRS = {**STAGE, "stage": "preference"}


@dataclass
class Sound:
    """Folders that nothing is wrong with, and the rows they were made of; only ever copied."""

    here: Path

    @property
    def run(self) -> Path:
        return self.here / "out"

    def copy(self, kind: str, to: Path) -> Path:
        """``base`` (a whole model) or ``chat`` (a LoRA on it), as from elsewhere: without trivium's own files."""
        folder = Path(shutil.copytree(self.run / kind, to / "given"))
        for name in ("trivium.json", "manifest.json", "metrics.jsonl", "rows.jsonl"):
            (folder / name).unlink(missing_ok=True)
        return folder


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """One run of two stages; and every way in has been gone once, so that what is imported late is imported."""
    from trivium.chain import run_recipe
    from trivium.recipe_file import read_recipe

    here = tmp_path_factory.mktemp("sound")
    write_rows(here)
    base = {**STAGE, "name": "base", "stage": "pretrain", "data": "text.jsonl"}
    chat = {**STAGE, "name": "chat", "from": "base", "data": "chats.jsonl", "method": {"name": "lora", "r": 2}}
    text = yaml.safe_dump({"name": "sound", "model": MODEL, "prompts": [], "stages": [base, chat]})
    (here / "recipe.yaml").write_text(text, encoding="utf-8")
    torch.set_num_threads(1)
    run_recipe(read_recipe(here / "recipe.yaml"), here / "out")
    found = Sound(here)
    for kind in ("base", "chat"):
        first = tmp_path_factory.mktemp("first")
        with signals_kept():
            for act in ways_in(found.copy(kind, first), first, found):
                with contextlib.suppress(SystemExit):
                    act()
    return found


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """A command that ends with an error ignores signals from then on: so would this process, and all that it starts."""
    from trivium import interrupt

    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        interrupt._asked.clear()


def some(names: Iterable[str]) -> list[Any]:
    """The cases as parameters: every third is always run, the others with the slow tests (all: 80 s of one core)."""
    return [pytest.param(name, marks=[pytest.mark.slow] if n % 3 else []) for n, name in enumerate(names)]


def command(*arguments: object) -> Callable[[], None]:
    """``trivium ...`` as in a shell."""

    def act() -> None:
        from trivium.cli.main import main

        sys.argv = ["trivium", *map(str, arguments)]
        main()

    return act


def ways_in(source: Path, here: Path, sound: Sound) -> list[Callable[[], None]]:
    """Every way to look at a model or adapter: to ask it, to look at it, to show rows to it, to train it, to judge by
    it, to load it in a notebook; and, of an adapter, to merge it."""

    def load() -> None:
        import trivium

        trivium.load(source, device="cpu")

    recipe = {
        "name": "r",
        "prompts": [],
        "model": str(source),
        "stages": [{**STAGE, "data": str(sound.here / "chats.jsonl")}],
    }
    (here / "run.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    judged = {**recipe, "model": str(sound.run / "base"), "judge": {"reward": str(source)},
              "stages": [{**PAIRS, "data": str(sound.here / "pairs.jsonl")}]}  # fmt: skip
    (here / "judged.yaml").write_text(yaml.safe_dump(judged), encoding="utf-8")
    ways = [
        command("generate", source, "hello", "--max-new-tokens", 1),
        command("run", here / "run.yaml", "--out", here / "out"),
        command("data", "show", "--model", source, sound.here / "chats.jsonl"),
        command("inspect", source),
        command("run", here / "judged.yaml", "--out", here / "judged"),
        load,
    ]
    merge = command("merge", source, "--out", here / "merged")
    return [*ways, merge] if (source / "adapter_config.json").exists() else ways


def check_refused(seen: Seen, says: str, passes: tuple[int, ...] = ()) -> None:
    """Every way in ends with a user's error that says so; ``passes`` are those that never look at what is spoilt."""
    assert seen.faults == [], seen.faults
    assert seen.grown < MOST_MEMORY, f"{seen.grown:,} bytes more"
    for number, (code, said) in enumerate(seen.ended):
        if number in passes:
            assert code in (0, 2), said
            continue
        assert code == 2, f"way {number}: exit code {code}: {said}"
        assert "Traceback" not in said
        error = said[said.index("error: ") :].strip()
        assert error.count("\n") in (1, 2), f"one line of what, one of remedy: {error}"
        assert all(len(line) < 500 for line in error.splitlines()), error
        if number != 4 or "reward model" not in error:
            assert says in error, f"way {number}: {says!r} is not in {error!r}"
    for number, seconds in enumerate(seen.seconds):
        assert seconds < GIVEN_SECONDS, f"way {number}: {seconds:.1f} s"


def nothing_left(folder: Path, here: Path) -> None:
    """No code has run, and no half of anything is written."""
    assert not (folder / RAN).exists()
    for out in ("out", "judged", "merged"):
        left = [p for p in (here / out).rglob("*") if p.is_file()] if (here / out).exists() else []
        assert not left, left
