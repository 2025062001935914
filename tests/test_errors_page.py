"""``docs/errors.md`` is what the source says, leaves no error out, and reads as one piece."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "make_errors.py"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_errors", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_errors"] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_source_says(made):
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run python docs/make_errors.py"


def test_the_check_fails_where_it_is_not(tmp_path, made, monkeypatch, capsys):
    assert subprocess.run([sys.executable, str(SCRIPT), "--check"], check=False).returncode == 0
    monkeypatch.setattr(made, "PAGE", tmp_path / "errors.md")
    assert made.main(["--check"]) == 1
    assert "make_errors.py" in capsys.readouterr().out
    assert made.main([]) == 0
    assert made.main(["--check"]) == 0


def test_no_error_is_left_out(made):
    """Counted in another way: by the names in the text of the source."""
    names = [*made.kinds()]
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(names)})\((?!UserError\)|Exception\)|ModelError\):)")
    counted = sum(len(pattern.findall(_code(path))) for path in made.SOURCE.rglob("*.py"))
    calls = [(module.name, call.lineno, call.col_offset) for module, call, _ in made.made() if call.func.id in names]
    assert len(calls) == counted > 300
    assert {(row.module, row.line) for row in made.rows()} == {(m.name, call.lineno) for m, call, _ in made.made()}


def _code(path: Path) -> str:
    """Source without comments, docstrings and the heads of classes."""
    text = re.sub(r'"""[\s\S]*?"""', "", path.read_text(encoding="utf-8"))
    return re.sub(r"(?m)^\s*#.*$|^class .*$", "", text)


def test_only_a_handful_cannot_be_read_without_running(made):
    passed = [row for row in made.rows() if row.passes_on]
    assert len(passed) <= 18, "\n".join(map(str, passed))


def test_the_texts_read_alike(made):
    """One line without a full stop; what to do begins small, as in "lower the learning rate"."""
    capitals = ("FlexAttention", "A is", "PEFT", "COMMAND")
    for row in made.rows():
        for text in (row.what, row.remedy):
            assert text.strip(), row
            assert "\n" not in text, row
            assert not text.endswith(".") or text.endswith("..."), row
        assert not row.remedy[0].isupper() or row.remedy.startswith(capitals), row
        assert not re.search(
            r"\b(please|invalid|illegal|sorry|failed to)\b", f"{row.what} {row.remedy}", re.IGNORECASE
        ), row
