"""Whether there is a model of some name: known at once, without what it takes seconds to import."""

from __future__ import annotations

import os
from pathlib import Path

from trivium.errors import ModelError, beside
from trivium.files import exists


def there(source: str) -> str:
    """``source``, if there is such a file or folder, or it may be a hub id. Raises ModelError."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111  # Path.expanduser raises where there is no such user
    if not exists(path) and (source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") != 1):
        remedy = f"give a model folder, a .gguf file, or a hub id (owner/name){beside(path)}"
        raise ModelError(f"{source}: no such model folder", remedy)
    return source
