"""The page: one file, nothing outside it, nothing that runs, everything a run has to tell."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trivium.errors import ModelError
from trivium.files import seal
from trivium.report.gather import run_view
from trivium.report.write import page, write_report

VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_one_file_that_needs_nothing_and_runs_nothing(make_run):
    path = write_report([make_run()], make_run("other") / "report.html")
    text = path.read_text(encoding="utf-8")
    reader = read(text)
    assert len(text.encode()) < 3_000_000
    tags = {tag for tag, _ in reader.tags}
    assert tags.isdisjoint({"script", "img", "iframe", "object", "embed", "form", "video", "audio"})
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("href", "src", "srcset", "xlink:href", "action", "data"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_it_shows_what_the_run_has(make_run):
    reader = read(page([run_view(make_run())]))
    said = " ".join(" ".join(reader.text).split())
    assert "<script>alert('x')</script> & \"quotes\"" in said, "what a model says is shown as it is, as text"
    for piece in ("try", "12,345 (18.2%)", "2.500→1.250", "50%→75%", "2.750→1.500", "80% (74%–85%)", "2.13.0", "lora",
                  "base says", "aligned says", "(the prompt does not fit this model)", "random weights", "second",
                  "met against steps", "160 of 200", "learning_rate"):  # fmt: skip
        assert piece in said, piece
    charts = [a for t, a in reader.tags if t == "svg"]
    labels = [str(a["aria-label"]) for a in charts]
    assert labels == [
        "Lineage of try", "Judged answers of base", "Judged answers of chat", "Judged answers of aligned",
        "met against steps, pretrain", "met against steps, sft", "met against steps, preference",
        "Loss of base", "Accuracy of base", "Loss of chat", "Accuracy of chat", "Loss of aligned",
        "Accuracy of aligned",
    ]  # fmt: skip
    boxes = [a for t, a in reader.tags if t == "rect" and "box" in str(a.get("class"))]
    assert len(boxes) == 4
    assert len([1 for t, _ in reader.tags if t == "details"]) == 3


def test_both_themes_paper_and_phone_are_styled(make_run):
    text = page([run_view(make_run())])
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 520px", 'name="viewport"'):
        assert rule in text
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)[:2]
    names = set(re.findall(r"--[\w]+", light))
    assert names == set(re.findall(r"--[\w]+", dark)), "a colour without its dark twin"
    assert {f"--c{n}" for n in range(8)} <= names


def test_without_measures_or_judge(make_run):
    run = make_run(judged=False)
    (run / "measures.json").unlink()
    reader = read(page([run_view(run)]))
    said = " ".join(reader.text)
    assert "The same prompts" not in said
    assert "judged" not in said
    assert "bits/byte" not in said


def test_several_runs_on_one_page(make_run):
    runs = [run_view(make_run("one")), run_view(make_run("two"))]
    reader = read(page(runs))
    said = " ".join(" ".join(reader.text).split())
    assert "one against two" in said
    for piece in ("one: base", "two: base", "one: aligned", "two: training", "two: held-out"):
        assert piece in said, piece
    labels = [str(a["aria-label"]) for t, a in reader.tags if t == "svg"]
    assert labels.count("Loss of chat") == 1, "stages of one name share a chart"
    assert labels.count("Lineage of try") == 2
    answers = [a for t, a in reader.tags if t == "div" and str(a.get("class")).startswith("answer ")]
    assert len(answers) == 2 * 2 * 3, "two prompts, two runs, three models"


def test_a_long_curve_stays_small(make_run):
    text = page([run_view(make_run(steps=20_000))])
    assert len(text) < 200_000


# --- what is no run


def test_no_run_and_damaged_runs(make_run, tmp_path: Path):
    def fails(folder: Path, *says: str) -> None:
        with pytest.raises(ModelError) as error:
            write_report([folder], tmp_path / "x.html")
        assert all(piece in str(error.value) for piece in says), error.value
        assert not (tmp_path / "x.html").exists()

    fails(tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no summary.json")
    for n, value in enumerate([[], {}, {"name": "x"}, {"name": "x", "seed": 0, "stages": [{"name": "../x"}]},
                               {"name": "x", "seed": 0, "stages": "abc"}]):  # fmt: skip
        run = make_run(f"bad{n}")
        (run / "summary.json").write_text(json.dumps(value), encoding="utf-8")
        fails(run, "summary.json")
    run = make_run("cut")
    (run / "summary.json").write_text("{", encoding="utf-8")
    fails(run, "summary.json:1", "not JSON")
    run = make_run("halfway")
    (run / "chat" / "trivium.json").unlink()
    fails(run, "not a finished stage")
    run = make_run("odd")
    (run / "measures.json").write_text('{"models": []}', encoding="utf-8")
    fails(run, "run the recipe again")


def test_the_same_run_twice(make_run, tmp_path: Path):
    run = make_run()
    with pytest.raises(ModelError, match="twice"):
        write_report([run, run / "." / ".." / "run"], tmp_path / "x.html")


def test_a_damaged_record_is_named(make_run, tmp_path: Path):
    run = make_run()
    seal(run / "chat", {})
    log = run / "chat" / "metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace("0", "1"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"chat/metrics.jsonl is damaged"):
        write_report([run], tmp_path / "x.html")


def test_what_cannot_be_shown_is_refused(make_run, tmp_path: Path):
    run = make_run()
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["stages"][1]["metrics"] = "x"
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(ModelError, match=r"summary.json or .*measures.json: damaged"):
        write_report([run], tmp_path / "x.html")
