"""The table of promises: none without a test, none that failed or was not tried shown as kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.reliability import AWAITED, PROMISES, ROOT, Gathered, page, without_test


def report(node: str, promise: int, outcome: str = "passed", when: str = "call", **tried: int) -> Any:
    told = [("promise", promise), *([("tried", tried)] if tried else [])]
    return SimpleNamespace(nodeid=node, user_properties=told, outcome=outcome, when=when, duration=0.5)


def row(number: int, *reports: Any) -> str:
    gathered = Gathered()
    for one in reports:
        gathered.add(one)
    lines = page(gathered, {}).splitlines()
    assert sum(line.startswith(("| 1", "| 2", "| 3", "| 4", "| 5", "| 6", "| 7", "| 8", "| 9")) for line in lines) == 19
    return next(line for line in lines if line.startswith(f"| {number} |"))


def passes(node: str, promise: int, **tried: int) -> list[Any]:
    """As a test that passed is reported; what it counted stands in the later reports, too."""
    return [report(node, promise, when="setup"), report(node, promise, **tried),
            report(node, promise, when="teardown", **tried)]  # fmt: skip


def test_counts_are_added_up_by_promise() -> None:
    reports = passes("tests/a.py::one[1]", 3, kills=50) + passes("tests/a.py::one[2]", 3, kills=1000, rows=2)
    found = row(3, *reports, *passes("tests/b.py::two", 3), *passes("tests/b.py::three", 4, kills=7))
    assert found.endswith("| `tests/a.py` (2)<br>`tests/b.py` (1) | 1,050 kills, 2 rows; 3 tests | 0 | 4 |")


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
def test_a_failure_is_named(when: str) -> None:
    found = row(3, *passes("tests/a.py::fine", 3, kills=5), report("tests/a.py::bad", 3, when="setup"),
                report("tests/a.py::bad", 3, "failed", when))  # fmt: skip
    assert "| 1: **`a.py::bad`** |" in found


def test_a_promise_without_a_test_is_no_kept_promise() -> None:
    assert row(5).endswith("| **no test** | - | - | - |")
    skipped = row(5, report("tests/a.py::x", 5, "skipped", "setup"))
    assert skipped.endswith("| `tests/a.py` (1) | 1 skipped | - | - |")
    assert "1 test, 1 skipped" in row(5, report("a::x", 5, "skipped", "setup"), *passes("a::y", 5))


def test_every_promise_has_a_test_here(request: pytest.FixtureRequest) -> None:
    """In `make test`, too: this looks at what is run beside it, so it says nothing where only some tests are."""
    config = request.config
    if [config.invocation_params.dir / a for a in config.args] != [ROOT / "tests"] or config.option.keyword:
        pytest.skip("not all tests are run")
    without = without_test(request.session.items)
    assert without - AWAITED.keys() == set(), "promises that nothing here tests"
    assert AWAITED.keys() - without == set(), "these have tests now: they are awaited no more"


TEST = """
import pytest

@pytest.mark.promise(1)
@pytest.mark.parametrize("n", range(3))
def test_it(n, tried):
    tried(kills=n)
    tried(kills=1)

@pytest.mark.promise(2)
def test_other(): {}
"""


@pytest.mark.parametrize(("does", "processes"), [("pass", "2"), ("assert False", "0")])
def test_a_run_writes_what_was_tried(
    does: str, processes: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"), prepend=":")
    pytester.makeconftest(f"import sys\nsys.path.append({str(ROOT)!r})\nfrom tests.reliability import *\n")
    pytester.makeini("[pytest]\nmarkers = promise(n): what it is about\naddopts = --strict-markers")
    pytester.makepyfile(TEST.format(does))
    done = pytester.runpytest_subprocess("-n", processes, "--reliability", "page.md")
    assert done.ret == (does != "pass")
    text = (pytester.path / "page.md").read_text(encoding="utf-8")
    assert f"| 1 | {PROMISES[1]} | `test_a_run_writes_what_was_tried.py` (3) | 6 kills; 3 tests | 0 |" in text
    assert ("| 0 |" if does == "pass" else "::test_other`** |") in text.split(PROMISES[2])[1].splitlines()[0]
    assert "- trivium: " in text


def test_nothing_is_written_unasked(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(f"import sys\nsys.path.append({str(ROOT)!r})\nfrom tests.reliability import *\n")
    pytester.makepyfile("def test_it(tried): tried(kills=3)")
    assert pytester.runpytest_inprocess("-p", "no:cacheprovider").ret == 0
    assert sorted(p.suffix for p in pytester.path.iterdir() if p.is_file()) == [".py", ".py"]
