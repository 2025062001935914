"""Whether a tokenizer's files can be opened without harm, and whether what was opened reads text.

The library that reads them takes memory for every id up to the highest: one wrong number in a file of a few kilobytes,
and the machine has none left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trivium.errors import ModelError
from trivium.files import read_json

FILES = ("tokenizer.json", "vocab.json")
LARGE = re.compile(rb":\s*\d{8,}")  # no vocabulary has as many tokens; to look for it costs little
PROBE = "".join(map(chr, range(32, 127))) + "\n\té😀"


def check_ids(folder: Path) -> None:
    """Raises ModelError where an id of a vocabulary is higher than its file has bytes: no such vocabulary is whole."""
    for path in (folder / name for name in FILES):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if LARGE.search(data) and (high := max(_ids(read_json(path)), default=0)) >= len(data):
            what = f"{path}: it gives a token the id {high}, and has only {len(data):,} bytes"
            raise ModelError(what, "restore the file")


def _ids(value: Any) -> list[int]:
    """Every id in a vocabulary, or in a tokenizer that has one."""
    if not isinstance(value, dict):
        return []
    model, added = value.get("model"), value.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else value
    found = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    found += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [number for number in found if isinstance(number, int)]


def tried(tokenizer: Any) -> Any:
    """The tokenizer, when it has read a text: a setting that is no setting shows itself only then. Raises anything."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    unknown = getattr(getattr(backend, "model", None), "unk_token", None)
    if backend is not None and unknown and backend.token_to_id(unknown) is None:
        raise ValueError(f"its token for what is unknown, {unknown!r}, is not in its vocabulary")
    tokenizer(PROBE)
    return tokenizer
