"""A method hangs small trained modules under a frozen base; this file is what all methods share.

    attached = attach(model, LoRASettings(r=16), seed=0)     # freezes the base, hangs the deltas
    with off(model): ...                                     # the base, bitwise
    parent = state(model)                                    # the small weights, copied
    with swapped(model, parent): ...                         # the same model under other small weights
    merge(model)                                             # folded into the base, deltas gone

The base's modules are never replaced: a delta is a child of its target, called by a forward hook on it. So the
base keeps its parameter names, and with a delta disabled the hook hands the target's own output on, untouched.
Trained weights are float32; a delta computes in the dtype of its target's output.

Cost: a delta's own products, and one Python call per target; no second copy of any base weight.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trivium.errors import ModelError
from trivium.peft.settings import METHODS, Settings, method_name

CHILD = "trivium_delta"  # the name under which a delta hangs in its target


class Delta(nn.Module):
    """One trained module under one target; ``forward`` returns the target's output, changed.

    The constructor makes float32 weights of the right shapes (it runs on ``meta``), ``reset`` fills all of them.

    ``enabled`` is False while the base is wanted. ``dropping`` says whether dropout acts: the base stays in
    evaluation mode while its deltas train, so ``training`` cannot say it.
    """

    handle: RemovableHandle | None = None  # of the hook on the target, once hung

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.dropping = False
        self.dropout = 0.0

    def forward(self, inputs: tuple[Any, ...], output: Any) -> Any:
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """Fill every weight in place, drawing on the CPU's ``generator``; the start must change no output."""
        raise NotImplementedError

    def obstacle(self, target: nn.Module) -> ModelError | None:
        """Why this delta cannot be merged into ``target``, or None."""
        raise NotImplementedError

    def merge(self, target: nn.Module) -> None:
        """Fold into ``target.weight``, computed in float32. Raises ModelError where that cannot be."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plan:
    """What a method's ``build`` returns: a delta for each target's name, and what the user should know."""

    deltas: dict[str, Delta]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Attached:
    """What ``attach`` did. ``total_parameters`` counts base and deltas together, tied weights once."""

    settings: Settings
    targets: list[str]
    notes: list[str]
    trained_parameters: int
    total_parameters: int


def attach(model: nn.Module, settings: Settings, seed: int) -> Attached:
    """Freeze ``model`` and hang the deltas of ``settings`` in it; the same seed gives the same start anywhere.

    For ``full`` everything is trained and nothing hung. On the ``meta`` device only shapes are made.
    Raises RecipeError when ``target_modules`` matches nothing, ModelError when the model cannot take the method.
    """
    plan = plan_for(model, settings)
    if plan is None:
        make_full(model)
        return describe(model, settings, [])
    attached = hang(model, settings, plan)
    generator = torch.Generator().manual_seed(seed)
    for delta in plan.deltas.values():
        if not any(parameter.is_meta for parameter in delta.parameters()):
            delta.reset(generator)
    return attached


def plan_for(model: nn.Module, settings: Settings) -> Plan | None:
    """The deltas that ``attach`` would hang, as shapes only, on the ``meta`` device; None for ``full``."""
    module = METHODS[method_name(settings)].module
    if module is None:
        return None
    with torch.device("meta"):
        plan: Plan = importlib.import_module(module).build(model, settings)
    return plan


def hang(model: nn.Module, settings: Settings, plan: Plan) -> Attached:
    """Freeze ``model`` and hang the deltas of ``plan``, each on its target's device, with weights yet to be filled."""
    assert not deltas(model), "the model has deltas already: merge or detach them first"
    model.requires_grad_(False)
    for name, delta in plan.deltas.items():
        target = model.get_submodule(name)
        assert not hasattr(target, CHILD), f"{name} has a {CHILD} already"
        delta.to_empty(device=next(target.parameters()).device)
        target.add_module(CHILD, delta.requires_grad_(True))
        # RemovableHandle copies itself along with the module that holds it, so a deepcopied model detaches too.
        delta.handle = target.register_forward_hook(_change_output)
    return describe(model, settings, plan.notes)


def _change_output(target: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The hook of every target. It finds the delta by name, so a deepcopied target calls its own."""
    delta = getattr(target, CHILD)
    return delta(inputs, output) if delta.enabled else None


def describe(model: nn.Module, settings: Settings, notes: list[str]) -> Attached:
    """What is hung in ``model`` and trained as it stands; for a model whose adapter trains on, too."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return Attached(settings, list(deltas(model)), notes, trained, total)


def make_full(model: nn.Module) -> None:
    """Make every parameter trained, and float32 as all trained weights are. Raises ModelError when quantised."""
    assert not deltas(model), "the model has deltas: merge or detach them first"
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"{name} is quantised ({parameter.dtype}) and cannot be trained in full",
                "Load the model unquantised, or train with method: {name: lora}.",
            )
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def deltas(model: nn.Module) -> dict[str, Delta]:
    """The deltas of a model, by the names of their targets, in the model's order."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Delta)}
    return {name.removesuffix(CHILD).removesuffix("."): module for name, module in found.items()}


def dropping(model: nn.Module, on: bool) -> None:
    """Switch the deltas' own dropout; ``model.train()`` and ``eval()`` do not touch it."""
    for delta in deltas(model).values():
        delta.dropping = on


def continues(model: nn.Module, settings: Settings) -> bool:
    """Whether ``settings`` ask for just the deltas that ``model`` has, so that these can train on.

    Settings read from a folder name modules one by one where a recipe says "all-linear"; what counts is what would
    be hung: the same targets, kinds, shapes and constants. Dropout may differ, being no part of the function.
    """
    plan = plan_for(model, settings)
    hung = deltas(model)
    if plan is None or plan.deltas.keys() != hung.keys():
        return False
    return all(_signature(plan.deltas[name]) == _signature(delta) for name, delta in hung.items())


def _signature(delta: Delta) -> tuple[Any, ...]:
    state_of_use = ("training", "enabled", "dropping", "dropout")
    constants = {k: v for k, v in vars(delta).items() if k not in state_of_use and isinstance(v, (int, float, str))}
    return type(delta), constants, {name: weight.shape for name, weight in delta.named_parameters()}


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """The base, bitwise, for the length of the block."""
    before = [(delta, delta.enabled) for delta in deltas(model).values()]
    try:
        for delta, _ in before:
            delta.enabled = False
        yield
    finally:
        for delta, enabled in before:
            delta.enabled = enabled


def small_weights(hung: dict[str, Delta]) -> dict[str, nn.Parameter]:
    """The trained weights of some deltas as they are, by ``<target>.<weight>``."""
    return {f"{target}.{name}": weight for target, delta in hung.items() for name, weight in delta.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the small weights, by ``<target's name>.<weight's name>``; later training does not change it."""
    return {name: parameter.detach().clone() for name, parameter in small_weights(deltas(model)).items()}


def load_state(model: nn.Module, small: dict[str, Tensor]) -> None:
    """Copy small weights in, whatever their device and dtype. Raises ModelError when names or shapes do not fit."""
    mine = small_weights(deltas(model))
    check_same(mine, small)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(small[name])


@contextmanager
def swapped(model: nn.Module, small: dict[str, Tensor]) -> Iterator[None]:
    """The model under other small weights for the length of the block, then its own again, bitwise.

    The parameters stay the same objects and only their storage changes, so an optimizer does not notice and no
    weight is copied that is on the device already. For gradient-free passes.
    """
    mine = small_weights(deltas(model))
    check_same(mine, small)
    before = {name: parameter.data for name, parameter in mine.items()}
    try:
        for name, parameter in mine.items():
            parameter.data = small[name].detach().to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in mine.items():
            parameter.data = before[name]


def check_same(mine: dict[str, nn.Parameter], small: dict[str, Tensor]) -> None:
    """Raise ModelError, naming the first, when names or shapes differ."""
    remedy = "These are the weights of another adapter: attach with the settings they were trained with."
    for name in sorted(mine.keys() ^ small.keys()):
        raise ModelError(f"{name} is {'missing' if name in mine else 'not one of the deltas'}", remedy)
    for name, parameter in mine.items():
        if parameter.shape != small[name].shape:
            shapes = f"{list(small[name].shape)}, the model's is {list(parameter.shape)}"
            raise ModelError(f"{name} has shape {shapes}", remedy)


def detach(model: nn.Module) -> None:
    """Take the deltas away; what is left is the base, frozen."""
    for name, delta in deltas(model).items():
        assert delta.handle is not None, f"the delta under {name} was never hung"
        delta.handle.remove()
        delattr(model.get_submodule(name), CHILD)


def merge(model: nn.Module) -> None:
    """Fold every delta into the base, in float32, and detach it. All or nothing.

    The sum is rounded to the dtype of the base's weight. Raises ModelError when a method cannot be merged, or a
    target's weight is quantised or shared with another module (the other would change with it).
    """
    pairs = [(name, model.get_submodule(name), delta) for name, delta in deltas(model).items()]
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, target, delta in pairs:
        if (obstacle := delta.obstacle(target)) is not None:
            raise obstacle
        if owners[id(target.weight)] > 1:
            raise ModelError(
                f"{name}.weight is shared with another module and cannot take in the adapter",
                "Keep the adapter as a folder of its own, or leave this module out of target_modules.",
            )
    with torch.no_grad():
        for _, target, delta in pairs:
            delta.merge(target)
    detach(model)
