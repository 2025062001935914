"""The reference of preference tuning: the parent's log-probabilities, never a silent second copy of the model.

With an adapter the parent is the same base under the parent's small weights: a gradient-free pass over the same
forest. With full training, or where every row is seen several times, the parent's numbers are computed once, before
the first step, and kept: on disk under what they are computed of, so that a training that goes on, or another one on
the same rows, need not compute them again. On request the reference moves with the model (TR-DPO).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivium.files import damage, make_folder, read_tensors, whole_folder, write_tensors
from trivium.forest import Forest
from trivium.objectives.base import LogProb
from trivium.swapping import under
from trivium.train.processes import ALONE, Processes

KEPT = "kept.safetensors"


class NoReference:
    """For objectives that compare with nothing; and what every reference has."""

    def __call__(self, forest: Forest) -> Tensor | None:
        """The parent's log-probabilities, ``[K]``."""
        return None

    def after_step(self, step: int) -> None:
        """Called after every optimizer step, from 1."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold of it."""
        return {}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """As it was when ``tensors`` were taken."""


class UnderParent(NoReference):
    """A pass over the same forest with the model put back to its parent inside ``parent()``."""

    def __init__(self, logprob: LogProb, parent: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.logprob, self.parent = logprob, parent

    def __call__(self, forest: Forest) -> Tensor:
        with torch.no_grad(), self.parent():
            return self.logprob(forest)


class Moving(NoReference):
    """TR-DPO, Gorbatovski et al. 2024, eq. 3 and 4: every so many steps the reference moves to the model.

    ``mixup`` of the way: 1 is the hard update. It starts as the model starts. Costs one more copy of all ``weights``
    that are trained, and a gradient-free pass over each forest.
    """

    def __init__(
        self, logprob: LogProb, weights: Mapping[str, nn.Parameter], steps: int, mixup: float,
        plainly: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.logprob, self.weights, self.steps, self.mixup, self.plainly = logprob, weights, steps, mixup, plainly
        self.held = {name: weight.detach().clone() for name, weight in weights.items()}

    def __call__(self, forest: Forest) -> Tensor:
        with torch.no_grad(), self.plainly(), under(self.weights, self.held):
            return self.logprob(forest)

    def after_step(self, step: int) -> None:
        if step % self.steps == 0:
            for name, weight in self.weights.items():
                self.held[name].lerp_(weight.detach(), self.mixup)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.held)

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        for name, held in self.held.items():
            held.copy_(tensors[name])


class Remembered(NoReference):
    """The parent's numbers of each example, computed once while the model still is its parent.

    Costs one gradient-free pass over the examples and four bytes per trained token.
    """

    def __init__(self, logprob: LogProb, forests: Iterable[Forest]) -> None:
        self.kept: dict[int, Tensor] = {}
        self._compute(logprob, forests)

    @classmethod
    def kept_in(
        cls, folder: Path, about: Mapping[str, Any], logprob: LogProb, forests: Callable[[], Iterable[Forest]],
        others: Processes = ALONE,
    ) -> tuple[Remembered, bool]:  # fmt: skip
        """Those that ``folder`` keeps, where it is whole and says ``about`` of itself; else computed, and kept there.

        And whether they were there. For examples of stored rows, which are the same in every process. Several
        processes compute a share each; the first one reads and writes. Raises DiskError.
        """
        found = cls(logprob, ())
        if others.led(lambda: folder.is_dir() and damage(folder, about) is None):
            group = others.same(lambda: next(iter(read_tensors(folder).values())))
            pieces = group["values"].split(group["counts"].tolist())
            found.kept = dict(zip(group["keys"].tolist(), pieces, strict=True))
            return found, True
        found._compute(logprob, forests(), others)
        if not others.first:
            return found, False
        make_folder(folder.parent)
        counts = torch.tensor([len(v) for v in found.kept.values()])
        tensors = {"keys": torch.tensor([*found.kept]), "counts": counts, "values": torch.cat([*found.kept.values()])}
        with whole_folder(folder, about) as partial:
            write_tensors(partial / KEPT, tensors)
        return found, False

    def _compute(self, logprob: LogProb, forests: Iterable[Forest], others: Processes = ALONE) -> None:
        keys: list[int] = []
        counts: list[int] = []
        pieces: list[Tensor] = []
        seen: set[int] = set()
        with torch.no_grad():
            for forest in forests:
                mine = [_key(e.identity) for e in forest.examples]
                if seen.issuperset(mine):
                    continue
                pieces.append(logprob(forest).cpu() if others.mine(len(pieces)) else torch.zeros(len(forest.source)))
                seen.update(mine)
                keys += mine
                counts += [e.trained_tokens for e in forest.examples]
        if pieces:
            self.kept = dict(zip(keys, others.summed(torch.cat(pieces)).split(counts), strict=True))

    def __call__(self, forest: Forest) -> Tensor:
        return torch.cat([self.kept[_key(e.identity)] for e in forest.examples]).to(forest.tokens.device)


no_reference = NoReference()


def _key(identity: Hashable) -> int:
    """An example's identity in 63 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:8], "big") >> 1
