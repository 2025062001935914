"""Where a stage's rows come from: the recipe's words for it as sources that can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trivium.data.hub import local
from trivium.data.rows import Mix, sha256_of

if TYPE_CHECKING:
    from trivium.recipe import DataSource, Stage


def mixes(data: list[DataSource]) -> list[Mix]:
    """The sources of ``data`` or ``eval_data``; what is on the hub is fetched. Raises DataError."""
    return [Mix(local(s.path), s.weight, tuple(sorted((s.fields or {}).items()))) for s in data]


def trained_on(stage: Stage) -> list[Mix]:
    """What a stage trains on. Raises DataError."""
    return mixes(stage.data)


def held_out_from(stage: Stage) -> list[Mix] | None:
    """The rows that a stage is evaluated on, where they are not a share of its data. Raises DataError."""
    return mixes(stage.eval_data) if isinstance(stage.eval_data, list) else None


def held_out_share(stage: Stage) -> float:
    """The share of its own data that a stage is evaluated on."""
    return stage.eval_data if isinstance(stage.eval_data, float) else 0.0


def hashes(stage: Stage) -> dict[str, Any]:
    """SHA-256 of the files a stage reads, and how they are mixed where they are; raises DataError."""
    found: dict[str, Any] = {}
    for key, data in (("", stage.data), ("eval_", stage.eval_data)):
        if isinstance(data, list):
            found[f"{key}sha256"] = sha256_of([f for m in mixes(data) for f in m.files()])
            mixed = [(s.weight, s.fields) for s in data]
            if any(weight or fields for weight, fields in mixed):
                found[f"{key}mix"] = mixed
    return found


def by_file(stage: Stage) -> dict[str, str]:
    """SHA-256 of each file a stage reads, by path; raises DataError."""
    groups = (trained_on(stage), held_out_from(stage) or [])
    return {str(file): sha256_of([file]) for group in groups for mix in group for file in mix.files()}
