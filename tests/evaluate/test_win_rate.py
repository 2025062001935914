"""Who wins how often: counting, what a judge is asked, and the two judges that need no network."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.errors import DataError, ModelError
from trivium.evaluate.win_rate import Duel, WinRate, by_program, by_reward, win_rate

ASK = ({"role": "user", "content": "What is it?"},)


def duels(*answers: tuple[str, str]) -> list[Duel]:
    return [Duel(ASK, new, old) for new, old in answers]


def test_a_win_rate_counts_ties_half_and_says_what_it_rests_on() -> None:
    found = WinRate.counted([1.0] * 60 + [0.5] * 26 + [0.0] * 34)
    assert (found.wins, found.ties, found.losses, found.of) == (60, 26, 34, 120)
    assert found.share == pytest.approx(73 / 120)
    for bound in (found.low, found.high):  # what makes a bound Wilson's: were it the truth, the share is z errors off
        assert abs(found.share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 120))
    assert found.line() == "won 61% (52%-69%) of 120: 60 won, 26 ties, 34 lost"
    assert WinRate.counted([0.5, 0.0]).line().endswith("of 2: 0 won, 1 tie, 1 lost")
    assert json.loads(json.dumps(found.as_dict()))["verdicts"] == found.verdicts


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60))
def test_the_other_sides_win_rate_is_the_rest(verdicts: list[float]) -> None:
    found, other = WinRate.counted(verdicts), WinRate.counted([1 - v for v in verdicts])
    assert (found.wins, found.ties, found.losses) == (other.losses, other.ties, other.wins)
    assert (found.share, found.low, found.high) == pytest.approx((1 - other.share, 1 - other.high, 1 - other.low))
    assert found.low <= found.share + 1e-12
    assert found.share <= found.high + 1e-12


def test_the_same_answer_is_a_tie_and_nobody_is_asked() -> None:
    asked: list[list[Duel]] = []

    def prefers(given: object) -> list[float]:
        asked.append(list(given))  # type: ignore[call-overload]
        return [1.0, 0.0]

    all_of_them = duels(("same", "same"), ("b", "a"), ("same", "same"), ("c", "d"), ("", ""))
    assert win_rate(all_of_them, prefers).verdicts == [0.5, 1.0, 0.5, 0.0, 0.5]
    assert asked == [[all_of_them[1], all_of_them[3]]]
    assert win_rate(duels(("same", "same")), prefers).verdicts == [0.5]
    assert len(asked) == 1, "a judge was asked about nothing"


def test_nothing_to_compare_is_an_error_of_two_lines() -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        win_rate([], lambda _: [])


@pytest.mark.parametrize("said", [[], [1.0, 1.0], [0.7]])
def test_a_judge_that_does_not_answer_what_was_asked_is_caught(said) -> None:
    with pytest.raises(AssertionError, match="verdict"):
        win_rate(duels(("a", "b")), lambda _: said)


def test_rewards_are_of_whole_conversations_and_asked_for_once() -> None:
    asked = []

    def rewards(conversations) -> list[float]:
        asked.append(conversations)
        return [len(c[-1]["content"]) for c in conversations]

    found = win_rate(duels(("long", "a"), ("b", "long"), ("one", "two")), by_reward(rewards))
    assert found.verdicts == [1.0, 0.0, 0.5]
    (only,) = asked
    assert [c[-1]["content"] for c in only] == ["long", "a", "b", "long", "one", "two"]
    assert only[0] == (*ASK, {"role": "assistant", "content": "long"})


def test_a_program_looks_at_the_prompt_and_the_answer() -> None:
    def check(prompt, answer) -> float:
        return answer.count(prompt[-1]["content"][-1])

    assert win_rate(duels(("??", "?"), ("", "?"), ("?a", "?b")), by_program(check)).verdicts == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    "prefers",
    [by_program(lambda _, answer: float(answer)), by_reward(lambda cs: [float(c[-1]["content"]) for c in cs])],
)
def test_nan_is_no_tie_and_infinity_is_a_number(prefers) -> None:
    assert win_rate(duels(("inf", "1"), ("-inf", "1")), prefers).verdicts == [1.0, 0.0]
    for answers in (("nan", "1"), ("1", "nan")):
        with pytest.raises(ModelError, match="not a number"):
            win_rate(duels(answers), prefers)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, trivium.evaluate.win_rate, trivium.evaluate.endpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
