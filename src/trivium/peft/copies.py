"""Training tensors of the base itself, and keeping the base: trained float32 copies take their place in the pass.

For methods that choose some of the base's own tensors (BitFit, layer norms, the top layers) and for embeddings and
heads beside a LoRA. The originals stay where they are, so that "off" is the base, bitwise, and a folder holds the
copies alone. Tensors that the base ties (embeddings and head) have one copy.

Cost: four bytes for each trained weight, and in lower precision its rounded form for each pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trivium.errors import RecipeError, listed, nearest
from trivium.peft.delta import Delta
from trivium.peft.targets import matches


class Held(nn.Module):
    """The copies of some tensors; what is tied shares one of these."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            self.register_parameter(key, nn.Parameter(torch.empty(tensor.shape, dtype=torch.float32)))


class Copies(Delta):
    """Trained copies of some of the target's own tensors."""

    def __init__(self, target: nn.Module, keys: Iterable[str], held: Held | None = None) -> None:
        super().__init__()
        self.keys = tuple(keys)
        self.held = held or Held({key: target.get_parameter(key) for key in self.keys})

    @property
    def replaces(self) -> tuple[str, ...]:
        return self.keys

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        with torch.no_grad():
            for key in self.keys:
                self.held.get_parameter(key).copy_(target.get_parameter(key))

    def tensors(self, target: nn.Module, name: str, tensor: Tensor) -> Tensor:
        return self.held.get_parameter(name).to(tensor.dtype)

    def merge(self, target: nn.Module) -> None:
        for key in self.keys:
            target.get_parameter(key).copy_(self.held.get_parameter(key))


def own_tensors(model: nn.Module, names: Iterable[str], of: tuple[str, ...] | None = None) -> dict[str, Delta]:
    """Copies of the tensors that the modules ``names`` themselves hold, all or those called ``of``."""
    made: dict[str, Delta] = {}
    for name in names:
        module = model.get_submodule(name)
        keys = [key for key, _ in module.named_parameters(recurse=False) if of is None or key in of]
        if keys:
            made[name] = Copies(module, keys)
    return made


def copies_of(
    model: nn.Module, patterns: Iterable[str], apart_from: Mapping[str, object]
) -> tuple[dict[str, Delta], set[str]]:
    """Copies for whole modules that ``patterns`` match, such as ``embed_tokens`` and ``lm_head``; and those matched.

    Tied ones are chosen together. Raises RecipeError where a pattern matches nothing, or a module that a LoRA has.
    """
    there = {name: m for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    chosen: list[str] = []
    for pattern in patterns:
        found = [name for name in there if matches(name, pattern)]
        if not found:
            short = sorted({name.rpartition(".")[2] for name in there})
            raise RecipeError(
                f"modules_to_save {pattern!r} matches no module with weights{nearest(pattern, short)}",
                f"modules there are: {listed(short, 24)}",
            )
        chosen += found
    if taken := [name for name in chosen if name in apart_from]:
        raise RecipeError(
            f"modules_to_save: {taken[0]} has a LoRA as well", "leave it out of target_modules, or out of this list"
        )
    return tied_copies(model, chosen), set(chosen)


def tied_copies(model: nn.Module, names: Iterable[str], tie: bool = True) -> dict[str, Delta]:
    """Copies of all own tensors of some modules; with ``tie`` of those tied to them, too, as one copy."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            groups.setdefault(id(weight), []).append(name)
    wanted = set(names)
    if tie:
        wanted |= {other for group in groups.values() if wanted & set(group) for other in group}
    made: dict[str, Delta] = {}
    held: dict[int, Held] = {}
    for name in [n for n, _ in model.named_modules() if n in wanted]:
        module = model.get_submodule(name)
        keys = [key for key, _ in module.named_parameters(recurse=False)]
        key = id(getattr(module, "weight", module))
        if tie and key in held:
            made[name] = Copies(module, [k for k in keys if hasattr(held[key], k)], held[key])
        else:
            made[name] = copy = Copies(module, keys)
            held[key] = copy.held
    return made
