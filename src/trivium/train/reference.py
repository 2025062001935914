"""The reference of preference tuning: the parent's log-probabilities, never a silent second copy of the model.

With an adapter the parent is the same base under the parent's small weights: a gradient-free pass over the same
forest. With full training the parent's numbers are computed once, before the first step, and kept: beside the
checkpoints, so that a training that goes on need not put the parent back to compute them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.files import damage, make_folder, read_tensors, whole_folder, write_tensors
from trivium.forest import Forest

LogProb = Callable[[Forest], Tensor]


def no_reference(forest: Forest) -> None:
    """For objectives that compare with nothing."""
    return None


class UnderParent:
    """A pass over the same forest with the model put back to its parent inside ``parent()``."""

    def __init__(self, logprob: LogProb, parent: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.logprob, self.parent = logprob, parent

    def __call__(self, forest: Forest) -> Tensor:
        with torch.no_grad(), self.parent():
            return self.logprob(forest)


class Remembered:
    """The parent's numbers of each example, computed once while the model still is its parent.

    Costs one gradient-free pass over the examples and four bytes per trained token.
    """

    def __init__(self, logprob: LogProb, forests: Iterable[Forest]) -> None:
        self.kept: dict[Hashable, Tensor] = {}
        self._compute(logprob, forests)

    @classmethod
    def kept_in(
        cls, folder: Path, about: Mapping[str, Any], logprob: LogProb, forests: Callable[[], Iterable[Forest]]
    ) -> Remembered:
        """Those that ``folder`` keeps, where it is whole and says ``about`` of itself; else computed, and kept there.

        For examples of stored rows, whose identity is (store, number). Raises DiskError.
        """
        found = cls(logprob, ())
        if folder.is_dir() and damage(folder, about) is None:
            for name, group in read_tensors(folder).items():
                pieces = group["values"].split(group["counts"].tolist())
                found.kept |= {(name, n): piece for n, piece in zip(group["numbers"].tolist(), pieces, strict=True)}
            return found
        found._compute(logprob, forests())
        make_folder(folder.parent)
        with whole_folder(folder, about) as partial:
            for store in {identity[0] for identity in found.kept}:  # type: ignore[index]
                mine = {identity[1]: v for identity, v in found.kept.items() if identity[0] == store}  # type: ignore[index]
                counts = torch.tensor([len(v) for v in mine.values()])
                tensors = {"numbers": torch.tensor(list(mine)), "counts": counts, "values": torch.cat([*mine.values()])}
                write_tensors(partial / f"{store}.safetensors", tensors)
        return found

    def _compute(self, logprob: LogProb, forests: Iterable[Forest]) -> None:
        with torch.no_grad():
            for forest in forests:
                if all(e.identity in self.kept for e in forest.examples):
                    continue
                counts = [e.trained_tokens for e in forest.examples]
                pieces = logprob(forest).cpu().split(counts)
                self.kept.update(zip((e.identity for e in forest.examples), pieces, strict=True))

    def __call__(self, forest: Forest) -> Tensor:
        return torch.cat([self.kept[e.identity] for e in forest.examples]).to(forest.tokens.device)
