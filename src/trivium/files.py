"""The one seam through which anything durable is written: whole or absent.

A folder is written beside its final place under a temporary name, every file fsynced, a manifest of sizes and hashes
written last, and renamed at the end. Errors of the disk become `DiskError` with the path and what is needed.

Every change of the disk is one call of `operation(name, path, act)`. A test puts a function of its own there, and so
counts, fails or loses the k-th of them, or lets the process die at it (`tests/crash`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.errors import DiskError, ModelError, UserError
from trivium.terminal import size

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"  # being written
OLD = ".old"  # about to be replaced
GONE = ".gone"  # about to be deleted
MANIFEST = "manifest.json"
NOT_OURS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EBUSY, errno.EISDIR, errno.ENOENT,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
MOST_JSON = 64 * 2**20  # bytes of a settings file; the largest index of a model's parts has some megabytes
BLOCK = 4096  # bytes that a folder takes
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _operation(name: str, path: Path, act: Callable[[], Any]) -> Any:
    return act()


operation = _operation


def _do(name: str, path: Path, act: Callable[[], Any]) -> None:
    operation(name, path, act)


@contextlib.contextmanager
def clear_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """One line for a disk that is full, read-only or not ours. ``needed``: bytes that were to be written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors reports the system's errors as text, in an exception of its own
        code = error.errno if isinstance(error, OSError) else None
        if code in NO_ROOM or "No space left" in str(error) or "quota exceeded" in str(error):
            raise no_room(path, needed) from None
        if not isinstance(error, OSError):
            raise
        if code in NOT_OURS:
            raise DiskError(
                f"{path}: cannot be written ({error.strerror})", "choose another folder with --out"
            ) from None
        if code in (errno.EIO, errno.ENODEV, errno.ESTALE):
            raise DiskError(
                f"{path}: the disk failed ({error.strerror})", "mend it, then run the same command"
            ) from None
        raise


def no_room(path: Path, needed: int | None) -> DiskError:
    """What is said where ``needed`` bytes do not go to the disk of ``path``."""
    free = shutil.disk_usage(_existing(path)).free
    wanted = f"{size(needed)} needed, " if needed else ""
    what = f"{path}: the disk is full ({wanted}{size(free)} free)"
    return DiskError(what, "free some space, then run the same command")


def check_room(path: Path, needed: int, what: str, remedy: str) -> None:
    """Raises DiskError where the disk of ``path`` has no room for ``needed`` more bytes."""
    free = shutil.disk_usage(_existing(path)).free
    if free < needed:
        sizes = f"{size(needed)} needed, {size(free)} free"
        raise DiskError(f"{path}: not enough room for {what} ({sizes})", remedy)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name that no file can have is that of none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents; raises DiskError where that is not allowed."""
    with clear_errors(path, BLOCK):
        new = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in new:
            _do("fsync", made.parent, lambda made=made: _fsync(made.parent))  # type: ignore[misc]
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all. Where it is not ``durable``, a machine that loses its power may leave it
    damaged, which its reader must notice: for what can be made again."""
    mine = "" if durable else f".{os.getpid()}"  # two processes may make the same
    temporary = path.with_name(path.name + mine + PARTIAL)
    with clear_errors(path, len(data)):
        try:
            _do("write", temporary, lambda: temporary.write_bytes(data))
            if durable:
                _do("fsync", temporary, lambda: _fsync(temporary))
            _do("rename", path, lambda: temporary.replace(path))
            if durable:
                _do("fsync", path.parent, lambda: _fsync(path.parent))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, plainly: into a folder that is whole or absent."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    needed = sum(t.numel() * t.element_size() for t in ready.values())
    with clear_errors(path, needed):
        _do("write", path, lambda: save_file(ready, path))


def read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a folder that was found whole, by file; of a file that its manifest does not name, none."""
    from safetensors.torch import load_file

    listed = read_json(folder / MANIFEST)["files"]
    return {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors")) if file.name in listed}


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, and make it durable."""

    def add() -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    with clear_errors(path, len(line)):
        _do("write", path, add)
        _do("fsync", path, lambda: _fsync(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines, but for lines that cannot be read; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict)]


def write_by(path: Path, act: Callable[[], Any], needed: int | None = None) -> None:
    """Let ``act``, of another library, write ``needed`` bytes into ``path``, in a folder that is whole or absent, as
    one operation."""
    with clear_errors(path, needed):
        _do("write", path, act)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in a file; raises ModelError naming file and line where it is not JSON, or where the file is none: a
    pipe or a device would be read for ever, and a bomb until the memory is full."""
    try:
        if not stat.S_ISREG((told := path.stat()).st_mode):
            raise ModelError(f"{path}: no regular file", "restore the file")
        if told.st_size > MOST_JSON:
            raise ModelError(f"{path}: {size(told.st_size)}, where {size(MOST_JSON)} is the most", "restore the file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", "check the path") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: not JSON ({error.msg})", "restore the file") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text", "restore the file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})", "check the file and its rights") from None
    except (RecursionError, ValueError) as error:
        raise ModelError(f"{path}: not JSON that can be read ({str(error)[:80]})", "restore the file") from None


def start_folder(final: Path) -> None:
    """An empty folder beside ``final`` to write into; what an earlier, unfinished attempt left there is removed."""
    partial = final.with_name(final.name + PARTIAL)
    recover(final)
    with clear_errors(partial, BLOCK):
        _do("mkdir", partial, lambda: partial.mkdir(parents=True))


def recover(final: Path) -> None:
    """Put back what was to be replaced, where the process died before the new one was in its place; sweep the rest."""
    partial, old = (final.with_name(final.name + ending) for ending in (PARTIAL, OLD))
    with clear_errors(final, BLOCK):
        if old.exists() and not final.exists():
            _do("rename", final, lambda: old.rename(final))
        for left in (partial, old):
            if left.exists():
                _do("remove", left, lambda left=left: _remove(left))  # type: ignore[misc]


@contextlib.contextmanager
def whole_folder(final: Path, about: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder to write into that becomes ``final`` at the end of the block, and is gone where the block fails.

    ``about`` is kept in its manifest.
    """
    partial = final.with_name(final.name + PARTIAL)
    try:
        start_folder(final)
        yield partial
        finish_folder(partial, final, about or {})
    except BaseException:  # an interruption, too
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_folder(partial: Path, final: Path, about: Mapping[str, Any]) -> None:
    """Make ``partial`` durable and put it in the place of ``final``, which is replaced if it is there."""
    with clear_errors(final, folder_bytes(partial)):
        for file in _files(partial):
            file.chmod(0o644 & ~_umask())  # safetensors writes files that only their owner can read
            _do("fsync", file, lambda file=file: _fsync(file))  # type: ignore[misc]
        seal(partial, about)
        old = final.with_name(final.name + OLD)
        if final.exists():
            _do("rename", old, lambda: final.rename(old))
        _do("rename", final, lambda: partial.rename(final))
        _do("fsync", final.parent, lambda: _fsync(final.parent))
        if old.exists():
            _do("remove", old, lambda: _remove(old))


def remove_folder(path: Path) -> None:
    """Delete a folder so that no half of it keeps its name; nothing where it is not there."""
    gone = path.with_name(path.name + GONE)
    try:
        with clear_errors(path, BLOCK):
            if gone.exists():
                _do("remove", gone, lambda: _remove(gone))
            if path.exists():
                _do("rename", gone, lambda: path.rename(gone))
                _do("remove", gone, lambda: _remove(gone))
    except BaseException:  # a signal, most often: what is begun is finished
        with contextlib.suppress(OSError):
            _remove(gone)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sweep(folder: Path) -> None:
    """Put in order what a process that died left among the folders in ``folder``."""
    for left in sorted(folder.iterdir()) if folder.is_dir() else []:
        if left.name.endswith((PARTIAL, OLD)):
            recover(left.with_name(left.name.removesuffix(PARTIAL).removesuffix(OLD)))
        elif left.name.endswith(GONE):
            with clear_errors(left, BLOCK):
                _do("remove", left, lambda left=left: _remove(left))  # type: ignore[misc]


# --- manifests: a folder that tells whether it still is what was written


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: size and SHA-256 of every file, ``about``, and the manifest's own hash."""
    listed = {f.relative_to(folder).as_posix(): [f.stat().st_size, sha256_file(f)] for f in _files(folder)}
    body = {"about": about, "files": {name: entry for name, entry in listed.items() if name != MANIFEST}}
    write_text(folder / MANIFEST, _sealed(body))


def _sealed(body: Mapping[str, Any]) -> str:
    return json.dumps({"sha256": sha256_json(body), **body}, indent=1, ensure_ascii=False, default=str) + "\n"


def damage(
    folder: Path, about: Mapping[str, Any] | None = None, quick: bool = False, only: Collection[str] = ()
) -> str | None:
    """Which file of a sealed folder is not as it was written, and how; None where all are.

    ``about``: what its manifest must say of it. ``quick`` looks at sizes alone, ``only`` names the files that are
    looked at. A file that the manifest does not name is no damage; nothing outside the folder is looked at.
    """
    path = folder / MANIFEST
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= MOST_JSON):
            return f"{path} is damaged"
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        whole = _is_manifest(body) and text == _sealed({"about": body["about"], "files": body["files"]})
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"{path} is damaged"
    if not whole:
        return f"{path} is damaged"
    for key, value in (about or {}).items():
        if body["about"].get(key) != value:
            return f"{path} belongs to another folder ({key} {body['about'].get(key)}, not {value})"
    there = {f.relative_to(folder).as_posix(): f for f in _files(folder) if not f.is_symlink()}
    for name, (length, digest) in body["files"].items():
        if only and name not in only:
            continue
        if (file := there.get(name)) is None:
            return f"{folder / name} is missing"
        if file.stat().st_size != length:
            return f"{file} is damaged ({file.stat().st_size:,} bytes, not {length:,})"
        if not quick and sha256_file(file) != digest:
            return f"{file} is damaged (its SHA-256 is not the one in the manifest)"
    return None


def _is_manifest(body: Mapping[str, Any]) -> bool:
    """Whether what is sealed has the types of a manifest, as anybody can seal anything."""
    pairs = [entry for entry in body["files"].values() if isinstance(entry, list) and len(entry) == 2]
    typed = all(isinstance(length, int) and isinstance(digest, str) for length, digest in pairs)
    return typed and len(pairs) == len(body["files"]) and isinstance(body["about"], dict)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


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
