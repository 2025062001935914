"""Ways to spoil one thing in a sound folder."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

RAN = "it_ran"  # a file of this name in the folder says that its code was run


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes the key away."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**value, **changes}.items() if v is not None}), encoding="utf-8")


def code_in(folder: Path, name: str = "evil.py") -> None:
    """A module that leaves a file when it is run."""
    text = f"open({str(folder / RAN)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


class _Leaves:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return (open, (str(self.folder / RAN), "w"))


def pickle_in(folder: Path, name: str) -> None:
    """A pickle that leaves a file when it is opened."""
    (folder / name).write_bytes(pickle.dumps(_Leaves(folder), protocol=2))


def header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(length))
    return found


def with_header(path: Path, header: Any, length: int | None = None) -> None:
    """Another header on the weights that there are; ``length`` is what it claims to be."""
    data = path.read_bytes()
    (own,) = struct.unpack("<Q", data[:8])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8) if length is None else text
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + own :])


def change_tensor(path: Path, **changes: Any) -> None:
    """Change what the header says of its first tensor."""
    header = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    with_header(path, {**header, name: {**header[name], **changes}})


def rename_tensor(path: Path, to: str) -> None:
    header = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    with_header(path, {(to if key == name else key): value for key, value in header.items()})


def moved_out(path: Path) -> Path:
    """The file moved out of its folder, with a link to it left in its place."""
    out = path.parent.parent / "outside" / path.name
    out.parent.mkdir(exist_ok=True)
    path.rename(out)
    path.symlink_to(out)
    return out


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path, to: str = "/dev/zero") -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def sparse(path: Path, length: int) -> None:
    """A file of this many bytes that takes none of the disk."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(length)


def gguf(path: Path, pairs: list[bytes], tensors: list[bytes] = [], counts: tuple[int, int] | None = None) -> None:  # noqa: B006
    """A GGUF file of these entries; ``counts`` is what it claims, of tensors and of pairs."""
    told = counts or (len(tensors), len(pairs))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *told) + b"".join([*pairs, *tensors]) + bytes(64))


def gguf_text(text: str, length: int | None = None) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


ARCHITECTURE = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
