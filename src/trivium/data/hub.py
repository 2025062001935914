"""Data sets on the hub: ``hf://owner/name/path`` is a file or folder of a data set repository."""

from __future__ import annotations

import re
from pathlib import Path

from trivium.errors import DataError, said

PREFIX = "hf://"
_SPLIT = re.compile(r"(^|/)(train|validation|valid|dev|test|eval)[-_./][^/]*(?:/.*)?$")


def local(place: str) -> Path:
    """The local path of ``place``; what is on the hub is fetched once into its cache.

    Raises DataError where it cannot be had. A path below the repository may be a file, a folder or a glob.
    """
    if not place.startswith(PREFIX):
        return Path(place)
    parts = place.removeprefix(PREFIX).removeprefix("datasets/").split("/", 2)
    if len(parts) < 2 or not all(parts[:2]):
        raise DataError(f"{place}: not a data set", "write hf://owner/name or hf://owner/name/path")
    repository, path = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
    from huggingface_hub import snapshot_download

    wanted = [path, f"{path.rstrip('/')}/**"] if path else None
    try:
        root = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors alike
        reason = said(error, 120)
        raise DataError(
            f"{place}: the hub did not give it ({reason})", "check the name and the network, or give a local path"
        ) from None
    return root / path if path else _one_split(root, place)


def _one_split(root: Path, place: str) -> Path:
    """A whole repository, unless it has several splits: rows to be tested on would be trained on without a word."""
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    found = {}
    for name in names:
        if match := _SPLIT.search(name):
            folder = name[match.end(2)] == "/"
            found[match[2]] = f"{name[: match.end(2)]}{'' if folder else '*'}"
    if len(found) > 1:
        ways = " or ".join(f"{place.rstrip('/')}/{glob}" for glob in found.values())
        raise DataError(f"{place}: it has the splits {', '.join(found)}", f"name one: {ways}")
    return root
