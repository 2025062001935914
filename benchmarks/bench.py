"""trivium beside other tools: the same rows, tokens, steps and rates, in turns, with the job's arithmetic limit.

    make bench                 # or make bench BENCH="--jobs sft-lora --peers trl --runs 3"
    python benchmarks/bench.py [--jobs sft-lora,dpo-lora] [--peers trl,trainer] [--runs 2] [--rows N] [--quick]
                               [--model FOLDER_OR_GGUF] [--out DIR] [--readme]

The jobs are the table in jobs.py; the peers' environments are made once (environments.py). First every peer runs in
every setting once; its fastest and its leanest then take turns with trivium (A B C, C B A) until each has `--runs`.
Seconds are of training, first step to last and a reference computed before included; `start` counts those from the
process's start to the end of the first step. Memory is the peak of the whole process. Both are medians, with the
range. Losses are compared step by step; of another order of rows (`grouped`) on average.

It writes JOB.json for each job and table.md into DIR (benchmarks/results); --readme puts the table into README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import ENVIRONMENTS, HERE, ROOT, python_of, saved, smollm2
from jobs import JOBS, QUICK, SETTINGS, Job, job_of
from results import Entrant, Found, rows_in_step, seconds_of, told_of
from rows import Prepared, prepare, recipe_of
from shared import SEED, Failed, in_turns, run_alone
from table import markdown, put_into

BETAS = (0.9, 0.95)  # of AdamW, for all
LORA_R = 16
TIMEOUT = 3600.0  # seconds that a run may take
PASSED_ON = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def entrants_of(job: Job, peers: list[str], quick: bool) -> list[Entrant]:
    found = [Entrant(name) for name in job.ours]
    for peer, settings in job.peers.items():
        if peer in peers:
            some = [next(s for s in (*QUICK, *settings) if s in settings)] if quick else settings
            found += [Entrant(peer, setting) for setting in some]
    return found


# --- one run


def run(job: Job, one: Entrant, ready: Prepared, work: Path, threads: int) -> dict[str, Any]:
    """One process. Raises Failed."""
    ours = one.tool in job.ours
    out = Path(tempfile.mkdtemp(dir=work))
    task = {
        "kind": job.kind, "trained": job.trained, "model": ready.model, "folder": str(ready.folder), "out": str(out),
        "batch": rows_in_step(ready), "rates": ready.rates, "rate": job.rate, "betas": BETAS, "seed": SEED,
        "method": next(iter(job.ours.values()))["method"],
    }  # fmt: skip
    if ours:
        steps = len(ready.rates)
        (out / "recipe.yaml").write_text(
            json.dumps(recipe_of(job, job.ours[one.tool], ready.model, ready.folder, steps))
        )
        task |= {"recipe": str(out / "recipe.yaml"), "out": str(out / "run")}
    else:
        task["setting"] = vars(SETTINGS[one.how])
    (out / "task.json").write_text(json.dumps(task))
    side = "trivium" if ours else one.tool
    command = [str(python_of(side)), str(HERE / "sides" / f"{side}_side.py"), str(out / "task.json")]
    # what is compiled is kept for the next run: a tool that compiles pays for it once
    more = PASSED_ON | {"TORCHINDUCTOR_CACHE_DIR": str(work / "cache" / "compiled")}
    try:
        ran = run_alone(command, threads, work / "cache", more, TIMEOUT)
    finally:
        shutil.rmtree(out)
    told = dict(json.loads(ran.printed.splitlines()[-1]))
    check_tokens(one, told, ready)
    first = told.pop("first_step_at") - ran.started
    return {**told, "process_seconds": ran.seconds, "peak_bytes": ran.peak_bytes, "first_step_seconds": first}


def check_tokens(one: Entrant, told: dict[str, Any], ready: Prepared) -> None:
    """That a tool has trained the job's tokens, and no others. Raises Failed.

    Of trivium the trained ones of each step count: how many lie on its lines depends on what shares a pass.
    """
    if "counts" in told:
        if [trained for _, trained in told.pop("counts")] != [trained for _, trained in ready.counts]:
            raise Failed("it has trained other tokens than planned")
    elif told.pop("sha256") != rows_digest(ready.steps):
        raise Failed("it has trained other tokens than trivium")


def rows_digest(steps: list[list[dict[str, Any]]]) -> str:
    """Of a job's rows, in whatever order they come."""
    sys.path.insert(0, str(HERE / "sides"))
    try:
        import common
    finally:
        sys.path.pop(0)
    return str(common.digest([row for step in steps for row in step]))


def limit_of(job: Job, ready: Prepared, work: Path, threads: int) -> dict[str, Any]:
    from limit import bottleneck

    method = next(iter(job.ours.values()))["method"]
    r = bottleneck(ready.config, method["reduction_factor"]) if job.trained == "bottleneck" else LORA_R
    task = {"config": ready.config, "passes": ready.passes, "trained": job.trained, "kind": job.kind, "r": r}
    path = work / "limit.json"
    path.write_text(json.dumps(task))
    ran = run_alone([sys.executable, str(HERE / "limit.py"), str(path)], threads, work / "cache")
    return dict(json.loads(ran.printed))


# --- a job


def measured(job: Job, ready: Prepared, asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything about a job: first all entrants once, then the finalists in turns."""
    everyone = entrants_of(job, asked.peers, asked.quick)
    found = {one: Found() for one in everyone}
    limits: list[dict[str, Any]] = []
    if job.shown == "first step":  # what is cached the first time is not to count
        attempt(job, Entrant(next(iter(job.ours))), Found(), ready, asked, work)
    for number, one in rounds(job, everyone, found, asked.runs):
        if one is None:
            limits.append(limit_of(job, ready, work, asked.threads))
            print(f"  limit {number + 1}: {limits[-1]['seconds']:.1f} s", flush=True)
        elif not found[one].error:
            attempt(job, one, found[one], ready, asked, work)
    return {"threads": asked.threads, **told_of(job, ready, found, limits)}


def rounds(
    job: Job, everyone: list[Entrant], found: dict[Entrant, Found], runs: int
) -> Iterator[tuple[int, Entrant | None]]:
    """(round, who): None is the limit's turn, which stands in the middle. The finalists are known after the first."""
    yield from ((0, one) for one in everyone)
    yield 0, None
    if runs > 1:
        finalists: list[Entrant | None] = [
            one for one in everyone if one.tool in job.ours or one in best_of(job, found)
        ]
        finalists.insert(len(job.ours), None)
        yield from ((number, one) for number, one in in_turns(finalists, runs) if number > 0)


def best_of(job: Job, found: dict[Entrant, Found]) -> set[Entrant]:
    """Of each peer its fastest setting and its leanest."""
    chosen = set()
    for peer in {one.tool for one in found if one.tool not in job.ours}:
        ran = [one for one in found if one.tool == peer and found[one].runs]
        if ran:
            chosen.add(min(ran, key=lambda one: statistics.median(r[seconds_of(job)] for r in found[one].runs)))
            chosen.add(min(ran, key=lambda one: statistics.median(r["peak_bytes"] for r in found[one].runs)))
    return chosen


def attempt(job: Job, one: Entrant, kept: Found, ready: Prepared, asked: argparse.Namespace, work: Path) -> None:
    """A run that goes wrong is a row with its reason."""
    try:
        kept.runs.append(run(job, one, ready, work, asked.threads))
        last = kept.runs[-1]
        print(f"  {one.name}: {last[seconds_of(job)]:.1f} s, {last['peak_bytes'] / 1e9:.2f} GB", flush=True)
    except Failed as error:
        kept.error = str(error)
        print(f"  {one.name}: {error}", flush=True)


# --- the whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(job.name for job in JOBS))
    parser.add_argument("--peers", default=",".join(ENVIRONMENTS), help="'none': trivium and the limit alone")
    parser.add_argument("--runs", type=int, help="of each; left out: 2, with --quick 1")
    parser.add_argument("--rows", type=int, help="left out: as many as the job's table says")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="left out: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="peers in one setting")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    asked = parser.parse_args()
    asked.peers = asked.peers.split(",")
    asked.runs = max(1, asked.runs or (1 if asked.quick else 2))
    if unknown := set(asked.peers) - {"none", *ENVIRONMENTS}:
        sys.exit(f"error: no such peer: {', '.join(sorted(unknown))}; peers: {', '.join(ENVIRONMENTS)}")
    try:
        wanted = [job_of(name) for name in asked.jobs.split(",")]
        carry_out(wanted, asked)
    except (Failed, KeyError) as error:
        sys.exit(f"error: {error.args[0]}")


def carry_out(wanted: list[Job], asked: argparse.Namespace) -> None:
    """Runs jobs and writes what they gave; the table has the results that are there, of this run and others."""
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    model = None
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIVIUM_CACHE"] = str(Path(folder) / "cache")
        for job in wanted:
            work = Path(folder) / job.name
            work.mkdir()
            if job.kind != "pretrain":
                model = model or model_of(asked.model, Path(folder))
            print(f"{job.name}: {job.aim}", flush=True)
            try:
                told = measured(job, prepare(job, str(model), asked.rows, work), asked, work)
            except Failed as error:
                print(f"  {error}", flush=True)
                continue
            finally:
                shutil.rmtree(work)
            (asked.out / f"{job.name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    results = [json.loads(p.read_text()) for job in JOBS if (p := asked.out / f"{job.name}.json").is_file()]
    table = markdown(results)
    (asked.out / "table.md").write_text(table, encoding="utf-8")
    print("\n" + table)
    if asked.readme:
        readme = ROOT / "README.md"
        readme.write_text(put_into(readme.read_text(encoding="utf-8"), table), encoding="utf-8")


def model_of(asked: str | None, folder: Path) -> Path:
    """A folder that every tool reads. Raises Failed."""
    if asked is None:
        return smollm2()
    path = Path(asked).resolve()
    if not path.exists():
        raise Failed(f"--model: {asked} is not there")
    return saved(path, folder / path.stem) if path.suffix == ".gguf" else path


if __name__ == "__main__":
    main()
