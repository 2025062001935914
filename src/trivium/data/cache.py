"""Where what was computed of data is kept between runs, and how it is let go.

    folder = cache_folder("prepared") / key
    read_today(folder); let_go(folder.parent)

Delete it whenever you like: everything in it is made again when it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from trivium.terminal import say

KEPT_DAYS = 30  # what nobody has read for so long is let go
MANIFEST = "manifest.json"


def cache_folder(what: str = "prepared") -> Path:
    """Where what was computed of data is kept: in ``$TRIVIUM_CACHE``, else the user's cache folder; a temporary one if
    that cannot be written."""
    named = os.environ.get("TRIVIUM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = (Path(named) if named else Path(home) / "trivium") / what
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    other = Path(tempfile.gettempdir()) / f"trivium-{os.getuid() if hasattr(os, 'getuid') else 'cache'}" / what
    say(f"  note: {folder} cannot be written; prepared data goes to {other} (TRIVIUM_CACHE says where else)")
    other.mkdir(parents=True, exist_ok=True)
    return other


def read_today(folder: Path) -> None:
    """Note that somebody wants it."""
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)


def let_go(folder: Path) -> None:
    """Delete what nobody has read for a month."""
    for old in folder.iterdir():
        with contextlib.suppress(OSError):
            manifest = old / MANIFEST
            read = (manifest if manifest.exists() else old).stat().st_mtime
            if time.time() - read > KEPT_DAYS * 86_400:
                shutil.rmtree(old)
