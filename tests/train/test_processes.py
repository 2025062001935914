"""Several processes by themselves: what each takes of a step, what is summed, and who is taken for dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed import HashStore

from trivium import interrupt
from trivium.errors import DataError, Interrupted, ModelError, NonFiniteError, RecipeError
from trivium.objectives.base import Result, Sums
from trivium.train import heartbeat, several
from trivium.train.heartbeat import BUSY, SILENT, Seen, Watch
from trivium.train.processes import ALONE, asked_for, current, dealt
from trivium.train.several import Several


@given(st.lists(st.integers(0, 5000)), st.integers(1, 9))
def test_everything_is_dealt_out_once_and_evenly(sizes, count):
    hands = dealt(sizes, count)
    assert len(hands) == count
    assert sorted(n for hand in hands for n in hand) == list(range(len(sizes)))
    assert all(hand == sorted(hand) for hand in hands)
    held = [sum(sizes[n] for n in hand) for hand in hands]
    assert max(held) <= sum(sizes) / count + max(sizes, default=0)
    assert dealt(sizes, count) == hands, "every process deals alike"


def test_one_process_asks_nobody():
    module = nn.Linear(2, 2)
    assert ALONE.first
    assert ALONE.share([1, 2]) == [1, 2]
    assert ALONE.led(lambda: (1, 2)) == (1, 2), "as it is, without a detour"
    assert ALONE.differing(module) == []
    assert ALONE.last_words(NonFiniteError("a", "b")) == (5, True)
    ALONE.gradients(list(module.parameters()))
    assert module.weight.grad is None


def test_one_process_loads_no_more_than_before():
    code = "import sys, trivium.cli.main; print([n for n in ('torch', 'trivium.train.heartbeat') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(
    ("environment", "several"),
    [({}, False), ({"WORLD_SIZE": "1", "RANK": "0"}, False), ({"WORLD_SIZE": "2"}, False),
     ({"WORLD_SIZE": "2", "RANK": "1"}, True)],
)  # fmt: skip
def test_who_is_one_of_several(environment, several):
    assert asked_for(environment) is several


def test_a_program_that_was_started_several_times_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match="one of 2 processes"):
        current()


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "2"), ("RANK", "-1"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "x"), ("MASTER_PORT", "")]
)
def test_numbers_that_torchrun_does_not_set(name, value, monkeypatch):
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500", name: value}
    for key, each in told.items():
        monkeypatch.setenv(key, each)
    with pytest.raises(RecipeError, match=f"{name}="):
        Several().connect()


class Pair(Several):
    """One of two whose wire is a function: ``other(what this one sends)`` is what the other one sends."""

    def __init__(self, other, rank: int = 0) -> None:
        super().__init__()
        self.rank, self.count, self.other = rank, 2, other

    def _sum(self, flat):
        flat += self.other(flat)

    def gathered(self, value):
        mine = json.loads(json.dumps(value))
        return [mine, self.other(mine)] if self.first else [self.other(mine), mine]


@pytest.mark.parametrize("bucket", [1, 5, 2**24])
def test_gradients_are_summed_and_none_stays_none(bucket, monkeypatch):
    monkeypatch.setattr(several, "BUCKET", bucket)
    shapes = [(2, 3), (4,), (1,), (2, 2)]
    mine, theirs = ([nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2))
    for there, parameters, value in (((0, 1), mine, 1.0), ((1, 2), theirs, 10.0)):
        for number in there:
            parameters[number].grad = torch.full(shapes[number], value)
    sent: list[torch.Tensor] = []
    Pair(lambda flat: (sent.append(flat.clone()), torch.zeros_like(flat))[1]).gradients(theirs)
    waiting = iter(sent)
    Pair(lambda flat: next(waiting)).gradients(mine)
    assert [None if p.grad is None else p.grad.flatten()[0].item() for p in mine] == [1.0, 11.0, 10.0, None]
    assert all(p.grad is None or p.grad.shape == p.shape for p in mine)


def test_statistics_are_summed_each_by_its_own_weight():
    sums = Sums()
    sums.add(Result(torch.tensor(2.0), {"loss": torch.tensor(2.0), "chosen": torch.tensor(6.0)}, {"chosen": 2.0}), 4.0)
    other = {
        "plan": 0,
        "asked": False,
        "reports": [{"step": 3}],
        "sums": {"loss": [4.0, 8.0], "only there": [3.0, 1.0]},
    }
    found = Pair(lambda mine: other)
    assert found.sums(sums).means() == {"loss": 0.5, "chosen": 3.0, "only there": 3.0}
    assert not found.asked
    assert found.reported == [{"process": 1, "step": 3}]
    found.other = lambda mine: {**other, "asked": True}
    found.sums(Sums())
    assert found.asked, "a request to stop is everybody's"
    found.other = lambda mine: {**other, "plan": 5}
    with pytest.raises(AssertionError, match="same step"):
        found.sums(sums)


def test_a_model_is_the_same_to_the_last_bit():
    model = nn.Linear(40, 30)
    prints = several._fingerprints(several._tensors(model))
    assert Pair(lambda mine: prints).differing(model) == []
    with torch.no_grad():
        model.weight[3, 4] = torch.nextafter(model.weight[3, 4], torch.tensor(9.0))
    assert Pair(lambda mine: prints).differing(model) == ["weight"]
    with pytest.raises(ModelError, match="another model"):
        Pair(lambda mine: prints).differing(nn.Linear(30, 30))
    with pytest.raises(DataError, match="process 1 reads other data"):
        Pair(lambda mine: "b").agree("data", lambda: "a")


def test_each_process_drops_out_on_its_own_and_always_the_same():
    def drawn(rank: int, step: int) -> list[float]:
        Pair(None, rank).begin(7, step)
        return torch.rand(4).tolist()

    with torch.random.fork_rng():
        found = [drawn(r, s) for r in (0, 1) for s in (0, 1)]
        assert len({str(f) for f in found}) == 4
        assert drawn(1, 1) == found[3]


def test_only_cards_and_cores_are_shared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    pair = Pair(None)
    assert pair.device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="mps"):
        pair.device("mps")
    pair.local = 1
    with pytest.raises(RecipeError, match="no card of its own"):
        pair.device("cuda")


# --- the watch


class Store:
    """Keys and values in this process, which may break."""

    def __init__(self) -> None:
        self.held = HashStore()

    def clone(self):
        return self.held


@pytest.fixture
def watch(monkeypatch):
    """A watch of process 0 of 2, whose threads do not run, and whose verdict ends nobody; the other is this process's
    parent."""
    interrupt.heard.clear()
    monkeypatch.setattr(Watch, "_end_soon", lambda self: None)
    said: list[str] = []
    monkeypatch.setattr(heartbeat, "_say", said.append)
    found = Watch(Store(), 0, 2, hosted=False)
    here = {"host": "h", "machine": heartbeat._machine()}
    for pid in (os.getpid(), os.getppid()):
        found.seen.append(Seen(pid=pid, started=heartbeat._life(pid)[1], **here))
    found.said, found.met = said, True
    return found


def looks(watch: Watch, times: int = 4) -> None:
    for _ in range(times):
        watch.look()


def test_who_is_well_is_left_alone(watch):
    watch.seen[1].quiet = SILENT + 1  # the system says that it runs: a library may hold up its threads
    looks(watch)
    assert watch.verdict is None
    watch.seen[1].end = 0
    watch.seen[1].pid = 2**30
    looks(watch)
    assert watch.verdict is None


def test_who_is_gone_is_named_after_a_moment(watch):
    watch.seen[1].pid = 2**30
    looks(watch, 2)
    assert watch.verdict is None, "its last word may be under way"
    looks(watch, 1)
    assert watch.verdict == 75
    assert watch.said == [f"error: process 1 of 2 (pid {2**30} on h) has died\n  {heartbeat.AGAIN}\n"]
    with pytest.raises(SystemExit) as end:
        watch.check()
    assert end.value.code == 75


def test_another_process_of_the_same_number_is_not_taken_for_it(watch):
    watch.seen[1].started = "1"
    looks(watch, 3)
    assert watch.verdict == 75


def test_whoever_runs_elsewhere_is_known_by_its_beats(watch):
    watch.seen[1].machine, watch.seen[1].pid = "another", 2**30
    watch.seen[1].quiet = SILENT - 1
    looks(watch)
    assert watch.verdict is None
    watch.seen[1].quiet = SILENT + 1
    looks(watch, 1)
    assert "has been silent for 21 s\n" in watch.said[0], "and is not killed by a number that means another here"


def test_whoever_runs_and_says_nothing_for_minutes_is_stuck(watch, monkeypatch):
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    watch.seen[1].quiet = BUSY + 1
    looks(watch, 1)
    assert watch.verdict == 75
    assert killed == [os.getppid()]


def test_a_launcher_that_is_gone(watch):
    watch.store_broken = True
    looks(watch, 1)
    assert watch.said == [f"error: the launcher (torchrun) of process 0 has died\n  {heartbeat.AGAIN}\n"]


def test_an_end_that_was_told_is_followed_in_silence(watch):
    watch.seen[1].end = 3
    watch.seen[1].pid = 2**30
    looks(watch)
    assert (watch.verdict, watch.said) == (3, [])


def test_whoever_ends_itself_does_not_mind_the_others(watch):
    watch.ending = True
    watch.seen[1].pid = 2**30
    looks(watch)
    assert watch.verdict is None


def test_one_tells(watch):
    assert watch.first_to_tell()
    assert not watch.first_to_tell()
    other = Watch(Store(), 1, 2, hosted=False)
    other.seen, other.stores = watch.seen, watch.stores
    assert not other.first_to_tell()


def test_what_all_have_met_is_told_by_the_first(watch):
    pair = Pair(None, rank=1)
    pair.watch = watch
    watch.rank = 1
    watch.seen.reverse()
    watch.seen[0].end = 5
    assert pair.last_words(NonFiniteError("nan", "look")) == (5, False)
    watch.seen[0].end = 0
    assert pair.last_words(Interrupted("a", "b")) == (0, False)
    watch.seen[0].end = None
    assert pair.last_words(DataError("only here", "look")) == (2, True)
