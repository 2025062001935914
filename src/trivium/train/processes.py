"""Several processes that train one model, started by torchrun: every step is that of one process alone.

    torchrun --nproc_per_node 2 -m trivium run recipe.yaml

    with together():                     # the command line: joins the others, if the environment names any
        others = current()
        mine = others.share(forests)     # of a step that every process has laid out in the same way
        others.gradients(parameters)     # summed over all
        told = others.led(make)          # what the first process says, on all

The first process alone writes, proves, evaluates, decides and speaks; the others open the same models, compute their
share of each step, and wait. They hold the same weights to the last bit, as all make the same update from the same sum.
One process has nobody to ask: the methods of `Processes` do nothing, and torch.distributed is not imported.

Gradients travel in flat buckets; a step's numbers as JSON in one exchange, which also compares the steps' plans.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trivium.errors import DataError, Interrupted, ModelError, NonFiniteError, RecipeError, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trivium.forest import Forest
    from trivium.objectives.base import Sums
    from trivium.train.heartbeat import Watch

BUCKET = 2**24  # numbers of gradients that travel together
SHORT = 2048  # bytes of an exchange that go in one piece
EVER = timedelta(days=30)  # what a wait may last: whether the others live is watched elsewhere
START = "start it as: torchrun --nproc_per_node N -m trivium run RECIPE"


class Processes:
    """One process alone, which is all there is."""

    rank, count = 0, 1
    asked = False  # whether another process was asked to stop

    @property
    def first(self) -> bool:
        """Whether this one writes, decides and speaks."""
        return self.rank == 0

    def share(self, forests: Sequence[Forest]) -> Sequence[Forest]:
        """What this process computes of a step's forests."""
        return forests

    def mine(self, number: int) -> bool:
        """Whether this process computes number ``number`` of things that are all alike."""
        return number % self.count == self.rank

    def gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum them over all processes; a weight that has none anywhere keeps none."""

    def sums(self, sums: Sums) -> Sums:
        """A step's statistics over all processes."""
        return sums

    def added(self, values: list[float]) -> list[float]:
        """Numbers added up over all processes."""
        return values

    def led(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives in the first process, on all: JSON."""
        return make()

    def same(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that ``make`` gives in the first process, on all, on the CPU."""
        return make()

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor on the CPU, added up over all processes."""
        return tensor

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that the others enter when the first one has left it: they find what it has kept."""
        yield

    def alike(self, model: nn.Module) -> None:
        """Every process has the first one's weights and buffers from here on. Raises ModelError."""

    def differing(self, model: nn.Module) -> list[str]:
        """Names of weights and buffers that are not the same everywhere. Raises ModelError where shapes are others."""
        return []

    def agree(self, what: str, told: Callable[[], str]) -> None:
        """Raises DataError where it is not told the same everywhere."""

    def connect(self) -> None:
        """Find the others, and watch them from now on. Raises RecipeError, or Interrupted where one does not come."""

    def begin(self, seed: int, step: int) -> None:
        """Before each step: every process drops out on its own, by a stream of (seed, step, process)."""

    def device(self, kind: str) -> str:
        """The device of this process, of the kind asked for."""
        return kind

    def last_words(self, error: UserError) -> tuple[int, bool]:
        """The exit code, and whether it is this process that tells the error."""
        return error.exit_code, True


ALONE = Processes()
_current: Processes = ALONE


def asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in environment and environment.get("WORLD_SIZE", "1") not in ("", "0", "1")


def current() -> Processes:
    """Those that `together` has joined. Raises RecipeError where there should be others, whom nobody has joined."""
    if _current is ALONE and asked_for():
        what = f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), which do not know of each other"
        raise RecipeError(what, f"{START}; Python code trains in one process")
    return _current


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the others for the block, which ends this process; nothing where there are none. Raises RecipeError."""
    global _current
    if not asked_for():
        yield
        return
    joined = _current = Several()
    code = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        raise AssertionError("a user's error has its words inside the block") from error
    except BaseException:
        code = joined.failed(traceback.format_exc())
    joined.leave(code)


def dealt(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Numbers of ``sizes`` dealt out to ``count`` processes, the largest first, each to whom has least so far."""
    hands: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        least = min(range(count), key=lambda r: (held[r], r))
        hands[least].append(number)
        held[least] += sizes[number]
    return [sorted(hand) for hand in hands]


class Several(Processes):
    """This process among others, as torchrun's environment variables say."""

    def __init__(self) -> None:
        self.local = 0  # among those on its machine
        self.asked = False
        self.plan = 0  # of the step under way, in short
        self.watch: Watch | None = None
        self._store: Any = None  # kept, for the first process may be the one that holds it for all
        self._cards: Any = None  # the group that sums on cards, once it is needed

    def connect(self) -> None:
        found = {}
        for name, least in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("MASTER_PORT", 1)):
            told = os.environ.get(name, os.environ["RANK"] if name == "LOCAL_RANK" else "")
            if not told.isdecimal() or int(told) < least:
                raise RecipeError(f"{name}={told}: not a number that torchrun sets", START)
            found[name] = int(told)
        if found["RANK"] >= found["WORLD_SIZE"]:
            raise RecipeError(f"RANK={found['RANK']}: there are {found['WORLD_SIZE']} processes, from 0", START)
        self.rank, self.count, self.local = found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it tells of connections that break what we tell
        import torch.distributed as dist

        from trivium import interrupt, terminal
        from trivium.train.heartbeat import Watch, store_of

        terminal.mute(not self.first)
        interrupt.plain = False
        store, hosted = self._store = store_of(found["MASTER_PORT"], self.rank, self.count)
        self.watch = Watch(store, self.rank, self.count, hosted)
        self.watch.meet()
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("groups", store.clone()), rank=self.rank, world_size=self.count, timeout=EVER
        )
        terminal.say(f"{self.count} processes: {self.watch.listed()}")

    # --- a step

    def share(self, forests: Sequence[Forest]) -> Sequence[Forest]:
        sizes = [len(f.tokens) for f in forests]
        rows = "\n".join(e.origin for f in forests for e in f.examples)
        self.plan = zlib.crc32(f"{sizes}{rows}".encode(), self.plan)
        return [forests[n] for n in dealt(sizes, self.count)[self.rank]]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        import torch

        for bucket in _buckets(parameters):
            there = torch.tensor([float(p.grad is not None) for p in bucket])
            parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
            flat = torch.cat([*(part.detach().reshape(-1) for part in parts), there.to(parts[0])])
            self._sum(flat)
            *sums, found = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for parameter, total, anywhere in zip(bucket, sums, found.tolist(), strict=True):
                if anywhere:
                    parameter.grad = total.reshape(parameter.shape).to(parameter.dtype)

    def sums(self, sums: Sums) -> Sums:
        import torch

        from trivium import interrupt
        from trivium.objectives.base import Sums

        mine = {n: [float(value), sums.weights[n]] for n, value in sums.sums.items()}
        found = self.gathered({"plan": self.plan, "sums": mine, "asked": interrupt.heard.is_set()})
        assert all(f["plan"] == self.plan for f in found), "the processes have not planned the same step"
        self.plan, self.asked = 0, any(f["asked"] for f in found)
        whole = Sums()
        for each in found:
            for name, (value, weight) in each["sums"].items():
                whole.sums[name] = whole.sums.get(name, torch.zeros((), dtype=torch.float64)) + value
                whole.weights[name] = whole.weights.get(name, 0.0) + weight
        return whole

    def added(self, values: list[float]) -> list[float]:
        return [sum(each) for each in zip(*self.gathered(values), strict=True)]

    def begin(self, seed: int, step: int) -> None:
        import torch

        told = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(told[:7], "big"))

    # --- what all should have

    def gathered(self, value: Any) -> list[Any]:
        """What each process says, in order: JSON."""
        data = json.dumps(value).encode()
        head = len(data).to_bytes(8, "big") + data
        first = self._exchanged(head[:SHORT].ljust(SHORT, b"\0"))
        sizes = [int.from_bytes(each[:8], "big") for each in first]
        if (more := max(sizes) + 8 - SHORT) > 0:
            rest = self._exchanged(head[SHORT:].ljust(more, b"\0"))
            first = [a + b for a, b in zip(first, rest, strict=True)]
        return [json.loads(each[8 : 8 + n]) for each, n in zip(first, sizes, strict=True)]

    def led(self, make: Callable[[], Any]) -> Any:
        return self.gathered(make() if self.first else None)[0]

    def same(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        import torch

        mine = {n: t.detach().to("cpu").contiguous() for n, t in make().items()} if self.first else {}
        told = self.led(lambda: [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in mine.items()])
        found = {}
        for name, dtype, shape in told:
            found[name] = mine[name] if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            self._from_first(found[name])
        return found

    def summed(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        self._sum(total)
        return total

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        if not self.first:
            self.led(dict)
        yield
        if self.first:
            self.led(dict)

    def alike(self, model: nn.Module) -> None:
        import torch

        tensors = _tensors(model)
        for name in self.differing(model):
            whole = tensors[name].detach().to("cpu").contiguous().clone()
            self._from_first(whole)
            with torch.no_grad():
                tensors[name].copy_(whole)

    def differing(self, model: nn.Module) -> list[str]:
        found = self.gathered(_fingerprints(_tensors(model)))
        for rank, other in enumerate(found):
            names = found[0].keys() | other.keys()
            if apart := sorted(n for n in names if found[0].get(n, "")[8:] != other.get(n, "")[8:]):
                what = f"process {rank} has another model than process 0 ({apart[0]})"
                raise ModelError(what, "give all of them the same files and the same version of trivium")
        return [n for n in found[0] if any(other[n] != found[0][n] for other in found)]

    def agree(self, what: str, told: Callable[[], str]) -> None:
        found = self.gathered(told())
        for rank, other in enumerate(found):
            if other != found[0]:
                raise DataError(
                    f"process {rank} reads other {what} than process 0", "give all of them the same files to read"
                )

    def device(self, kind: str) -> str:
        if kind == "cpu":
            return kind
        if kind != "cuda":
            raise RecipeError(
                f"device: {kind} cannot be used by several processes", "use cpu, or cuda: a card for each"
            )
        import torch

        if self.local >= torch.cuda.device_count():
            what = f"process {self.rank} has no card of its own: this machine has {torch.cuda.device_count()}"
            raise RecipeError(what, "start as many processes as there are cards, or use device: cpu")
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    # --- the end

    def last_words(self, error: UserError) -> tuple[int, bool]:
        """One process tells: what all have met, the first one; what one alone has met, that one."""
        watch = self.watch
        if watch is None:  # nobody was found yet
            return error.exit_code, self.first
        if isinstance(error, Interrupted) and watch.suspects():
            watch.settle()  # the launcher stops the others when one of them has died
        if not self.first and isinstance(error, (Interrupted, NonFiniteError)):
            return watch.end_of_first(), False  # which saves
        if watch.verdict is not None:
            return watch.verdict, False
        watch.ending = True
        return error.exit_code, watch.first_to_tell()

    def failed(self, told: str) -> int:
        """Our own mistake, unless another process's end has made it; returns the exit code."""
        if self.watch is None:
            sys.stderr.write(told)
            return 1
        self.watch.settle()
        if self.watch.verdict is not None:
            return self.watch.verdict
        self.watch.ending = True
        if self.watch.first_to_tell():
            sys.stderr.write(told)
        return 1

    def leave(self, code: int) -> None:
        """The end of this process, in which no thread of the libraries' may hold it up."""
        if self.watch is not None:
            self.watch.leave(code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    # --- the wire

    def _exchanged(self, data: bytes) -> list[bytes]:
        import torch
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        self._wait(lambda: dist.all_gather(found, mine, async_op=True))
        return [bytes(each.numpy()) for each in found]

    def _from_first(self, tensor: Tensor) -> None:
        """Over a tensor on the CPU, bit for bit."""
        import torch
        import torch.distributed as dist

        if tensor.numel():
            self._wait(lambda: dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0, async_op=True))

    def _sum(self, flat: Tensor) -> None:
        import torch.distributed as dist

        if not flat.is_cuda:
            self._wait(lambda: dist.all_reduce(flat, async_op=True))
            return
        if self._cards is None:
            self._cards = dist.new_group(backend="nccl")
        dist.all_reduce(flat, group=self._cards)

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Until it is done, in Python: so that a signal is heard, and the end of another process."""
        assert self.watch is not None, "the others were found"
        pause = 0.0
        try:
            work = begin()
            while not work.is_completed():
                self.watch.check()
                time.sleep(pause)
                pause = min(0.005, pause + 0.00002)
            work.wait()
        except RuntimeError:  # a connection broke: whose, the watch finds out
            self.watch.settle(patient=True)
            self.watch.check()
            raise


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, each of one kind of numbers on one device, and of at most `BUCKET` of them or of one alone."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        like = bucket and (bucket[0].dtype, bucket[0].device) == (p.dtype, p.device)
        if bucket and (not like or size + p.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if t.numel()}


def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Eight digits of each one's bits, whatever the order of adding up, and its kind and shape."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = {}
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().reshape(-1).view(kinds[tensor.element_size()])
        total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(BUCKET))
        found[name] = f"{total % 2**32:08x} {tensor.dtype} {tuple(tensor.shape)}"
    return found
