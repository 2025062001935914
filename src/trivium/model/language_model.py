"""A language model as trivium uses it: a `transformers` causal model, its tokenizer, and the way to its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trivium.errors import ModelError
from trivium.forest import Forest
from trivium.model import attention
from trivium.model.fast import Paths
from trivium.model.layout import hidden_states
from trivium.model.quantized import count
from trivium.model.readout import Readout, RewardReadout, readout_of
from trivium.virtual import Adapters, Virtual, adapters_of

# On CUDA lines are filled to a multiple of this, so that few shapes are compiled.
FILL_CUDA = 1024


def context_of(config: Any) -> int | None:
    """The longest sequence that a model of this config is built for, in tokens; None where it does not say."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((int(n) for name in names if (n := getattr(config, name, None))), None)


@dataclass(eq=False)
class LanguageModel:
    """``hf`` is the `transformers` model, unchanged; ``layout`` is how batches are laid out (see `layout.py`).

    ``dtype`` is computation and frozen weights; ``saved_dtype`` is the dtype of the folder it came from, in which
    what follows from it is saved.
    """

    hf: Any
    tokenizer: Any
    dtype: torch.dtype
    saved_dtype: torch.dtype
    layout: str = "forest"
    native_attention: str = "sdpa"
    notes: list[str] = field(default_factory=list)
    _readout: Readout | RewardReadout | None = None
    _paths: Paths | None = None

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def config(self) -> Any:
        return self.hf.config.get_text_config()

    @property
    def context(self) -> int:
        """The longest sequence the model was built for, in tokens; virtual ones take their part of it."""
        virtual = self.virtual
        return (context_of(self.config) or 2**20) - (virtual.length if virtual else 0)

    @property
    def readout(self) -> Readout | RewardReadout:
        if self._readout is None:
            self._readout = readout_of(self.hf)
        return self._readout

    @property
    def gives_rewards(self) -> bool:
        """Whether it is a reward model: what it says of an entry is no log-probability then."""
        return isinstance(self.readout, RewardReadout)

    def logprob(self, forest: Forest) -> Tensor:
        """Log-probability of every entry of the forest, ``[K]``, float32; of a reward model, its reward."""
        if not len(forest.source):
            return torch.zeros(0, device=self.device)
        with self.computing():
            fill = FILL_CUDA if self.device.type == "cuda" else None
            hidden = hidden_states(self.hf.base_model, forest, self.layout, fill, self.adapters)
            return self._read(hidden, forest)

    def _read(self, hidden: Tensor, forest: Forest) -> Tensor:
        """``hidden [K, D]`` -> log-probabilities ``[K]``, each under the adapter of its tree."""
        if not forest.adapters or self.adapters is None:
            return self.readout(hidden, forest.target)
        start, found = 0, torch.zeros(len(hidden), device=hidden.device)
        for name, tokens in forest.adapters:
            own = torch.nonzero((forest.source >= start) & (forest.source < start + tokens))[:, 0]
            start += tokens
            if len(own):
                with self.adapters.only(name):
                    found = found.index_put((own,), self.readout(hidden[own], forest.target[own]))
        return found

    @property
    def adapters(self) -> Adapters | None:
        """What hangs in the model, if anything."""
        return adapters_of(self.hf)

    @property
    def virtual(self) -> Virtual | None:
        """The virtual tokens that are before every sequence now."""
        return self.adapters.acting() if self.adapters is not None else None

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Computation in ``dtype``, whatever dtype the trained weights have."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextlib.contextmanager
    def laid_out(self, layout: str) -> Iterator[None]:
        """Use one layout, and the attention that belongs to it, within the block; restore both afterwards."""
        before, attention_before = self.layout, self.hf.config._attn_implementation
        self.layout = layout
        try:
            self._set_attention(attention.NAME if layout == "forest" else self.native_attention)
            yield
        finally:
            self.layout = before
            self._set_attention(attention_before)

    def _set_attention(self, name: str) -> None:
        """The attention of this name; the forest's comes with the faster ways to all else."""
        if self.hf.config._attn_implementation != name:
            attention.register()
            self.hf.set_attn_implementation(name)
        if self._paths is None or self._paths.model is not self.hf:
            self._paths = Paths(self.hf)
        self._paths.install() if name == attention.NAME else self._paths.remove()
        if self.adapters is not None:
            self.adapters.together(self.hf, name == attention.NAME)

    def check_tokens(self, ids: Any, where: str = "") -> None:
        """Raises ModelError for a token that the tokenizer has, and the model no embedding for.

        ``where`` begins the message: the row that has it.
        """
        there, highest = len(self.hf.get_input_embeddings().weight), int(max(ids, default=0))
        if highest >= there:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ModelError(
                f"{where}the tokenizer has the token {token!r} as number {highest}, the model embeddings of {there}",
                "use the tokenizer that the model came with, or a model that was resized for this one",
            )

    def parameters(self) -> int:
        """Parameters in all, tied ones counted once."""
        return count(self.hf)

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.hf.parameters() if p.requires_grad)
