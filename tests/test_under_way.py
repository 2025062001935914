"""A training under way: what lies in its folder is read before it is verified, and may say anything."""

from __future__ import annotations

import json

import pytest

from trivium.under_way import under_way

ABOUT = {"training": "0123456789ab", "parent": "p", "settings": {"epochs": 1.0}, "data": {"rows.jsonl": "1"}}


@pytest.mark.parametrize(
    "state",
    [
        {"about": []}, {"about": "x"}, {"about": {**ABOUT, "data": "x"}}, {"about": {**ABOUT, "settings": [1]}},
        {"about": ABOUT, "accepted": {"a": 1}}, {"about": ABOUT, "date": 3}, {"about": {**ABOUT, "data": None}},
    ],
)  # fmt: skip
def test_a_state_of_other_types_is_no_beginning(state, tmp_path):
    for name in ("0123456789ab", "another"):
        folder = tmp_path / "chat.training" / name / "step-00000002"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": 2, "steps": 8, **state}), encoding="utf-8")
    found = under_way(tmp_path, "chat", {**ABOUT, "data": {"rows.jsonl": "2"}})
    assert (found.date, found.accepted) == (None, [])
