"""Where the time of a stage's steps goes (`trivium run --profile`), and how far from its matrix products alone that is.

    with profiled(file, "chat", model, task, after_step, done) as (task, after_step):
        train(task, after_step, done)

A few steps after the first two are recorded with `torch.profiler`; while one of them runs, what the loop is handed and
a few functions of the model are wrapped in labels, from outside: the code that is measured does not know of it, and
without a profile nothing is different. What is computed stays the same bits. `profile_shares` says what is counted as
what.

Then the matrix products of these steps, linear layers and log-probabilities, are computed alone, on buffers of their
own: no step that needs them can be faster. Those of layers that are recomputed are in it as often as they were done.

Cost: recording takes some microseconds an operation, which tiny models notice (as Python and dispatch), and some 5 kB
of memory for each event of a step, of which there are a few for each operation; the products alone take up to about
`MOST_SECONDS`. The memory is in the stage's peak; in its tokens per second there is only the recording.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from trivium.files import write_json
from trivium.forest import Forest
from trivium.model.language_model import LanguageModel
from trivium.peft.targets import decoder_layers
from trivium.profile_shares import (
    ATTENTION,
    DATA,
    KINDS,
    LOGPROB,
    MODULE,
    OPTIMIZER,
    STEP,
    Product,
    Shares,
    events_of,
    shares_of,
)  # fmt: skip
from trivium.terminal import say
from trivium.train.loop import StepLog, Task

WARM, MOST = 2, 3  # steps before, steps recorded
MOST_SECONDS = 5.0  # of products alone
DTYPES = {
    "float": torch.float32, "double": torch.float64, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16,
}  # fmt: skip

AfterStep = Callable[[StepLog], None]


@contextlib.contextmanager
def profiled(
    file: Path, name: str, model: LanguageModel, task: Task, after_step: AfterStep, done: int,
    aside: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[tuple[Task, AfterStep]]:  # fmt: skip
    """What the loop is to be handed so that some steps after ``done`` are recorded; told, and written to ``file``.

    ``aside`` is around what is no part of the training.
    """
    steps = chosen(done, task.steps)
    if not steps:
        say(f"  profile: no step of {name} is left to train, so there is nothing to profile")
    recorder = Recorder(model, steps)

    def batches(number: int) -> Iterator[Forest]:
        recorder.begin(number)
        return _each(task.batches(number))

    def after(log: StepLog) -> None:
        recorder.end(log)
        if steps and log.step == steps.stop:
            with aside():
                found = summary(recorder, name)
                write_json(file, found)
                for line in told(found):
                    say(line)
        after_step(log)

    try:
        yield replace(task, batches=batches, beside=lambda n: _each(task.beside(n))), after
    finally:
        recorder.close()


def chosen(done: int, steps: int) -> range:
    """The steps that are recorded, from 0: the third to the fifth that are left, or the last ones there are."""
    first = max(done, min(done + WARM, steps - MOST))
    return range(first, min(first + MOST, steps))


class Recorder:
    """Records the steps; between them nothing is recorded and nothing is wrapped."""

    def __init__(self, model: LanguageModel, steps: range) -> None:
        self.model, self.steps = model, steps
        self.on_gpu = model.device.type == "cuda"
        self.shares = Shares()
        self.tokens = 0
        self.open = contextlib.ExitStack()
        self.profiler: Any = None

    def begin(self, number: int) -> None:
        if number not in self.steps:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells every start and stop
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profiler = torch.profiler.profile(activities=kinds, record_shapes=True)
        self.profiler.start()
        self.open.callback(self.profiler.stop)
        self.open.enter_context(labelled(self.model))
        self.open.enter_context(record_function(STEP))

    def end(self, log: StepLog) -> None:
        if self.profiler is None:
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        self.open.close()
        self.shares.add(shares_of(events_of(self.profiler), self.on_gpu))
        self.tokens += log.tokens
        self.profiler = None

    def close(self) -> None:
        self.open.close()
        self.profiler = None


# --- the labels


@contextlib.contextmanager
def labelled(model: LanguageModel) -> Iterator[None]:
    """Within the block, attention, the readout, the clipping of gradients and the parts of layers wear labels.

    An optimizer labels itself. The label of a layer's part is for layers that are recomputed: then it runs inside the
    backward node of something else.
    """
    parts = [part for layer in decoder_layers(model.hf).values() for part in layer.children()]
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(_wrapped(part, "forward", MODULE))
        stack.enter_context(_wrapped(model.readout, "forward", _label(LOGPROB)))
        stack.enter_context(_wrapped(torch.nn.utils, "clip_grad_norm_", _label(OPTIMIZER)))
        stack.enter_context(_attention(model))
        yield


@contextlib.contextmanager
def _attention(model: LanguageModel) -> Iterator[None]:
    """The attention function that the model looks up by name; or, of the kind that it brings, its file's own."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.hf.config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        function = ALL_ATTENTION_FUNCTIONS[name]
        AttentionInterface.register(name, _with_label(function, _label(ATTENTION)))
        try:
            yield
        finally:
            AttentionInterface.register(name, function)
        return
    own = "eager_attention_forward"
    files = {type(module).__module__ for module in model.hf.modules()}
    with contextlib.ExitStack() as stack:
        for file in (sys.modules[f] for f in files if hasattr(sys.modules.get(f), own)):
            stack.enter_context(_wrapped(file, own, _label(ATTENTION)))
        yield


@contextlib.contextmanager
def _wrapped(holder: Any, name: str, label: str) -> Iterator[None]:
    """A function of a module, of either kind, under a label within the block."""
    own = vars(holder).get(name)
    setattr(holder, name, _with_label(getattr(holder, name), label))
    try:
        yield
    finally:
        setattr(holder, name, own) if own is not None else delattr(holder, name)


def _with_label(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return within


def _label(kind: str) -> str:
    return f"trivium::{kind}"


def _each(forests: Iterator[Forest]) -> Iterator[Forest]:
    """The same, each laid out under the data's label."""
    while True:
        with record_function(_label(DATA)):
            forest = next(forests, None)
        if forest is None:
            return
        yield forest


# --- the limit


def products_alone(products: Counter[Product], device: torch.device, most: float = MOST_SECONDS) -> dict[str, float]:
    """Seconds of these products, each computed alone as often as it was counted.

    Measured from the costliest on, the better of two runs, for about ``most`` seconds; the others at the rate of those.
    """
    random = torch.Generator(device).manual_seed(0)  # one of its own: the training's is not drawn on
    seconds, flop, began = 0.0, 0, time.perf_counter()
    total = sum(p.flop * n for p, n in products.items())
    with torch.no_grad():
        for product, count in sorted(products.items(), key=lambda item: -item[0].flop * item[1]):
            if product.flop == 0 or time.perf_counter() - began > most:
                continue
            seconds += count * _seconds(product, device, random)
            flop += count * product.flop
    share = flop / total if total else 1.0
    return {"seconds": seconds / share if share else 0.0, "flop": total, "kinds": len(products), "measured": share}


def _seconds(product: Product, device: torch.device, random: torch.Generator) -> float:
    b, m, k, n = product.b, product.m, product.k, product.n
    dtype = DTYPES.get(product.dtype, torch.float32)

    def buffer(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1, generator=random)

    first = buffer(b, m, k)
    second = buffer(b, n, k).mT if product.turned else buffer(b, k, n)
    if b == 1:
        first, second = first[0], second[0]
    out = first @ second  # the first time, some libraries choose how
    best = float("inf")
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.matmul(first, second, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


# --- what is told


def summary(recorder: Recorder, name: str) -> dict[str, Any]:
    """Everything of a profile, for its file."""
    shares, device = recorder.shares, recorder.model.device
    alone = products_alone(shares.products, device)
    return {
        "stage": name,
        "steps": [recorder.steps.start + 1, recorder.steps.stop],
        "tokens": recorder.tokens,
        "seconds": shares.seconds,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds_by_kind": shares.by_kind,
        "products_alone": alone,
        "longest": shares.longest(),
    }


def told(found: dict[str, Any]) -> list[str]:
    """The same as lines for a person."""
    first, last = found["steps"]
    total, alone = found["seconds"], found["products_alone"]
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    lines = [f"  where the time of {steps} went ({found['tokens']:,} tokens in {total:.2f} s):"]
    for kind in KINDS:
        seconds = found["seconds_by_kind"][kind]
        lines.append(f"    {kind:<20} {seconds / total:>6.1%}  {seconds:>8.3f} s")
    share = alone["seconds"] / total
    lines.append(f"    the products alone, replayed: {alone['seconds']:.3f} s = {share:.0%} of {steps}")
    return lines
