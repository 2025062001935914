"""How cost grows: time and memory of one training step against what it depends on, beside the arithmetic of it.

    python benchmarks/growth.py [--curves length,pass,rank,answers,vocabulary,layers] [--threads 2] [--steps 3]
                                [--quick] [--out FOLDER]

One step is forward, log-probabilities and backward on the CPU, LoRA on all linear layers of a random Llama of
SmolLM2-135M's widths; `CURVES` says how many layers it has. Each curve runs in a process of its own. Seconds are the
median of the steps after one that warms up, memory is the peak above what is held before, gradients included.

What is expected is the operations of the necessary matrix products (`limit.py`) and of attention, at one rate for the
whole curve, the median of its points' rates: it says how a curve bends, not how high it lies. A point that is off by
more than a quarter is not explained by it, and the table says so.

Prints a table for each curve, and writes growth.json, growth.md and, where matplotlib is installed, growth.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_parts import Stands
from limit import flop, linears, of_base, of_thin
from methods import measured
from results import processor
from shared import last_words

from trivium.folder import attach
from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.load import wrap
from trivium.model.new import new_config, new_model
from trivium.peft.settings import settings_of
from trivium.train.machine import PeakMemory

SMOLLM2 = {
    "architecture": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 16384, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {**SMOLLM2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16}  # fmt: skip
RANK, SEED = 16, 0
ALLOWED = 0.25  # of a curve's median: what is further off is not explained
ATTENTION = (2, 5)  # products over the pairs that see each other, forward and backward; there the scores once more


@dataclass(frozen=True)
class Scale:
    """How large everything is that a curve does not vary."""

    sizes: dict[str, Any]
    vocabulary: int
    layers: int
    few: int  # layers where sequences are long
    all: int  # layers of which the topmost are trained
    row: int  # tokens, and of a prompt and an answer
    prompt: int
    answer: int


FULL = Scale(SMOLLM2, 49152, layers=12, few=6, all=30, row=128, prompt=400, answer=50)
QUICK = Scale(TINY, 256, layers=2, few=2, all=4, row=16, prompt=40, answer=10)


@dataclass(frozen=True)
class Point:
    """One step: rows of so many places on the line, in a model of so many layers."""

    rows: tuple[int, ...]
    layers: int
    vocabulary: int
    r: int = RANK
    top: int | None = None  # only so many of the topmost layers are trained
    untrained: float = 0.5  # share of each row, from its start, that no entry of the loss is about
    prompt: int = 0  # all rows are answers to one prompt of so many tokens, which their lengths count


class Curve(NamedTuple):
    """What varies, its values, those for a quick look, and the step that each of them makes."""

    title: str
    axis: str
    at: tuple[int, ...]
    quick: tuple[int, ...]
    point: Callable[[Scale, int], Point]


def _usual(s: Scale, **more: Any) -> Point:
    """Four rows, but for what is given."""
    return Point(**{"rows": (s.row,) * 4, "layers": s.layers, "vocabulary": s.vocabulary, **more})


def _answers(s: Scale, n: int) -> Point:
    return _usual(s, rows=(s.prompt + s.answer,) * n, prompt=s.prompt, untrained=s.prompt / (s.prompt + s.answer))


CURVES = {
    "length": Curve("Sequence length ({few} layers, one sequence a pass, half of it trained)", "tokens of the sequence",
                    (256, 512, 1024, 2048, 4096, 8192), (32, 64, 128), lambda s, n: _usual(s, rows=(n,), layers=s.few)),
    "pass": Curve("Tokens per pass ({layers} layers, rows of {row}, half of them trained)", "tokens of the pass",
                  (64, 128, 256, 512, 1024, 2048, 4096), (8, 16, 64),
                  lambda s, n: _usual(s, rows=(s.row,) * (n // s.row) or (n,))),
    "rank": Curve("LoRA rank ({layers} layers, 4 rows of {row})", "rank",
                  (1, 4, 16, 64, 128, 256), (1, 8), lambda s, n: _usual(s, r=n)),
    "answers": Curve("Answers per prompt ({layers} layers, {answer} tokens each behind {prompt} computed once)",
                     "answers", (1, 2, 4, 8, 16), (1, 4), _answers),
    "vocabulary": Curve("Vocabulary ({layers} layers, 4 rows of {row}, all tokens trained)", "words",
                        (1024, 4096, 16384, 65536, 131072, 262144), (64, 1024),
                        lambda s, n: _usual(s, vocabulary=n, untrained=0.0)),
    "layers": Curve("Layers trained, from the top ({all} layers, 4 rows of {row})", "layers trained",
                    (1, 2, 5, 10, 20, 30), (1, 4), lambda s, n: _usual(s, layers=s.all, top=n)),
}  # fmt: skip


def examples_of(point: Point) -> list[Any]:
    """Random rows: an example each, or all answers in one. A row's last token is only predicted."""
    rng = np.random.default_rng(SEED)
    prompt, made = rng.integers(3, point.vocabulary, point.prompt), []
    for length in point.rows:
        ids = np.concatenate([prompt, rng.integers(3, point.vocabulary, length + 1 - point.prompt)])
        weights = np.arange(length + 1) > point.untrained * length
        made.append(TokenSequence(ids, weights.astype(np.float32)))
    return [Example(tuple(made))] if point.prompt else [Example((one,)) for one in made]


def model_of(sizes: dict[str, Any], point: Point) -> Any:
    """A new model of random weights with its LoRA."""
    config = new_config({**sizes, "num_hidden_layers": point.layers}, Stands(point.vocabulary))
    model = wrap(new_model(config, SEED).eval(), None, "float32", torch.float32)
    trained = [f"layers.{n}.*" for n in range(point.layers - (point.top or point.layers), point.layers)]
    attach(model, settings_of({"name": "lora", "r": point.r, "target_modules": trained}), SEED)
    return model


def step_flop(sizes: dict[str, Any], point: Point, tokens: int, entries: int, pairs: int) -> int:
    """Operations of a step; ``pairs`` are the (token, token that it sees). Below the lowest layer that is trained
    there is no backward pass, and in it nothing flows on from q, k and v."""
    width, queries = sizes["hidden_size"], sizes["num_attention_heads"] * sizes["head_dim"]
    lowest = point.layers - (point.top or point.layers)
    total = flop(of_base(entries, width, point.vocabulary, True, False))
    for number, layer in enumerate(linears({**sizes, "num_hidden_layers": point.layers})):
        trained = number >= lowest
        for name, n_in, n_out in layer:
            onward = number > lowest or (trained and name not in ("q", "k", "v"))
            total += flop(of_base(tokens, n_in, n_out, onward, False))
            total += flop(of_thin(tokens, n_in, point.r, n_out, onward)) if trained else 0
        total += 2 * queries * pairs * (sum(ATTENTION) if trained else ATTENTION[0])
    return total


def measure(scale: Scale, point: Point, steps: int) -> dict[str, Any]:
    """Seconds of the steps, bytes above those before, and the arithmetic of one step."""
    model, forest = model_of(scale.sizes, point), lay_out(examples_of(point))
    small = lay_out(examples_of(_usual(scale, rows=(16,), vocabulary=point.vocabulary)))
    with model.laid_out("forest"):
        model.logprob(small).sum().backward()  # what the libraries load and make at first is not the step's
        model.hf.zero_grad(set_to_none=True)
        before = PeakMemory("cpu").read()
        found = measured(lambda: model.logprob(forest).sum().backward(), steps)
    tokens, entries, pairs = len(forest.tokens), len(forest.source), int((forest.position + 1).sum())
    return {
        "seconds": found["seconds"], "bytes": found["peak"] - before, "tokens": tokens, "entries": entries,
        "flop": step_flop(scale.sizes, point, tokens, entries, pairs),
    }  # fmt: skip


def run_curve(name: str, quick: bool, threads: int, steps: int) -> None:
    """Measures it in this process, and prints a line of JSON for each point."""
    torch.set_num_threads(threads)
    curve, scale = CURVES[name], QUICK if quick else FULL
    for at in curve.quick if quick else curve.at:
        print(json.dumps({"at": at, **measure(scale, curve.point(scale, at), steps)}), flush=True)


def points_of(name: str, asked: argparse.Namespace) -> tuple[list[dict[str, Any]], str | None]:
    """The points of a curve, and why there are no more where its process failed."""
    own = [f"--own={name}", f"--threads={asked.threads}", f"--steps={asked.steps}", *["--quick"] * asked.quick]
    done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=False)
    points = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return points, last_words(done.stderr, done.returncode) if done.returncode else None


def explain(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what is expected of each point, at the one rate of them all, and whether that explains it."""
    medians = [statistics.median(p["seconds"]) for p in points]
    rate = statistics.median(p["flop"] / median for p, median in zip(points, medians, strict=True))
    ratios = [median * rate / p["flop"] for p, median in zip(points, medians, strict=True)]
    more = [{"median": m, "expected": m / ratio, "ratio": ratio} for m, ratio in zip(medians, ratios, strict=True)]
    fits = [abs(ratio / statistics.median(ratios) - 1) <= ALLOWED for ratio in ratios]
    return [{**p, **own, "explained": fit} for p, own, fit in zip(points, more, fits, strict=True)]


def told(name: str, curve: dict[str, Any], quick: bool) -> str:
    """A curve in Markdown: title, table, and why it ended early where it did."""
    head = (CURVES[name].axis, "tokens", "s a step", "expected s", "ratio", "MB", "GFLOP", "")
    title = CURVES[name].title.format(**vars(QUICK if quick else FULL))
    lines = [f"**{title}**\n", f"| {' | '.join(head)} |", f"|{'---:|' * (len(head) - 1)}---|"]
    for p in curve["points"]:
        cells = (
            f"{p['at']:,}", f"{p['tokens']:,}", f"{p['median']:.3g}", f"{p['expected']:.3g}", f"{p['ratio']:.2f}",
            f"{p['bytes'] / 1e6:,.0f}", f"{p['flop'] / 1e9:,.4g}", "" if p["explained"] else "not explained",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    ended = f"\nIts process ended there: {curve['failed']}\n" if curve["failed"] else ""
    return "\n".join(lines) + "\n" + ended


def draw(curves: dict[str, Any], path: Path) -> bool:
    """Six small plots, time on the left and memory on the right; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(14, 8), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        draw_curve(figure.add_subplot(2, 3, number + 1), CURVES[name], curve["points"])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def draw_curve(place: Any, curve: Curve, points: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    def column(key: str, of: list[dict[str, Any]] = points) -> list[Any]:
        return [p[key] for p in of]

    at, memory, far = column("at"), place.twinx(), [p for p in points if not p["explained"]]
    held = memory.plot(at, np.array(column("bytes")) / 1e6, "s:", color="tab:orange", mfc="none", label="MB")
    lines = place.plot(at, column("expected"), "-", color="0.5", label="expected s")
    lines += place.plot(at, column("median"), "o", color="tab:blue", label="measured s")
    ring = {"ms": 13, "mfc": "none", "color": "tab:red", "label": "not explained"}
    lines += place.plot(column("at", far), column("median", far), "o", **ring) if far else []
    for axes, label, color in ((place, "seconds a step", "tab:blue"), (memory, "MB", "tab:orange")):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.6, high * 1.6)
        axes.set_ylabel(label, color=color)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
    place.set_xscale("log", base=2)
    place.set_xticks(at, [f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n) for n in at])
    place.set(xlabel=curve.axis, title=curve.title.split(" (")[0])
    place.legend(handles=lines + held, fontsize=8)


def asked_of(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny shapes that say nothing, in seconds")
    parser.add_argument("--out", type=Path, default=Path("growth"))
    parser.add_argument("--own", choices=tuple(CURVES), help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    asked.curves = asked.curves.split(",")
    if unknown := [name for name in asked.curves if name not in CURVES]:
        parser.error(f"no curve {', '.join(unknown)}; there are {', '.join(CURVES)}")
    return asked


def main(words: list[str] | None = None) -> int:
    asked = asked_of(words)
    if asked.own:
        run_curve(asked.own, asked.quick, asked.threads, asked.steps)
        return 0
    asked.out.mkdir(parents=True, exist_ok=True)
    how = {"processor": processor(), "threads": asked.threads, "date": time.strftime("%Y-%m-%d")}
    curves: dict[str, Any] = {}
    for name in asked.curves:
        points, failed = points_of(name, asked)
        curves[name] = {"points": explain(points) if points else [], "failed": failed}
        print(told(name, curves[name], asked.quick), flush=True)
        found = {**how, "steps": asked.steps, "quick": asked.quick, "curves": curves}
        (asked.out / "growth.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    picture = draw(curves, asked.out / "growth.png")
    if not picture:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    head = f"{how['processor']}, {how['threads']} threads, float32; {how['date']}. LoRA r={RANK} unless said.\n"
    parts = [head, *["![how cost grows](growth.png)\n"] * picture]
    text = "\n".join([*parts, *(told(name, curve, asked.quick) for name, curve in curves.items())])
    (asked.out / "growth.md").write_text(text, encoding="utf-8")
    return int(any(curve["failed"] for curve in curves.values()))


if __name__ == "__main__":
    sys.exit(main())
