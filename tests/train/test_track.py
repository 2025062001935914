"""Trackers: TensorBoard's own files read back by its own reader; the others' calls; a missing package said before."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from trivium.errors import RecipeError
from trivium.train import track
from trivium.train.track import check_tracker, open_tracker

ROWS = [
    {"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.5},
    {"step": 1, "loss": 1.5, "learning_rate": 0.1, "tokens": 20, "note": "no number"},
    {"step": 2, "loss": 1.25, "learning_rate": 0.2, "tokens": 30},
]
EXPECTED = [
    (0, {"eval/loss": 2.0, "eval/accuracy": 0.5}),
    (1, {"train/loss": 1.5, "train/learning_rate": 0.1, "train/tokens": 20}),
    (2, {"train/loss": 1.25, "train/learning_rate": 0.2, "train/tokens": 30}),
]


def test_none_is_none(tmp_path):
    check_tracker("none")
    assert open_tracker("none", "run", "chat", tmp_path, {}) is None
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt in range(2):  # what an attempt before left there is gone
        tracker = open_tracker("tensorboard", "run", "chat", tmp_path, {"r": 16})
        assert tracker is not None
        for row in ROWS[: 2 + attempt]:
            tracker.row(row)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "chat"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert set(found) == {name for _, values in EXPECTED for name in values}
    assert found["train/loss"] == [(1, 1.5), (2, 1.25)]
    assert found["eval/accuracy"] == [(0, 0.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_handed_every_row(name, tmp_path, monkeypatch):
    """Against the documented calls: init(project, name, config), run.log(values, step=), run.finish()."""
    calls: list = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    module = ModuleType(name)
    module.init = lambda **options: calls.append(options) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    tracker = open_tracker(name, "run", "chat", tmp_path, {"r": 16})
    assert tracker is not None
    for row in ROWS:
        tracker.row(row)
    tracker.close()
    options, *logged, last = calls
    assert (options["project"], options["name"], options["config"]) == ("run", "chat", {"r": 16})
    assert logged == EXPECTED
    assert last == "finished"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_with_its_remedy(name, monkeypatch):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(RecipeError, match=rf"(?s)track: {name} is not installed.*pip install .trivium\[{name}\]"):
        check_tracker(name)


def test_every_tracker_can_be_asked_for():
    from trivium.recipe import Recipe

    allowed = json.dumps(Recipe.model_json_schema()["properties"]["track"]["enum"])
    assert json.loads(allowed) == ["none", *track.TRACKERS]
