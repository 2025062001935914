"""What every test starts from: one thread, no network, and the real data where it is there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

pytest_plugins = ["pytester", "tests.reliability"]

# Read when torch, tokenizers or transformers are first imported, here and in every process that a test starts.
# One thread: tiny products gain nothing from a second, and lose much while it waits for a busy core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Prepared data of one run of the tests; what an earlier one prepared could hide what this one breaks.
_cache = tempfile.TemporaryDirectory(prefix="trivium-tests-")
os.environ["TRIVIUM_CACHE"] = _cache.name


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights beside the repository; a test that needs it is skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not there: {folder}")
    return folder
