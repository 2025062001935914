"""trivium's side of a job: the recipe, carried out by the command line, and what each step cost."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    from trivium.cli.main import main as command
    from trivium.train.log import TrainingLog

    ended: list[float] = []  # by the clock
    step = TrainingLog.step

    def timed(self, *args, **more):  # type: ignore[no-untyped-def]
        ended.append(time.time())
        step(self, *args, **more)

    TrainingLog.step = timed  # type: ignore[method-assign]
    out = Path(task["out"])
    sys.argv = ["trivium", "run", task["recipe"], "--out", str(out)]
    try:
        command()
    except SystemExit as end:
        if end.code:
            raise
    rows = [json.loads(line) for line in (out / "bench" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    stage = json.loads((out / "summary.json").read_text())["stages"][0]
    result = {
        "losses": [row["loss"] for row in rows],
        "seconds": ended[-1] - ended[0] + rows[0]["seconds"] + stage["reference_seconds"],
        "step_seconds": [row["seconds"] for row in rows],
        "reference_seconds": stage["reference_seconds"],
        "first_step_at": ended[0],
        "counts": [[row["tokens"], row["trained_tokens"]] for row in rows],
        "trained_parameters": stage["trained_parameters"],
        "own_peak_bytes": stage["peak_memory_bytes"],
        "versions": {name: version(name) for name in ("trivium", "torch", "transformers")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
