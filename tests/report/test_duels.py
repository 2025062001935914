"""Answers against the parent's, on a run's page and on one of their own."""

from __future__ import annotations

import json
import re

import pytest

from trivium.errors import ModelError
from trivium.report.gather import run_view
from trivium.report.tables import duels_of
from trivium.report.write import page, write_judged, write_report

EVIL = "<script>alert('x')</script><img src=x onerror=y> & \"quotes\""


def duel(new, old, *more):
    return {"prompt": [*more, {"role": "user", "content": f"ask {EVIL}"}], "new": new, "old": old}


def seen(verdicts=(1.0, 0.5, 0.0, 0.5)):
    duels = [duel("better", "worse"), duel("even", "too"), duel("worse", "better"), duel("same", "same")]
    return {"duels": duels, "line": f"a line {EVIL}", "won": {"verdicts": list(verdicts)} if verdicts else None}


def with_against(folder, value):
    path = folder / "measures.json"
    measures = json.loads(path.read_text(encoding="utf-8"))
    measures["models"]["aligned"]["against"] = value
    path.write_text(json.dumps(measures), encoding="utf-8")
    return folder


def test_each_duel_with_its_verdict_and_what_differs_first():
    assert [d["won"] for d in duels_of(seen())] == ["new", "a tie", "old", "unchanged"]
    assert [d["won"] for d in duels_of(seen(None))] == ["", "", "", "unchanged"]
    first = {**seen(), "duels": seen()["duels"][::-1], "won": {"verdicts": [0.5, 0.0, 0.5, 1.0]}}
    assert [d["new"] for d in duels_of(first)] == ["worse", "even", "better", "same"]


def test_several_messages_are_told_apart():
    value = {"duels": [duel("a", "b", {"role": "system", "content": "Be kind."})], "won": None, "line": ""}
    assert duels_of(value)[0]["prompt"].startswith("system: Be kind.\nuser: ask ")
    value["duels"][0]["prompt"] = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert duels_of(value)[0]["prompt"] == ""


def test_the_runs_page_has_them_as_text(make_run):
    text = page([run_view(with_against(make_run(), seen()))])
    assert "<script" not in text
    assert "<img" not in text
    for piece in ("better", "worse", "even", "a line &lt;script&gt;", "new · won", "parent · won", "new · a tie"):
        assert piece in text, piece
    assert len(re.findall(r"<h4>(parent|new)", text)) == 8


def test_a_page_of_their_own(tmp_path):
    write_judged(seen(), EVIL, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("<article>") == 4
    assert "default-src 'none'" in text
    write_judged({**seen(None), "duels": [duel("", "\u0000\u2028é😀")]}, "t", tmp_path / "x.html")
    assert "(nothing)" in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"line": "x"},
        {"line": "x", "duels": 5},
        {"line": "x", "duels": [{}]},
        {"line": "x", "duels": [], "won": {"verdicts": [1.0]}},
        {"line": "x", "duels": [duel("a", "b")], "won": {"verdicts": [7]}},
        [],
        "x",
    ],
)
def test_damaged_measures_are_no_traceback(make_run, value, tmp_path):
    with pytest.raises(ModelError, match=r"measures\.json"):
        write_report([with_against(make_run(), value)], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
