"""Data sets of the hub, on a local mirror of its layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivium.data.hub import local
from trivium.data.rows import Row, read_rows
from trivium.errors import DataError

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's client as it lies on disk after a download; returns the snapshot's folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "datasets--someone--stories"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("# Stories")
    return snapshot


def parquet(path: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)


def texts(place: str) -> list[str]:
    return [row.value["text"] for row in read_rows(local(place)) if isinstance(row, Row)]


def test_a_repository_and_parts_of_it(mirror: Path) -> None:
    parquet(mirror / "data" / "train-00000-of-00002.parquet", ["a", "b"])
    parquet(mirror / "data" / "train-00001-of-00002.parquet", ["c"])
    assert texts("hf://someone/stories") == ["a", "b", "c"]
    assert texts("hf://datasets/someone/stories") == ["a", "b", "c"]
    assert texts("hf://someone/stories/data/train-00001-of-00002.parquet") == ["c"]
    assert texts("hf://someone/stories/data") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "names", [("data/train-0.parquet", "data/test-0.parquet"), ("train/0.parquet", "test/0.parquet")]
)
def test_rows_to_be_tested_on_are_not_trained_on_unasked(mirror: Path, names: tuple[str, str]) -> None:
    for name in names:
        parquet(mirror / name, [name])
    with pytest.raises(DataError, match=r"splits test, train\n.*name one: hf://someone/stories/.*test") as error:
        local("hf://someone/stories")
    ways = str(error.value).split("name one: ")[1].split(" or ")
    assert sorted(text for way in ways for text in texts(way.strip())) == sorted(names)


def test_what_is_not_there(mirror: Path) -> None:
    with pytest.raises(DataError, match="not a data set"):
        local("hf://stories")
    with pytest.raises(DataError, match="hf://someone/else: the hub did not give it"):
        local("hf://someone/else")
