"""What the headers of weight files declare, with every length checked against the file before it is believed.

    safetensors: 8 bytes little-endian length, a JSON header of {name: {dtype, shape, data_offsets}}, the data
    GGUF:        magic, version, counts of tensors and of key-value pairs, the pairs, the tensors' names and shapes

Nothing but the headers is read. Specifications: huggingface.co/docs/safetensors, ggml/docs/gguf.md.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from trivium.errors import ModelError

MOST_HEADER = 100 * 2**20  # as in safetensors itself; a larger one is damage
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
MOST_GGUF = 2**20  # tensors, or keys, of a GGUF file; the largest models have some thousands
WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of GGUF's plain values, in bytes
STRING, ARRAY = 8, 9
PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # as torch.save writes them, bare


def header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors a safetensors file declares: ``{name: {dtype, shape, data_offsets}}``. Raises ModelError."""
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            (size_of,) = struct.unpack("<Q", start := file.read(8))
            if size_of > min(length - 8, MOST_HEADER):
                pickled = start.startswith(PICKLES)
                raise ValueError(
                    "it is a pickle, which can run code" if pickled else "its header is longer than the file"
                )
            found = json.loads(file.read(size_of), object_pairs_hook=_once)
        _check_tensors(found, length - 8 - size_of)
        return found
    except (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else error
        remedy = "restore the file, or train the stage again"
        raise ModelError(f"{path}: not a safetensors file ({str(told)[:160]})", remedy) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _check_tensors(found: dict[str, Any], length: int) -> None:
    """Every tensor has the bytes of its shape, and together they are the file's ``length`` bytes of data, once each."""
    if not isinstance(found.pop("__metadata__", {}), dict):
        raise ValueError("its metadata is no mapping")
    for name, tensor in found.items():
        numbers = (*tensor["shape"], *tensor["data_offsets"])
        if len(numbers) > 16 or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
            raise ValueError(f"its header does not describe tensors: {name[:60]!r}")
    end = max((tensor["data_offsets"][1] for tensor in found.values()), default=0)
    if end != length:
        raise ValueError(f"its header speaks of {end:,} bytes of weights, it has {length:,}")
    at = 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
        bits = BITS.get(tensor["dtype"])
        if bits is None:
            raise ValueError(f"{name[:60]!r} has the unknown dtype {str(tensor['dtype'])[:20]!r}")
        if begin != at:
            raise ValueError(f"{name[:60]!r} overlaps the tensor before it, or leaves a gap")
        if math.prod(shape) * bits != 8 * (end - begin):
            raise ValueError(f"{name[:60]!r} has {end - begin:,} bytes, which is not its shape {str(shape)[:40]}")
        at = end


def check_gguf(path: Path) -> None:
    """Raises ModelError where a GGUF file's header speaks of more than the file holds."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk_gguf(data)
    except (OSError, ValueError, struct.error) as error:
        what = f"{path}: not a GGUF file that can be read ({str(error)[:120]})"
        raise ModelError(what, "download it again") from None


def _walk_gguf(data: mmap.mmap) -> None:
    version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    if max(tensors, pairs) > MOST_GGUF:
        raise ValueError(f"{max(tensors, pairs):,} entries")
    at, keys = 24, set()
    for _ in range(pairs):
        begin, at = at, _string(data, at)
        keys.add(data[begin + 8 : at][:64])
        (kind,) = struct.unpack_from("<I", data, at)
        at = _value(data, at + 4, kind)
    if b"general.architecture" not in keys:
        raise ValueError("it does not say its architecture")
    for _ in range(tensors):
        at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        if dimensions > 8:
            raise ValueError(f"a tensor of {dimensions:,} dimensions")
        shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
        if math.prod(shape) > 16 * len(data):  # the densest quantisations take more than half a bit
            raise ValueError(f"a tensor of shape {list(shape)}, in a file of {len(data):,} bytes")
        at += 4 + 8 * dimensions + 12


def _string(data: mmap.mmap, at: int) -> int:
    """Where what follows a string begins."""
    (length,) = struct.unpack_from("<Q", data, at)
    if length > len(data) - at - 8:
        raise ValueError("a text that is longer than the file")
    return at + 8 + int(length)


def _value(data: mmap.mmap, at: int, kind: int) -> int:
    if kind == STRING:
        return _string(data, at)
    if kind in WIDTH:
        return at + WIDTH[kind]
    if kind != ARRAY:
        raise ValueError(f"a value of the unknown kind {kind}")
    of, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if of not in WIDTH and of != STRING:
        raise ValueError(f"an array of the kind {of}")
    if count * WIDTH.get(of, 8) > len(data) - at:
        raise ValueError("an array that is longer than the file")
    if of in WIDTH:
        return at + int(count) * WIDTH[of]
    for _ in range(count):
        at = _string(data, at)
    return at
