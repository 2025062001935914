"""``python -m tests.fuzz KIND SEED NUMBER``: one case, in this process, with whatever is raised.

``python -m tests.fuzz KIND SEED FROM-TO`` carries out many, and prints each fault and how long it took;
a fourth argument asks for so many of the messages that were most frequent.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def main(name: str, seed: str, numbers: str, most: str = "0") -> int:
    from tests.fuzz.harness import Tally, carried_out, fuzz
    from tests.fuzz.kinds import KINDS
    from tests.fuzz.world import make

    scratch = Path(tempfile.mkdtemp(prefix="trivium-fuzz-"))
    (scratch / "world").mkdir()
    os.environ["TRIVIUM_CACHE"] = str(scratch / "cache")
    with contextlib.redirect_stderr(io.StringIO()):
        world = make(scratch / "world")
    first, _, end = numbers.partition("-")
    if not end:
        print(carried_out(KINDS[name], world, int(seed), int(first), scratch, show=True))
        print(f"its files: {scratch}/{name}-{first}, the sound ones: {scratch}/world")
        return 0
    tally, started, count = Tally(), time.perf_counter(), 0
    for fault in fuzz(KINDS[name], world, int(seed), range(int(first), int(end)), scratch, tally):
        print(fault, flush=True)
        count += 1
    seconds = time.perf_counter() - started
    ended = f"{tally.fine} fine, {tally.refused} refused, {count} bad; the slowest took {tally.slowest:.2f} s"
    print(f"{name}: {int(end) - int(first)} cases in {seconds:.1f} s: {ended}")
    for what, times in tally.said.most_common(int(most)):
        print(f"{times:6}  {what}")
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
