"""A model under other weights for the length of a block, then under its own again, bitwise.

    with under(trained, others):
        ...

The parameters stay the same objects and only their storage changes, so an optimizer does not notice and no weight is
copied that is on the device already. For gradient-free passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def under(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
    """``weights`` hold what ``others`` hold under the same names and of the same shapes, within the block."""
    own = {name: weight.data for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data = others[name].detach().to(weight.device, weight.dtype)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = own[name]
