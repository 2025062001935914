"""The one seam through which anything durable is written: whole or absent.

A folder is written beside its final place under a temporary name, every file fsynced, and renamed at the end.
Errors of the disk become `DiskError` with the path and what is needed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trivium.errors import DiskError, ModelError, UserError

PARTIAL = ".partial"


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """One line for a disk that is full, read-only or not ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors reports the system's errors as text, in an exception of its own
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            free = shutil.disk_usage(_existing(path)).free
            raise DiskError(
                f"{path}: the disk is full ({free / 2**20:,.0f} MB free)", "free some space, then run the same command"
            ) from None
        if not isinstance(error, OSError):
            raise
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DiskError(
                f"{path}: cannot be written ({error.strerror})", "choose another folder with --out"
            ) from None
        raise


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents; raises DiskError where that is not allowed."""
    with clear_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all. Where it is not ``durable``, a machine that loses its power may leave it
    damaged, which its reader must notice: for what can be made again."""
    mine = "" if durable else f".{os.getpid()}"  # two processes may make the same
    temporary = path.with_name(path.name + mine + PARTIAL)
    with clear_errors(path):
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in a file; raises ModelError naming file and line where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", "check the path") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: not JSON ({error.msg})", "restore the file") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text", "restore the file") from None
    except (RecursionError, ValueError) as error:
        raise ModelError(f"{path}: not JSON that can be read ({str(error)[:80]})", "restore the file") from None


def start_folder(final: Path) -> Path:
    """An empty folder beside ``final`` to write into; what an earlier, unfinished attempt left there is removed."""
    partial = final.with_name(final.name + PARTIAL)
    with clear_errors(partial):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return partial


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``final`` at the end of the block, and is gone where the block fails."""
    partial = start_folder(final)
    try:
        yield partial
        finish_folder(partial, final)
    except BaseException:  # an interruption, too
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_folder(partial: Path, final: Path) -> None:
    """Make ``partial`` durable and put it in the place of ``final``, which is replaced if it is there."""
    with clear_errors(final):
        for file in sorted(p for p in partial.rglob("*") if p.is_file()):
            file.chmod(0o644 & ~_umask())  # safetensors writes files that only their owner can read
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if final.exists():
            old = final.with_name(final.name + ".old")
            if old.exists():
                shutil.rmtree(old)
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """A hash of plain values, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def folder_bytes(path: Path, ending: str = "") -> int:
    """Bytes of the files in a folder whose names end with ``ending``."""
    return sum(p.stat().st_size for p in path.rglob(f"*{ending}") if p.is_file())
