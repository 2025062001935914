"""One run of a comparison, in a process of its own, so that its peak of memory is its method's.

    python -m trivium.comparing.worker RECIPE FOLDER [REQUESTS]

It goes on until it is done, or until its standard input is closed, and be it because the process that started it has
died: then it stops as at a signal. What came of it is the one JSON on its standard output: ``{}``,
``{"merge_difference": ...}`` or ``{"error": {"kind", "what", "remedy"}}``. ``REQUESTS`` is for the demo's judge.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.errors import Interrupted, UserError
from trivium.files import read_json, write_json
from trivium.interrupt import Stopped, asked, ignore, stop_at_once

if TYPE_CHECKING:
    from trivium.evaluate.judge import Judge, Verdict
    from trivium.talk import Talker

MERGED = "merged.json"  # what was measured of a finished model, by its identity


def main() -> None:
    channel = os.dup(1)
    os.dup2(2, 1)  # what a library prints is for people
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    stop_at_once()
    threading.Thread(target=_stop_when_closed, daemon=True).start()
    told, code = outcome(*sys.argv[1:])
    ignore()
    os.write(channel, json.dumps(told).encode())
    sys.exit(code)


def _stop_when_closed() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def outcome(recipe: str, folder: str, requests: str = "") -> tuple[dict[str, Any], int]:
    """What came of the run, and the exit code; our own mistakes pass through."""
    try:
        return carry_out(Path(recipe), Path(folder), requests), 0
    except UserError as error:
        found = error
    except BaseException as error:
        if not (asked() or isinstance(error, (Stopped, KeyboardInterrupt))):
            raise
        found = Interrupted("interrupted; what was trained is saved", "run the same command again to go on")
    told = {"kind": type(found).__name__, "what": found.what, "remedy": found.remedy}
    return {"error": told}, found.exit_code


def carry_out(recipe: Path, folder: Path, requests: str = "") -> dict[str, Any]:
    """Run a recipe; returns how far an adapter is from its merged model, where it can be merged."""
    from trivium.recipe_file import read_recipe

    read = read_recipe(recipe)
    from trivium.chain import run_recipe

    summary = run_recipe(read, folder, judge=_judge(Path(requests)) if requests else None)
    last = folder / summary["stages"][-1]["name"]
    return {} if summary["stages"][-1]["method"] == "full" else {"merge_difference": _merge_difference(last)}


def _merge_difference(folder: Path) -> float | None:
    from trivium.merging import merge_difference

    file = folder.parent / MERGED
    identity = read_json(folder / "trivium.json")["identity"]
    known = read_json(file) if file.is_file() else {}
    if known.get("identity") != identity:
        known = {"identity": identity, "difference": merge_difference(str(folder))}
        write_json(file, known)
    found: float | None = known["difference"]
    return found


def _judge(requests: Path) -> Judge:
    """The demo's judge, asked at the end alone."""
    from trivium.demo.show import judge_of
    from trivium.files import read_lines

    whole = judge_of(read_lines(requests))

    def judge(talker: Talker, most: int | None) -> dict[str, Verdict]:
        return {} if most is not None else dict(whole(talker, most))

    judge.key = whole.key  # type: ignore[attr-defined]
    return judge


if __name__ == "__main__":
    main()
