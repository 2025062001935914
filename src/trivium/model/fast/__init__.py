"""Faster ways to the same numbers, put in a `transformers` model while it computes on forests.

    paths = Paths(hf)
    paths.install()    # norms, gated MLPs, rotary embeddings: those that a trial finds to be what they are taken for
    paths.remove()     # the model as it came

A model's own modules are not replaced: those of known kinds get another ``forward`` for a while. What kind a module
is of is not read from its name: its class computes a few random numbers, and so does ours, and they must agree. The
proof before training then compares the whole with the unmodified model on real rows, gradients included.

All paths are for float32 on the CPU, where they are measured (`docs/performance.md`); elsewhere the model's own code
runs. `without` switches them off one by one, for tests.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from trivium.model.fast import gated, norm, rotary

ALL = ("attention", "norm", "gated", "rotary", "linear")
ROTARY = "apply_rotary_pos_emb"

_off: set[str] = set()
_originals: dict[str, Callable[..., Any]] = {}  # of rotary functions, by the module of `transformers` they are in
_users: Counter[str] = Counter()


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """These paths are not taken within the block (all of them where none is named); for tests and benchmarks."""
    before = set(_off)
    _off.update(names or ALL)
    try:
        yield
    finally:
        _off.clear()
        _off.update(before)


def taken(name: str, *tensors: Tensor) -> bool:
    """Whether a path is taken for these tensors."""
    return (
        name not in _off
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


class Paths:
    """The faster ways in one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changed: list[nn.Module] = []
        self.files: set[str] = set()

    def install(self) -> None:
        """Where they are not in it yet."""
        if self.changed or self.files:
            return
        for module in self.model.modules():
            if "forward" not in module.__dict__ and (forward := _forward_for(module)) is not None:
                module.forward = forward
                self.changed.append(module)
        files = {type(module).__module__ for module in self.model.modules() if hasattr(module, "q_proj")}
        self.files = {file for file in files if _rotates(file)}
        for file in self.files:
            _patch(file)

    def remove(self) -> None:
        for module in self.changed:
            del module.forward
        for file in self.files:
            _unpatch(file)
        self.changed, self.files = [], set()


# --- which modules


def _forward_for(module: nn.Module) -> Callable[..., Any] | None:
    """Another forward for a module of a known kind; None for any other."""
    if (eps := norm.eps_of(module)) is not None and (offset := _offset(_Key(module), eps)) is not None:
        return partial(_normed, module, eps, offset)
    if gated.is_gated(module) and (activation := _activation(_Key(module))) is not None:
        return partial(_mlp, module, activation)
    return None


class _Key:
    """A module, as a cache looks at it: all modules of a class and activation are tried once."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.name = (type(module), repr(getattr(module, "act_fn", None)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def _small(module: nn.Module, **changes: Any) -> nn.Module:
    """A copy of a module with other tensors and children, to try its class with."""
    made = copy.copy(module)
    made.__dict__ = {**module.__dict__, **changes}
    return made


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@cache
def _offset(key: _Key, eps: float) -> float | None:
    """The offset with which this class is an RMSNorm, or None where it is something else."""
    x, weight, kind = _random(3, 8), _random(8), type(key.module)
    with contextlib.suppress(Exception), torch.no_grad():  # another class of that shape may fail in any way
        said = kind.forward(_small(key.module, _parameters={"weight": weight}), x)
        for offset in (0.0, 1.0):
            if torch.allclose(said, norm.RMSNorm.apply(x, weight, eps, offset), atol=1e-6):
                return offset
    return None


@cache
def _activation(key: _Key) -> gated.Activation | None:
    """The activation with which this class is a gated MLP, or None."""
    act = {n: m for n, m in key.module._modules.items() if n not in ("gate_proj", "up_proj", "down_proj")}
    with torch.random.fork_rng(devices=[]):
        linear = {n: nn.Linear(a, b) for n, a, b in (("gate_proj", 6, 9), ("up_proj", 6, 9), ("down_proj", 9, 6))}
    for n, module in enumerate(linear.values()):
        module.weight.data = _random(*module.weight.shape).roll(n)
    x = _random(3, 6)
    with contextlib.suppress(Exception), torch.no_grad():
        small = _small(key.module, _modules={**act, **linear})
        said = type(key.module).forward(small, x)
        for activation in gated.ACTIVATIONS:
            if torch.allclose(said, gated.gated_mlp(small, x, activation), atol=1e-5):
                return activation
    return None


def _normed(module: nn.Module, eps: float, offset: float, x: Tensor) -> Tensor:
    weight: Any = module.weight  # not a parameter, where an adapter has put another in its place
    if not taken("norm", x, weight):
        own: Tensor = type(module).forward(module, x)
        return own
    out: Tensor = norm.RMSNorm.apply(x, weight, eps, offset)
    return out


def _mlp(module: nn.Module, activation: gated.Activation, x: Tensor) -> Tensor:
    if not taken("gated", x):
        own: Tensor = type(module).forward(module, x)
        return own
    return gated.gated_mlp(module, x, activation)


# --- the rotary function, which is a global of the model's file


def _rotates(file: str) -> bool:
    """Whether a file of `transformers` has the rotary function, in the usual layout."""
    own = _originals.get(file) or getattr(sys.modules.get(file), ROTARY, None)
    return own is not None and _usual(own)


@cache
def _usual(function: Callable[..., Any]) -> bool:
    q, k, angles = _random(1, 2, 3, 8), _random(1, 1, 3, 8), _random(1, 3, 8)
    cos, sin = angles.cos(), angles.sin()
    with contextlib.suppress(Exception):
        said = function(q, k, cos, sin)
        ours = [rotary.Rotary.apply(x, cos[:, None], sin[:, None]) for x in (q, k)]
        return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(said, ours, strict=True))
    return False


def _patch(file: str) -> None:
    _users[file] += 1
    if file in _originals:
        return
    original = _originals[file] = getattr(sys.modules[file], ROTARY)

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        usual = not more and not named and q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.ndim == 3
        if not usual or not taken("rotary", q, k, cos, sin):
            return original(q, k, cos, sin, *more, **named)
        cos, sin = cos[:, None], sin[:, None]
        return rotary.Rotary.apply(q, cos, sin), rotary.Rotary.apply(k, cos, sin)

    setattr(sys.modules[file], ROTARY, turned)


def _unpatch(file: str) -> None:
    _users[file] -= 1
    if not _users[file]:
        setattr(sys.modules[file], ROTARY, _originals.pop(file))
