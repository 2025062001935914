"""What recorded time was spent on: every moment of a training step has one kind, and they add up to the whole.

The innermost recorded event at a moment says what is done then, the ones around it what it is done for:

    a label (`stage_profile`)   data, optimizer, attention and the readout are wrapped in one while a profile is made
    a name (`NAMES`)            operations and autograd nodes that are of one kind wherever they are met
    a backward node             of the kind of the forward operation that made it, which has the same sequence number
    what encloses it            otherwise; and if nothing says otherwise, a matrix product by its name, or element-wise

Time of the process in no operation is Python and dispatch; giving memory back is in it, too. On a GPU the time of an
operation is that of the kernels it launched, and what no kernel fills is data, or Python and dispatch.

Cost: one pass over the events, some microseconds each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PRODUCTS, ATTENTION, LOGPROB, ELEMENTWISE = "matrix products", "attention", "log-probabilities", "element-wise"
OPTIMIZER, DATA, PYTHON = "optimizer", "data", "Python and dispatch"
KINDS = (PRODUCTS, ATTENTION, LOGPROB, ELEMENTWISE, OPTIMIZER, DATA, PYTHON)

STEP, MODULE = "trivium::step", "trivium::module"  # the whole; a module, in which what encloses it says nothing
LABELS = {STEP: None, MODULE: None} | {f"trivium::{kind}": kind for kind in KINDS}

# Names of operations and autograd nodes, forward and backward, that say what they are for. To be added to freely.
NAMES = [
    (re.compile(r"_scaled_dot_product|_flash_attention|_efficient_attention|flex_attention"), ATTENTION),
    (re.compile(r"ScaledDotProduct|(^|[ _])(Forest|Flex|Segment)?Attention(Function)?(Backward\d*)?$"), ATTENTION),
    (re.compile(r"LogProb(Backward\d*)?$"), LOGPROB),
    (re.compile(r"^Optimizer\."), OPTIMIZER),
]
PRODUCT = re.compile(r"::(linear|matmul|_?mm|addmm_?|bmm|baddbmm_?|mv|addmv_?|_grouped_mm|einsum|_linear_\w+|gem\w+)$")

# Where the two factors of a product are among an operation's inputs.
FACTORS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1}

NODE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True, slots=True)
class Event:
    """Something recorded. ``sequence`` is that of the autograd node it makes, or is, and then ``made_in`` is set."""

    name: str
    start: int  # nanoseconds
    end: int
    thread: int = 0
    sequence: int = -1
    made_in: int = 0  # the thread of the forward operation that made this node; 0: this is no node
    shapes: Sequence[Any] = ()
    dtypes: Sequence[str] = ()
    kernels: int = 0  # nanoseconds of the kernels that it launched itself

    @property
    def is_operation(self) -> bool:
        return "::" in self.name and not self.name.startswith(("autograd::", "torch::autograd::", "trivium::"))


@dataclass(frozen=True, slots=True)
class Product:
    """``[B, M, K] @ [B, K, N]``; ``turned``: the second is a weight as a linear layer holds it, ``[N, K]``."""

    b: int
    m: int
    k: int
    n: int
    dtype: str
    turned: bool

    @property
    def flop(self) -> int:
        return 2 * self.b * self.m * self.k * self.n


@dataclass
class Shares:
    """Seconds by kind, of a whole of ``seconds``; how often each product was computed; seconds and calls by name."""

    seconds: float = 0.0
    by_kind: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    products: Counter[Product] = field(default_factory=Counter)
    by_name: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # (kind, name): seconds, calls

    def add(self, other: Shares) -> None:
        self.seconds += other.seconds
        self.products += other.products
        for kind, seconds in other.by_kind.items():
            self.by_kind[kind] += seconds
        for key, (seconds, calls) in other.by_name.items():
            mine = self.by_name.setdefault(key, [0.0, 0])
            mine[0], mine[1] = mine[0] + seconds, mine[1] + calls

    def longest(self, most: int = 20) -> list[dict[str, Any]]:
        """The names that most time went to by themselves, without what they call."""
        ranked = sorted(self.by_name.items(), key=lambda item: -item[1][0])[:most]
        return [{"name": name, "kind": kind, "seconds": s, "calls": int(n)} for (kind, name), (s, n) in ranked]


def events_of(profiler: Any) -> list[Event]:
    """What a stopped `torch.profiler.profile` has recorded on the host, each with the time of its kernels."""
    raw = profiler.profiler.kineto_results.events()
    kernels: Counter[int] = Counter()
    for e in raw:
        if e.activity_type() in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[e.linked_correlation_id()] += e.duration_ns()
    return [
        Event(
            e.name(), e.start_ns(), e.start_ns() + e.duration_ns(), e.start_thread_id(), e.sequence_nr(),
            e.fwd_thread_id(), e.shapes() if e.name() in FACTORS else (), e.dtypes() if e.name() in FACTORS else (),
            kernels.get(e.correlation_id(), 0),
        )
        for e in raw
        if e.activity_type() in ("cpu_op", "user_annotation")
    ]  # fmt: skip


def shares_of(events: Iterable[Event], on_gpu: bool = False) -> Shares:
    """The shares of one step: everything within its label, on whatever thread."""
    events = list(events)
    step = next(e for e in events if e.name == STEP)
    inside = [e for e in events if step.start <= e.start and e.end <= step.end]
    walk = _Walk()
    for thread in sorted({e.thread for e in inside}, key=lambda t: t != step.thread):  # forward before backward
        walk.over([e for e in inside if e.thread == thread])
    found, host, device = walk.found, walk.host, walk.device
    found.seconds = (step.end - step.start) / 1e9
    if not on_gpu:  # the backward pass of a CPU is on the thread that asks for it
        found.by_kind.update({kind: ns / 1e9 for kind, ns in host.items()})
        return found
    total = sum(device.values())
    idle = max(0.0, found.seconds - total / 1e9)
    scale = (found.seconds - idle) / total if total else 0.0  # below 1e-9 where kernels ran beside each other
    found.by_kind.update({kind: ns * scale for kind, ns in device.items()})
    waits = min(idle, host[DATA] / 1e9)
    found.by_kind[DATA] += waits
    found.by_kind[PYTHON] += idle - waits
    return found


@dataclass(slots=True)
class _Frame:
    """An event under way."""

    event: Event
    kind: str | None  # what everything within is for; None: nothing says so yet
    in_product: bool  # whether a product around it was counted
    in_linear: bool
    inner: int = 0  # nanoseconds of what it calls


class _Walk:
    """Passes over the events of each thread, outer before inner; its sums are of each event's time by itself."""

    def __init__(self) -> None:
        self.found = Shares()
        self.host: Counter[str] = Counter()
        self.device: Counter[str] = Counter()
        self.nodes: dict[tuple[int, int], str | None] = {}  # by thread and sequence number: what it was made for
        self.stack: list[_Frame] = []

    def over(self, events: list[Event]) -> None:
        self.stack = []
        for event in sorted(events, key=lambda e: (e.start, -e.end)):
            while self.stack and self.stack[-1].event.end <= event.start:
                self._close()
            self._open(event)
        while self.stack:
            self._close()

    def _open(self, event: Event) -> None:
        above = self.stack[-1] if self.stack else None
        kind = self._kind(event, above.kind if above else None)
        if event.sequence >= 0 and not event.made_in:
            self.nodes[event.thread, event.sequence] = None if kind == PRODUCTS else kind  # the last one made it
        counted, linear = bool(above and above.in_product), bool(above and above.in_linear)
        if event.name in FACTORS and not counted and kind in (PRODUCTS, LOGPROB):
            at = FACTORS[event.name]
            first, second = event.shapes[at : at + 2]
            batch = first[0] if len(first) == 3 else 1
            dtype = event.dtypes[at]
            self.found.products[Product(batch, first[-2], first[-1], second[-1], dtype, linear)] += 1
            counted = True
        self.stack.append(_Frame(event, kind, counted, linear or event.name == "aten::linear"))

    def _kind(self, event: Event, above: str | None) -> str | None:
        """What the time within an event is for."""
        if event.name in LABELS:
            return LABELS[event.name]
        if above in (OPTIMIZER, DATA):
            return above
        for pattern, kind in NAMES:
            if pattern.search(event.name):
                return kind
        if event.name.startswith(NODE):
            return self.nodes.get((event.made_in, event.sequence))
        if above is None and event.is_operation and PRODUCT.search(event.name):
            return PRODUCTS
        return above

    def _close(self) -> None:
        frame = self.stack.pop()
        event = frame.event
        if self.stack:
            self.stack[-1].inner += event.end - event.start
        own = event.end - event.start - frame.inner
        within = frame.kind or ELEMENTWISE
        kind = within if event.is_operation or within in (OPTIMIZER, DATA) else PYTHON
        self.host[kind] += own
        self.device[within] += event.kernels
        entry = self.found.by_name.setdefault((kind, event.name.removeprefix(NODE)), [0.0, 0])
        entry[0] += own / 1e9
        entry[1] += 1
