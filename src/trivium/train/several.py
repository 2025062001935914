"""This process among others (`processes`): what is exchanged, how, and how all end together.

Gradients travel in flat buckets; a step's numbers as JSON in one exchange, which also compares the steps' plans. Over
gloo, but for what lies on cards, which nccl sums. A wait for others is in Python, so that a signal is heard meanwhile,
and the end of another process (`heartbeat`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trivium.errors import DataError, Interrupted, ModelError, NonFiniteError, RecipeError, UserError
from trivium.train.processes import START, Processes, dealt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trivium.forest import Forest
    from trivium.objectives.base import Sums
    from trivium.train.heartbeat import Watch

BUCKET = 2**24  # numbers of gradients that travel together
SHORT = 2048  # bytes of an exchange that go in one piece
EVER = timedelta(days=30)  # what a wait may last: whether the others live is watched elsewhere


class Several(Processes):
    """This process among others, as torchrun's environment variables say."""

    def __init__(self) -> None:
        self.local = 0  # among those on its machine
        self.asked = False
        self.plan = 0  # of the step under way, in short
        self.reports: list[dict[str, Any]] = []  # what befell this process in it
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
        groups = dist.PrefixStore("groups", store.clone())
        with self._contact():
            dist.init_process_group("gloo", store=groups, rank=self.rank, world_size=self.count, timeout=EVER)
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
        told = {"plan": self.plan, "sums": mine, "asked": interrupt.heard.is_set(), "reports": self.reports}
        found = self.gathered(told)
        assert all(f["plan"] == self.plan for f in found), "the processes have not planned the same step"
        self.plan, self.asked, self.reports = 0, any(f["asked"] for f in found), []
        self.reported = [{"process": n, **one} for n, f in enumerate(found) for one in f["reports"] if n]
        whole = Sums()
        for each in found:
            for name, (value, weight) in each["sums"].items():
                whole.sums[name] = whole.sums.get(name, torch.zeros((), dtype=torch.float64)) + value
                whole.weights[name] = whole.weights.get(name, 0.0) + weight
        return whole

    def report(self, **what: Any) -> None:
        self.reports.append(what)

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
        if watch is None or not watch.met:  # nobody was found yet
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
        if self.watch is None or not self.watch.met:
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
        with self._contact():
            work = begin()
            while not work.is_completed():
                self.watch.check()
                time.sleep(pause)
                pause = min(0.005, pause + 0.00002)
            work.wait()

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        """A connection that breaks within the block is another process's end: the watch finds out whose."""
        assert self.watch is not None, "the others were found"
        try:
            yield
        except RuntimeError:
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
