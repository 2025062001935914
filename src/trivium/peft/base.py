"""A method hangs small trained modules under a frozen base; this file is what all methods share.

    attached = attach(model, LoRASettings(r=16), seed=0)     # freezes the base, hangs the deltas
    with off(model): ...                                     # the base, bitwise
    parent = state(model)                                    # the small weights, copied
    with swapped(model, parent): ...                         # the same model under other small weights
    merge(model)                                             # folded into the base, deltas gone

The base's modules are never replaced: a delta is a child of its target, called by hooks on it (`hub.py`). So the base
keeps its parameter names, and what no adapter acts on is the base's own computation, untouched. Trained weights are
float32; a delta computes in the dtype of its target's output. Several adapters may hang in one base, each under its
name; all verbs here mean the one called "default" where none is named.

Cost: a delta's own products, and two Python calls per target; no second copy of any base weight that is not trained.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.errors import ModelError
from trivium.model.quantized import count
from trivium.peft.copies import Copies
from trivium.peft.delta import Delta, Plan
from trivium.peft.hub import CHILD, DEFAULT, Hub, Use, check_name
from trivium.peft.kinds import Settings
from trivium.peft.settings import METHODS, method_name
from trivium.swapping import under
from trivium.virtual import ADAPTERS, NEW_HEADS


@dataclass(frozen=True)
class Attached:
    """What ``attach`` did. ``total_parameters`` counts base and deltas together, tied weights once."""

    settings: Settings
    targets: list[str]
    notes: list[str]
    trained_parameters: int
    total_parameters: int


def attach(model: nn.Module, settings: Settings, seed: int, name: str = DEFAULT) -> Attached:
    """Freeze ``model`` and hang the deltas of ``settings`` in it; the same seed gives the same start anywhere.

    For ``full`` everything is trained and nothing hung. On the ``meta`` device only shapes are made.
    Raises RecipeError when ``target_modules`` matches nothing, ModelError when the model cannot take the method.
    """
    plan = plan_for(model, settings)
    if plan is None:
        make_full(model)
        return describe(model, settings, [])
    generator = torch.Generator().manual_seed(seed)

    def fill(hung: dict[str, Delta]) -> None:
        if any(parameter.is_meta for delta in hung.values() for parameter in delta.parameters()):
            return
        new = getattr(model, NEW_HEADS, ())
        if plan.fill is not None:
            with off(model):
                plan.fill(model, {target: delta for target, delta in hung.items() if target not in new}, generator)
        for target, delta in hung.items():
            if plan.fill is None or target in new:
                delta.reset(model.get_submodule(target), generator)

    return hang(model, settings, plan, fill, name)


def plan_for(model: nn.Module, settings: Settings) -> Plan | None:
    """The deltas that ``attach`` would hang, as shapes only, on the ``meta`` device; None for ``full``.

    Modules that the model has new are trained whole beside any method's own.
    """
    module = METHODS[method_name(settings)].module
    if module is None:
        return None
    with torch.device("meta"):
        plan: Plan = importlib.import_module(module).build(model, settings)
        new = {name: Copies(model.get_submodule(name), ("weight",)) for name in getattr(model, NEW_HEADS, ())}
    return replace(plan, deltas={**plan.deltas, **new})


def hang(
    model: nn.Module,
    settings: Settings,
    plan: Plan,
    fill: Callable[[dict[str, Delta]], None],
    name: str = DEFAULT,
) -> Attached:
    """Freeze ``model`` and hang the deltas of ``plan``, each on its target's device; ``fill`` gives them weights.

    The adapter acts from now on, instead of any other.
    """
    assert not deltas(model, name), f"the model has an adapter {name!r} already: merge or detach it first"
    check_name(name)
    model.requires_grad_(False)
    use: Use = getattr(model, ADAPTERS, None) or Use()
    setattr(model, ADAPTERS, use)
    for target_name, delta in plan.deltas.items():
        target = model.get_submodule(target_name)
        delta.to_empty(device=_device(target))
        Hub.on(target, use)[name] = delta.requires_grad_(True)
    use.carriers[name] = [delta for delta in plan.deltas.values() if delta.virtual() is not None]
    fill(plan.deltas)
    for target_name, delta in plan.deltas.items():
        if not any(tensor.is_meta for tensor in (*delta.parameters(), *delta.buffers())):
            delta.derive(model.get_submodule(target_name))
    use.switch({name: 1.0})
    return describe(model, settings, plan.notes, name)


def _device(target: nn.Module) -> torch.device:
    return next(target.parameters()).device


def describe(model: nn.Module, settings: Settings, notes: list[str], name: str = DEFAULT) -> Attached:
    """What is hung in ``model`` and trained as it stands; for a model whose adapter trains on, too."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Attached(settings, list(deltas(model, name)), notes, trained, count(model))


def make_full(model: nn.Module) -> None:
    """Make every parameter trained, and float32 as all trained weights are. Raises ModelError when quantised."""
    assert not deltas(model), "the model has deltas: merge or detach them first"
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"{name} is quantised ({parameter.dtype}) and cannot be trained in full",
                "load the model unquantised, or train with method: {name: lora}",
            )
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def deltas(model: nn.Module, name: str = DEFAULT) -> dict[str, Any]:
    """The deltas of one adapter, by the names of their targets, in the model's order."""
    hubs = ((path, module) for path, module in model.named_modules() if isinstance(module, Hub) and name in module)
    return {path.removesuffix(CHILD).removesuffix("."): hub[name] for path, hub in hubs}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters that hang in a model."""
    return list(dict.fromkeys(name for module in model.modules() if isinstance(module, Hub) for name in module))


def dropping(model: nn.Module, on: bool) -> None:
    """Switch the deltas' own dropout; ``model.train()`` and ``eval()`` do not touch it."""
    for module in model.modules():
        if isinstance(module, Delta):
            module.dropping = on


def continues(model: nn.Module, settings: Settings) -> bool:
    """Whether ``settings`` ask for just the deltas that ``model`` has, so that these can train on.

    Settings read from a folder name modules one by one where a recipe says "all-linear"; what counts is what would
    be hung: the same targets, kinds, shapes and constants. Dropout may differ, being no part of the function.
    """
    plan = plan_for(model, settings)
    return plan is not None and alike(plan.deltas, deltas(model))


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sets of deltas are the same function of their weights."""
    same_places = one.keys() == other.keys()
    return same_places and all(_signature(one[name]) == _signature(delta) for name, delta in other.items())


def _signature(delta: Delta) -> tuple[Any, ...]:
    state_of_use = ("training", "dropping", "dropout")
    constants = {k: v for k, v in vars(delta).items() if k not in state_of_use and isinstance(v, (int, float, str))}
    return type(delta), constants, {name: weight.shape for name, weight in delta.named_parameters()}


# --- what acts


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """The base, bitwise, for the length of the block."""
    use: Use = getattr(model, ADAPTERS, None) or Use()
    with use.only(None):
        yield


# --- the small weights


def small_weights(hung: dict[str, Any], fixed: bool = False) -> dict[str, Tensor]:
    """The trained weights of some deltas as they are, by ``<target>.<weight>``; one that several share, once.

    With ``fixed`` also what is not trained and belongs to the adapter.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for target, delta in hung.items():
        buffers = delta.state_dict(keep_vars=True).items() if fixed else delta.named_parameters()
        for name, weight in buffers:
            if id(weight) not in seen:
                seen.add(id(weight))
                found[f"{target}.{name}"] = weight
    return found


def state(model: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """A copy of the small weights, by ``<target's name>.<weight's name>``; later training does not change it."""
    return {key: parameter.detach().clone() for key, parameter in small_weights(deltas(model, name)).items()}


def load_state(model: nn.Module, small: dict[str, Tensor]) -> None:
    """Copy small weights in, whatever their device and dtype. Raises ModelError when names or shapes do not fit."""
    copy_in(small_weights(deltas(model)), small)


def copy_in(mine: dict[str, Tensor], small: dict[str, Tensor]) -> None:
    """Copy ``small`` into ``mine``. Raises ModelError when names or shapes do not fit."""
    check_same(mine, small)
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(small[key])


@contextmanager
def swapped(model: nn.Module, small: dict[str, Tensor]) -> Iterator[None]:
    """The model under other small weights for the length of the block, then its own again, bitwise (`swapping`).

    Raises ModelError when names or shapes do not fit.
    """
    mine = small_weights(deltas(model))
    check_same(mine, small)
    with under(mine, small):
        yield


def check_same(mine: dict[str, Tensor], small: dict[str, Tensor]) -> None:
    """Raise ModelError, naming the first, when names or shapes differ."""
    remedy = "these are the weights of another adapter: attach with the settings they were trained with"
    for name in sorted(mine.keys() ^ small.keys()):
        raise ModelError(f"{name} is {'missing' if name in mine else 'not one of the deltas'}", remedy)
    for name, parameter in mine.items():
        if parameter.shape != small[name].shape:
            shapes = f"{list(small[name].shape)}, the model's is {list(parameter.shape)}"
            raise ModelError(f"{name} has shape {shapes}", remedy)


def kept_exact(model: nn.Module) -> bool:
    """Whether the adapter is of a kind that is saved in float32, whatever the base is saved in."""
    return any(delta.exact for delta in deltas(model).values())


def rates(model: nn.Module) -> dict[str, float]:
    """Factors on the learning rate that deltas ask for, by the parameter's full name in ``model``."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, Delta):
            found |= {f"{path}.{weight}": factor for weight, factor in module.rates().items()}
    return found


# --- the end


def detach(model: nn.Module, name: str = DEFAULT) -> None:
    """Take an adapter away; when it was the last one, what is left is the base, frozen."""
    for target in deltas(model, name):
        hub = model.get_submodule(f"{target}.{CHILD}" if target else CHILD)
        assert isinstance(hub, Hub)
        hub.drop(model.get_submodule(target), name)
    use: Use | None = getattr(model, ADAPTERS, None)
    if use is not None:
        use.carriers.pop(name, None)
        use.switch({other: weight for other, weight in use.active.items() if other != name}, use.averaged)
    if use is not None and not adapter_names(model):
        delattr(model, ADAPTERS)


def obstacle(model: nn.Module, name: str = DEFAULT) -> ModelError | None:
    """Why an adapter cannot be merged into the base, or None: its method cannot, or a target's weight is shared with
    another module (the other would change with it)."""
    pairs = [(path, model.get_submodule(path), delta) for path, delta in deltas(model, name).items()]
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    changed = [(f"{path}.{key}", target, delta, key) for path, target, delta in pairs for key in delta.changes]
    touched = Counter(id(getattr(target, key, None)) for _, target, _, key in changed)
    for _, target, delta in pairs:
        if (found := delta.obstacle(target)) is not None:
            return found
    for path, target, _, key in changed:
        tensor = id(getattr(target, key))
        # one copy of what is tied changes it alike; two updates, or copies trained apart, would not
        apart = {id(getattr(one, "held", one)) for _, t, one, k in changed if id(getattr(t, k)) == tensor}
        if owners[tensor] > touched[tensor] or len(apart) > 1:
            return ModelError(
                f"{path} is shared with another module and cannot take in the adapter",
                "keep the adapter as a folder of its own; or train without this module, or with all that share it",
            )
    return None


def merge(model: nn.Module, name: str = DEFAULT) -> None:
    """Fold every delta of an adapter into the base, in float32, and detach it. All or nothing.

    The sum is rounded to the dtype of the base's weight. Raises ModelError where there is an `obstacle`, or a weight is
    packed in 4 or 8 bit.
    """
    if (found := obstacle(model, name)) is not None:
        raise found
    for path, delta in deltas(model, name).items():
        for key in delta.changes:
            if not (tensor := getattr(model.get_submodule(path), key)).is_floating_point():
                raise ModelError(
                    f"an adapter cannot be merged into a quantised weight ({path}.{key}, {tensor.dtype})",
                    "load the base unquantised and merge into that",
                )
    with torch.no_grad():
        for path, delta in deltas(model, name).items():
            delta.merge(model.get_submodule(path))
    detach(model, name)
