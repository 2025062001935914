"""Passes that are halved where memory runs out: which errors say so, what is done, and where it ends."""

from __future__ import annotations

import weakref

import pytest
import torch

from trivium.errors import OutOfMemory
from trivium.train.passes import MOST, Passes, ran_out, reason_of, surviving

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.2 GiB is free."
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 400000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 17.99 GB, other allocations: 64.00 KB)")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CUDA, "tried to allocate 2.00 GiB"),
        (CPU, "tried to allocate 400000000000000 bytes"),
        (MPS, "MPS backend out of memory (MPS allocated: 17.99 GB, other allocations: 64.00 KB)"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_says_that_memory_ran_out(error, reason):
    assert ran_out(error)
    assert reason_of(error) == reason


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")])
def test_what_does_not(error):
    assert not ran_out(error)
    with pytest.raises(type(error)):
        surviving(lambda: (_ for _ in ()).throw(error), lambda reason: None)


def test_what_the_real_allocator_raises_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert ran_out(caught.value)


def test_it_is_done_again_with_half_as_much_and_stays_so():
    passes = Passes("chat", 1000, shortest=20)
    tried: list[int] = []

    def attempt() -> int:
        tried.append(passes.tokens)
        if passes.tokens > 300:
            raise CUDA
        return passes.tokens

    assert surviving(attempt, lambda reason: passes.no_room(7, reason)) == 250
    assert tried == [1000, 500, 250]
    assert passes.halvings == [{"step": 7, "tokens": 500}, {"step": 7, "tokens": 250}]
    again = Passes("chat", 1000, shortest=20)
    again.put_back(passes.halvings)
    assert again == passes


def test_nothing_of_the_attempt_is_held_when_it_is_made_again():
    held: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> None:
        if not held:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def no_room(_: str) -> None:
        assert held[0]() is None

    surviving(attempt, no_room)


@pytest.mark.parametrize(
    ("tokens", "shortest", "halved", "said"),
    [
        (2**20, 1, MOST, f"after {MOST} halvings"),
        (100, 60, 0, "with every row alone in its pass"),
        (100, 26, 1, "alone"),
    ],
)
def test_it_ends_where_it_cannot_help(tokens, shortest, halved, said):
    passes = Passes("chat", tokens, shortest)

    def attempt() -> None:
        raise CUDA

    with pytest.raises(OutOfMemory, match=said) as caught:
        surviving(attempt, lambda reason: passes.no_room(3, reason))
    assert len(passes.halvings) == halved
    assert caught.value.exit_code == 6
    assert "stages.chat, step 3" in str(caught.value)
    assert "tried to allocate 2.00 GiB" in str(caught.value)
