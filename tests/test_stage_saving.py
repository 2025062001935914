"""When a training is saved: as the recipe says, or as often as costs little."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trivium import stage_saving
from trivium.stage_saving import LEAST_SECONDS, SHARE, Saving


@pytest.fixture
def saving(monkeypatch):
    """``saving(since, waited, beside)``: one whose last checkpoint is so many seconds ago and cost so many."""

    def make(since: float, waited: float = 0.0, beside: float = 0.0, writing: bool = False, **stage: object) -> Saving:
        made = Saving.__new__(Saving)
        settings = {"save_every": None, "save_minutes": None} | stage
        made.run = SimpleNamespace(stage=SimpleNamespace(**settings))  # type: ignore[assignment]
        costs = SimpleNamespace(seconds_beside=7.0 + beside)
        made.kept = SimpleNamespace(costs=costs, writing=writing)  # type: ignore[assignment]
        made._waited, made._beside, made._at = waited, 7.0, 100.0
        monkeypatch.setattr(stage_saving.time, "monotonic", lambda: 100.0 + since)
        return made

    return make


def test_every_so_many_steps_or_minutes(saving):
    made = saving(0, save_every=5)
    assert [n for n in range(1, 16) if made.due(n)] == [5, 10, 15]
    assert not saving(59, save_minutes=1.0).due(5)
    assert saving(60, save_minutes=1.0).due(5)


def test_left_out_it_costs_at_most_its_share_of_the_time(saving):
    assert not saving(LEAST_SECONDS - 1).due(1)
    assert saving(LEAST_SECONDS).due(1)
    dear = (3.0 + 1.0) / SHARE  # seconds between two that cost four, whether waited for or beside the training
    assert not saving(dear - 1, waited=3.0, beside=1.0).due(1)
    assert saving(dear + 1, waited=3.0, beside=1.0).due(1)
    assert not saving(dear + 1, waited=3.0, beside=1.0, writing=True).due(1), "the last one is still being written"
