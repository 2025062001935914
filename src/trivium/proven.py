"""The proof before training, remembered: by everything that it depends on, so that what has changed is proved anew.

    proof = proven(model, rows, [parent, method, seed])      # the same for the same code, weights, rows and machine

A proof costs a few passes over some of the longest rows, which is most of what a run needs before its first step.
Where a run is made again, or goes on, nothing of it can come out otherwise: the same operations on the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

import trivium
from trivium.data.cache import cache_folder, let_go, read_today
from trivium.files import MANIFEST, damage, read_json, sha256_json, whole_folder, write_json
from trivium.forest import Example
from trivium.model.language_model import LanguageModel
from trivium.model.proof import Proof, prove
from trivium.model.quantized import quantized
from trivium.under_way import versions

FILE = "proof.json"


def proven(model: LanguageModel, rows: list[Example], weights: Sequence[Any] | None) -> tuple[Proof, bool]:
    """The proof on these rows, and whether it was made before; ``weights`` say which those of the model are, None: it
    cannot be said. Raises ModelError as `prove` does."""
    if weights is None:
        return prove(model, rows), False
    key = sha256_json([list(weights), _rows(rows), _machine(model), versions(), _code()])
    folder = cache_folder("proofs") / key[:32]
    about = {"of": key}
    if (folder / MANIFEST).exists() and damage(folder, about) is None:
        read_today(folder)
        told = read_json(folder / FILE)
        return proof_of(told), True
    proof = prove(model, rows)
    if not folder.exists():
        with whole_folder(folder, about) as partial:
            write_json(partial / FILE, asdict(proof))
    let_go(folder.parent)
    return proof, False


def proof_of(told: Mapping[str, Any]) -> Proof:
    """A proof that was written down."""
    return Proof(**{**told, "refused": tuple(told["refused"])})


def _rows(rows: list[Example]) -> str:
    told = hashlib.sha256()
    for example in rows:
        for sequence in example.sequences:
            told.update(sequence.tokens.astype("<i8").tobytes() + sequence.weights.astype("<f4").tobytes())
        told.update(b"row")
    return told.hexdigest()


def _machine(model: LanguageModel) -> list[str]:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    how = [str(model.dtype), model.native_attention, str(quantized(model.hf))]
    return [device, torch.backends.cpu.get_cpu_capability(), *how]


@cache
def _code() -> str:
    """A hash of trivium's own source: a version number says too little while it is worked on."""
    told = hashlib.sha256()
    root = Path(trivium.__file__).parent
    for file in sorted(root.rglob("*.py")):
        told.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return told.hexdigest()
