"""All that a training is between two steps: trained weights, the optimizers' moments, the random state; and back.

    taken = take(model, optimizers, device, copy=True)     # {"weights": {...}, "optimizer": {...}, "rng": {...}}
    put_back(taken, model, optimizers, device)             # bitwise

Which examples come next needs no state: the order is a function of the seed and the step's number.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from trivium.errors import CheckpointError, NonFiniteError

Taken = dict[str, dict[str, Tensor]]
MOMENTS = {"AdamW": 2, "Muon": 1}  # tensors of a weight's size that an optimizer keeps of it


def take(model: nn.Module, optimizers: list[torch.optim.Optimizer], device: str, copy: bool) -> Taken:
    """The state as tensors on the CPU; with ``copy`` they stay as they are while training goes on.

    Raises NonFiniteError where something is not finite, so that it is never saved.
    """
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters() if p.requires_grad}
    moments = {
        f"{number}.{names[p]}.{key}": value
        for number, optimizer in enumerate(optimizers)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    weights: dict[str, Tensor] = {n: p for p, n in names.items()}
    for name, tensor in (*weights.items(), *moments.items()):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"{name} is not finite any more; this state is not saved",
                "lower the learning rate; the checkpoint before this one is kept",
            )
    taken = {"weights": weights, "optimizer": moments, "rng": random_state(device)}
    return {k: {n: t.detach().to("cpu", copy=copy) for n, t in group.items()} for k, group in taken.items()}


def put_back(taken: Taken, model: nn.Module, optimizers: list[torch.optim.Optimizer], device: str) -> None:
    """The state as it was taken. Raises CheckpointError where it is that of other weights."""
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    _check(taken, mine)
    put_weights(taken["weights"], mine)
    found: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for full, tensor in taken["optimizer"].items():
        number, rest = full.split(".", 1)
        name, key = rest.rsplit(".", 1)
        # a copy of its own: what is read from a file may lie at odd addresses, where products round otherwise
        found[number, name][key] = tensor.clone()
    names = {id(p): n for n, p in mine.items()}
    for count, optimizer in enumerate(optimizers):
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        state = {index: found[str(count), n] for index, n in enumerate(order) if (str(count), n) in found}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    set_random_state(taken["rng"], device)


def _check(taken: Taken, mine: dict[str, nn.Parameter]) -> None:
    """What is put back is of this training. Raises CheckpointError."""
    wrong = [name for name in ("weights", "optimizer", "rng") if name not in taken]
    if not wrong:
        _check_weights(taken["weights"], mine)
    for full, tensor in taken["optimizer"].items() if not wrong else ():
        name, _, key = full.partition(".")[2].rpartition(".")
        fits = name in mine and tensor.shape in (mine[name].shape, torch.Size([]))
        wrong += [] if key and fits and tensor.is_floating_point() else [full]
    random, own = taken.get("rng", {}).get("cpu"), torch.get_rng_state()
    if wrong or random is None or (random.shape, random.dtype) != (own.shape, own.dtype):
        what = f"the checkpoint is of another training ({(wrong or ['rng'])[0][:80]})"
        raise CheckpointError(what, "start over with --fresh")


def _check_weights(weights: dict[str, Tensor], mine: dict[str, nn.Parameter]) -> None:
    wrong = sorted(weights.keys() ^ mine.keys()) or [n for n, p in mine.items() if p.shape != weights[n].shape]
    if wrong:
        raise CheckpointError(f"the checkpoint is of other weights ({wrong[0]})", "start over with --fresh")


def put_weights(weights: dict[str, Tensor], mine: dict[str, nn.Parameter]) -> None:
    """Copy weights in. Raises CheckpointError where names or shapes are others."""
    _check_weights(weights, mine)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(weights[name])


def size_of(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of what `take` will give once every weight has been trained."""
    return sum(
        p.numel() * p.element_size() * (1 + MOMENTS[type(optimizer).__name__])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    )


def random_state(device: str) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(state: dict[str, Tensor], device: str) -> None:
    torch.set_rng_state(state["cpu"])
    if device.startswith("cuda") and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
