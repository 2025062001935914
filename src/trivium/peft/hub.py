"""How deltas act: the hub under a target holds its deltas by their adapters' names, and its hooks call those in use.

    use.switch({"a": 1.0})                      # one adapter
    use.switch({"a": 1.0, "b": 1.0})            # stacked: b acts on what a has made
    use.switch({"a": 0.5, "b": 0.5}, averaged=True)     # their changes, weighted and added
    with use.by_span(spans): ...                # each tree of a forest under its own adapter, in one pass
    with use.only(None): ...                    # the base

All hubs of a model share one `Use`. Where nothing acts the hooks return at once and leave the target's own output.

Shapes:  T tokens on the line,  D the target's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from trivium.errors import ModelError, RecipeError
from trivium.virtual import Span, Virtual

CHILD = "trivium_delta"  # the name under which the hub hangs in its target
DEFAULT = "default"

Change = Callable[[Any, Tensor], Tensor]  # (a delta, a value) -> the value, changed
Cut = Callable[[Tensor], Tensor]


class Use:
    """Which adapters of a model act."""

    def __init__(self) -> None:
        self.active: dict[str, float] = {}
        self.averaged = False
        self.spans: tuple[Span, ...] = ()
        self.groups: Any = None  # see `together`
        self.carriers: dict[str, list[Any]] = {}  # the deltas with virtual tokens, by adapter, in the model's order

    def switch(self, active: Mapping[str, float], averaged: bool = False) -> None:
        """From now on these act, in this order; ``averaged``: their changes are weighted and added."""
        self.active, self.averaged = dict(active), averaged

    def only(self, adapter: str | None) -> AbstractContextManager[None]:
        """One adapter acts, or none, for the length of the block."""
        return _As(self, {} if adapter is None else {adapter: 1.0}, False, ())

    def as_now(self) -> AbstractContextManager[None]:
        """What acts at the time of this call will act within the block."""
        return _As(self, self.active, self.averaged, self.spans)

    def by_span(self, spans: Sequence[Span]) -> AbstractContextManager[None]:
        """Each span of the line under its own adapter, for the length of the block."""
        return _As(self, {}, False, tuple(spans))

    def together(self, model: nn.Module, on: bool) -> None:
        """From now on (or no longer) targets compute themselves and their deltas in one, where that can be done."""
        from trivium.peft.together import Together

        self.groups = self.groups or Together()
        self.groups.install(model) if on else self.groups.remove()

    def virtual(self, adapter: str | None) -> Virtual | None:
        """The virtual tokens of one adapter; those of its deltas put together."""
        parts: list[Virtual] = [delta.virtual() for delta in self.carriers.get(adapter or "", ())]
        if not parts:
            return None
        layers = tuple(pair for part in parts for pair in part.keys_values)
        return Virtual(parts[0].length, parts[0].embeddings, layers)

    def acting(self) -> Virtual | None:
        """The virtual tokens of what acts; raises ModelError where two adapters have some."""
        found = {name: v for name in self.active if (v := self.virtual(name)) is not None}
        if len(found) > 1 or (found and self.averaged):
            raise ModelError(
                f"virtual tokens cannot be stacked or averaged ({', '.join(found)})", "use one such adapter at a time"
            )
        return next(iter(found.values()), None)

    def through(self, hub: Hub, change: Change, value: Tensor) -> Tensor:
        """``value`` changed by the deltas of ``hub`` that act."""
        acting = [(hub[name], weight) for name, weight in self.active.items() if name in hub]
        if self.averaged:
            changes = [weight * (change(delta, value) - value) for delta, weight in acting]
            return value + torch.stack(changes).sum(0) if changes else value
        for delta, _ in acting:
            value = change(delta, value)
        return value

    def by_tree(self, hub: Hub, change: Callable[[Any, Cut], Tensor], value: Tensor) -> Tensor:
        """``value``, the line's tokens in its second dimension (or third of four), each span changed by its own delta.

        ``change(delta, cut)``: ``cut`` takes the span's part of any such tensor. Raises NotImplementedError for a
        module that is not called with the whole line.
        """
        length = self.spans[-1].stop
        dims = [d for d in ((1, 2) if value.ndim == 4 else (1,)) if value.shape[d] == length]
        if len(dims) != 1 or len(value) != 1:
            raise NotImplementedError("an adapter for each tree wants modules that are called with the whole line")
        pieces = []
        for adapter, start, stop in self.spans:

            def cut(tensor: Tensor, start: int = start, stop: int = stop) -> Tensor:
                return tensor.narrow(dims[0], start, stop - start)

            delta = hub.of(adapter)
            pieces.append(cut(value) if delta is None else change(delta, cut))
        return torch.cat(pieces, dims[0])


class _As(AbstractContextManager[None]):
    """Other adapters act within the block; it may be entered again, as a layer may be computed again."""

    def __init__(self, use: Use, active: dict[str, float], averaged: bool, spans: tuple[Span, ...]) -> None:
        self.use, self.state = use, (active, averaged, spans)
        self.before: list[tuple[dict[str, float], bool, tuple[Span, ...]]] = []

    def __enter__(self) -> None:
        use = self.use
        self.before.append((use.active, use.averaged, use.spans))
        use.active, use.averaged, use.spans = self.state

    def __exit__(self, *_: object) -> None:
        self.use.active, self.use.averaged, self.use.spans = self.before.pop()


class Hub(nn.ModuleDict):
    """The deltas under one target, by their adapters' names."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = use
        self.handles: list[Any] = []
        self.kept: list[dict[str, Any]] = []  # the target's own tensors, while others take their place
        self.done = False  # whether the output of a call under way is changed already

    @classmethod
    def on(cls, target: nn.Module, use: Use) -> Hub:
        """The hub of a target, made where there is none yet."""
        hub: Hub | None = getattr(target, CHILD, None)
        if hub is None:
            hub = cls(use)
            target.add_module(CHILD, hub)
            # Handles copy themselves along with the module that holds them, so a deepcopied model detaches too.
            hub.handles = [
                target.register_forward_pre_hook(_before, with_kwargs=True),
                target.register_forward_hook(_after, with_kwargs=True, always_call=True),
            ]
        return hub

    def of(self, adapter: str | None) -> Any:
        """The delta of an adapter, or None."""
        return self[adapter] if adapter is not None and adapter in self else None

    def drop(self, target: nn.Module, name: str) -> None:
        """Take an adapter's delta away, and with the last one the hub itself."""
        del self[name]
        if not len(self):
            for handle in self.handles:
                handle.remove()
            delattr(target, CHILD)

    @property
    def idle(self) -> bool:
        """Whether none of its deltas acts."""
        if self.use.spans:
            return not any(self.of(span.adapter) is not None for span in self.use.spans)
        return not any(name in self for name in self.use.active)


def check_name(name: str) -> None:
    """Raises RecipeError for what cannot be an adapter's name."""
    if not name.replace("-", "_").isidentifier() or hasattr(Hub, name) or name in ("use", "handles", "kept", "done"):
        raise RecipeError(
            f"{name!r} cannot be an adapter's name",
            "begin with a letter; use letters, digits, - and _; or another word",
        )


# --- the hooks of every target; they find the hub by name, so a deepcopied target calls its own


def _before(target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change the input, and put other tensors in place of the target's own."""
    hub: Hub = getattr(target, CHILD)
    own: dict[str, Any] = {}
    hub.kept.append(own)
    if hub.idle:
        return None
    use = hub.use
    if not use.spans:
        for key in dict.fromkeys(key for name in use.active if name in hub for key in hub.of(name).replaces):
            own[key] = target._parameters[key]

            def changed(delta: Any, tensor: Tensor, key: str = key) -> Tensor:
                return delta.tensors(target, key, tensor) if key in delta.replaces else tensor

            target._parameters[key] = use.through(hub, changed, own[key])  # type: ignore[assignment]
    if not any(hub[name].changes_input for name in hub):
        return None
    x, put = _first(args, kwargs)
    if use.spans:
        return put(use.by_tree(hub, lambda delta, cut: delta.inputs(cut(x)), x))
    return put(use.through(hub, lambda delta, value: delta.inputs(value), x))


def _after(target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Give the target its own tensors back, and change the output; of a tuple, its first element."""
    hub: Hub = getattr(target, CHILD)
    for key, tensor in hub.kept.pop().items() if hub.kept else ():
        target._parameters[key] = tensor
    if hub.done:  # the target has computed its delta along with itself (`together.py`)
        hub.done = False
        return None
    if hub.idle or output is None:  # None: it was called in vain, and the error is on its way
        return None
    x, _ = _first(args, kwargs)
    first = output[0] if isinstance(output, tuple) else output
    if hub.use.spans:
        new = hub.use.by_tree(hub, lambda delta, cut: _on_some(delta, target, cut(x), cut(first)), first)
    else:
        new = hub.use.through(hub, lambda delta, value: delta(target, x, value), first)
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _on_some(delta: Any, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """One adapter's delta on some trees of the line; where it has tensors of its own, the target is called again."""
    if not delta.token_wise:
        raise NotImplementedError(f"{type(delta).__name__} cannot act on some trees of a line")
    if delta.replaces:
        own = {key: delta.tensors(target, key, target._parameters[key]) for key in delta.replaces}
        before = {key: target._parameters[key] for key in own}
        try:
            target._parameters.update(own)
            output = target.forward(x)
        finally:
            target._parameters.update(before)
    changed: Tensor = delta(target, x, output)
    return changed


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The input of a call, given by place or as ``hidden_states``, and the way to give another one."""
    if args:
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[key], lambda x: (args, {**kwargs, key: x})
