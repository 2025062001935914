"""Recomputing layers in the backward pass: memory of one layer's activations instead of all, for a third more time.

`transformers`' own gradient checkpointing does nothing in evaluation mode, in which trivium trains (dropout is off),
so each layer's forward is wrapped here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trivium.model.fast import gated
from trivium.virtual import Adapters, same_again

SHARE = 0.6  # auto recomputes when the activations would take more than this share of the free memory


@contextlib.contextmanager
def recomputed(layers: list[nn.Module], adapters: Adapters | None = None) -> Iterator[None]:
    """Within the block each of these layers keeps only its input, and runs again in the backward pass.

    ``adapters`` are those of the model: what acts in a layer acts when it runs again.
    """

    def wrap(forward: Any) -> Any:
        def computed(*args: Any, **kwargs: Any) -> Any:
            with gated.kept_as_it_is():  # what is thrown away needs no leaner form, and must not be held by one
                return forward(*args, **kwargs)

        def recomputing(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            again = partial(same_again, adapters)
            return checkpoint(computed, *args, use_reentrant=False, context_fn=again, **kwargs)

        return recomputing

    for layer in layers:
        layer.forward = wrap(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``run()``: each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could come again

    def pack(tensor: Tensor) -> None:
        # the graph itself keeps nothing: an output that a node keeps would hold the node, and never be freed
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def too_much(bytes_per_token: float, tokens: int, free: int) -> bool:
    """Whether ``tokens`` in one pass would keep too much of ``free`` bytes."""
    return bytes_per_token * tokens > SHARE * free
