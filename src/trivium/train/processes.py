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
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trivium.errors import RecipeError, UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from trivium.forest import Forest
    from trivium.objectives.base import Sums

START = "start it as: torchrun --nproc_per_node N -m trivium run RECIPE"


class Processes:
    """One process alone, which is all there is."""

    rank, count = 0, 1
    asked = False  # whether another process was asked to stop
    reported: Sequence[dict[str, Any]] = ()  # what befell the others in the last step, each with its ``process``

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

    def report(self, **what: Any) -> None:
        """Let the first process know of this, with the statistics of the step: JSON."""

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
    from trivium.train.several import Several

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


def dealt(sizes: Sequence[int] | np.ndarray, count: int) -> list[list[int]]:
    """Numbers of ``sizes`` dealt out to ``count`` processes, the largest first, each to whom has least so far."""
    hands: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        least = min(range(count), key=lambda r: (held[r], r))
        hands[least].append(number)
        held[least] += sizes[number]
    return [sorted(hand) for hand in hands]
