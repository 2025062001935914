"""Several adapters on one base, in a notebook: what `trivium.Model` has for them.

model.load_adapter("runs/anna/chat", name="anna").load_adapter("runs/ben/chat", name="ben")
model.use("anna")                              # or ["anna", "ben"], {"anna": 0.7, "ben": 0.3}, None
model.score(answers, adapters=["anna", "ben"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.api_rows import Prompt, messages_of
from trivium.data.examples import at_its_end
from trivium.data.templates import chat_template
from trivium.errors import ModelError, RecipeError, listed, nearest
from trivium.evaluate.score import scored
from trivium.folder import Opened, base_of, identity_of
from trivium.forest import Example
from trivium.model.quantized import quantized
from trivium.peft import base as deltas
from trivium.peft.checks import LARGEST, is_number
from trivium.peft.folder import load as load_adapter
from trivium.peft.folder import quantization_of
from trivium.peft.kinds import FullSettings
from trivium.start import Link

if TYPE_CHECKING:
    from typing_extensions import Self


class WithAdapters:
    """A model in hand, as far as its adapters go."""

    _opened: Opened
    _base: str | None
    _link: Link
    _bare: Link
    _made: dict[str, Any] | None

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that hang in the model; the one that `attach` and `train` mean is "default"."""
        return deltas.adapter_names(self._opened.model.hf)

    def load_adapter(self, folder: str | Path, name: str) -> Self:
        """Hang the adapter of a folder beside those that are there; it acts from now on. Raises ModelError."""
        if not isinstance(name, str) or name in ("default", *self.adapters):
            what = "is what attach and train mean" if name == "default" else "is there already, or is no name"
            raise RecipeError(f"an adapter {name!r} {what}", "give it another name, or detach that one")
        path = Path(folder).expanduser()
        if (how := quantization_of(path)) != quantized(self._opened.model.hf):
            raise ModelError(
                f"{path}: it was trained on a base held in {how or 'its own dtype'}, and this one is held in "
                f"{quantized(self._opened.model.hf) or 'its own dtype'}",
                "combine adapters that were trained on the same base",
            )
        base = base_of(path)
        here = self._base is not None and Path(self._base).exists() and Path(base).exists()
        if here and identity_of(base) != identity_of(str(self._base)):
            raise ModelError(
                f"{path} is an adapter on another base ({base}) than this model ({self._base})",
                "load it with that base: trivium.load of its folder",
            )
        load_adapter(self._opened.model.hf, path, name)
        return self

    def use(self, adapters: str | Sequence[str] | Mapping[str, float] | None) -> Self:
        """Which adapters act: one, several stacked in this order, a mapping of weights for their average, or none."""
        wanted: Mapping[str, float]
        if isinstance(adapters, Mapping):
            wanted = adapters
        elif adapters is None or isinstance(adapters, (str, list, tuple)):
            wanted = dict.fromkeys([adapters] if isinstance(adapters, str) else adapters or (), 1.0)
        else:
            raise RecipeError(f"use({adapters!r}) names no adapters", "give a name, a list of names, or {name: weight}")
        for name, weight in wanted.items():
            if name not in self.adapters:
                hint = nearest(str(name), self.adapters)
                raise RecipeError(f"there is no adapter {name!r}{hint}", f"adapters: {listed(self.adapters) or 'none'}")
            if not is_number(weight) or not abs(weight) <= LARGEST:
                raise RecipeError(f"the weight of {name} is {weight!r}", "give a finite number")
        if (carried := self._opened.model.adapters) is not None:
            carried.switch(wanted, averaged=isinstance(adapters, Mapping))
        return self

    def detach(self, name: str = "default") -> Self:
        """Take an adapter away. Raises RecipeError where there is none, or where its base has been rounded for it."""
        if name not in self.adapters:
            raise RecipeError(f"there is no adapter {name!r}", f"adapters: {listed(self.adapters) or 'none'}")
        how = quantized(self._opened.model.hf)
        if how is not None and len(self.adapters) == 1:
            raise RecipeError(f"the base is held in {how}, and cannot be put back", "load the base anew")
        deltas.detach(self._opened.model.hf, name)
        if name == "default":
            self._opened.settings, self._made, self._link = FullSettings(), None, self._bare
        return self

    def score(self, answers: Sequence[tuple[Prompt, str]], adapters: Sequence[str | None] | None = None) -> list[float]:
        """Log-probability of each answer to its prompt, its stop token included; of a reward model, its reward.

        ``adapters`` names one for each, or None for the base: all are scored in the same passes, each under its own.
        """
        template = chat_template(self._opened.model.tokenizer)
        named = list(adapters) if adapters is not None else []
        if adapters is not None and len(named) != len(answers):
            raise RecipeError(f"{len(answers)} answers and {len(named)} adapters", "name one for each, or None")
        for name in named:
            if name is not None and name not in self.adapters:
                raise RecipeError(f"there is no adapter {name!r}", f"adapters: {listed(self.adapters) or 'none'}")
        rows = [template.encode([*messages_of(p), {"role": "assistant", "content": a}], "last") for p, a in answers]
        if self._opened.model.gives_rewards:
            rows = [[at_its_end(sequence) for sequence in row[-1:]] for row in rows]
        return scored(self._opened.model, [Example(tuple(row)) for row in rows], named)
