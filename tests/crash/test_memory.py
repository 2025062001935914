"""Promise 12: out of memory is survived at the same step, with the result of smaller passes; or ends with exit 6."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.crash.process import CELLS, Process, at_step, die, events, result
from tests.crash.several import Several

from trivium.forest import Forest
from trivium.model.language_model import LanguageModel
from trivium.train import loop

pytestmark = pytest.mark.promise(12)

ROOMY, TIGHT = 1024, 40  # tokens a pass; rows have some 10 to 25, a step four of them
QUICK = ("pretrain-full", "sft-lora", "preference-kto")


def running_out(over: int, from_step: int = 1, backward: bool = False):
    """No room for a pass of more than ``over`` tokens that is trained, in this step and those after it."""

    def start() -> None:
        whole, gradients, at = LanguageModel.logprob, loop._gradients, [0]

        def noted(task: loop.Task, number: int):
            at[0] = number + 1
            return gradients(task, number)

        def logprob(model: LanguageModel, forest: Forest) -> torch.Tensor:
            found = whole(model, forest)
            if at[0] < from_step or len(forest.tokens) <= over or not found.requires_grad:
                return found
            if backward:  # half way through the gradients, of which some are there by then
                next(p for p in reversed([*model.hf.parameters()]) if p.requires_grad).register_hook(refuse)
                return found
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        loop._gradients, LanguageModel.logprob = noted, logprob  # type: ignore[method-assign]

    armed = [True]

    def refuse(gradient: torch.Tensor) -> torch.Tensor:
        if armed:
            armed.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradient

    return start


def no_dropout(name: str, **more):
    """Dropout is drawn pass by pass: with it, other passes are another training. The rate is a usual one: where a
    gradient is all rounding, AdamW makes a step of it that is as large as any other. Of `sft-full` that is most, so its
    rate is that of full fine-tuning; what was learnt is compared besides."""
    method = CELLS[name]["method"]
    plain = {**method, "dropout": 0.0} if isinstance(method, dict) else method
    rate = 2e-4 if name == "sft-full" else 1e-3
    return {"method": plain, "dropout": 0.0, "max_steps": 20, "learning_rate": rate,
            "micro_batch_tokens": ROOMY, **more}  # fmt: skip


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def weights(recipe: Path) -> dict[str, torch.Tensor]:
    return tensors_in(recipe.parent / "out" / "x")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in CELLS if n not in QUICK)])
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_is_survived_at_the_same_step_with_the_result_of_smaller_passes(name, backward, cell, tried):
    small, halved = cell(name, **no_dropout(name, micro_batch_tokens=TIGHT)), cell(name, **no_dropout(name))
    assert Process(small).wait().code == 0
    ended = Process(halved, meanwhile=running_out(TIGHT, from_step=6, backward=backward)).wait()
    assert ended.code == 0, ended.said
    assert "memory ran out at step " in ended.said
    found = events(halved)["halvings"]
    assert 1 <= len(found) <= 5
    assert {one["step"] for one in found} == {6}
    assert [one["tokens"] for one in found] == [ROOMY >> n for n in range(1, len(found) + 1)]
    assert result(halved)["rows"][-1]["step"] == 20
    expected, parent = weights(small), tensors_in(Path(yaml.safe_load(small.read_text(encoding="utf-8"))["model"]))
    for key, tensor in weights(halved).items():
        apart = tensor - expected[key]
        assert float(apart.norm()) <= 1e-6 * max(1.0, float(tensor.norm())), key
        assert float(apart.abs().max()) <= 5e-6, key
        if CELLS[name]["method"] == "full":
            assert float(apart.norm()) <= 3e-5 * float((tensor - parent[key]).norm()), key
    tried(halvings=len(found), cells=1)
    times = f"{len(found)} time{'s' * (len(found) > 1)}"
    assert f"memory ran out {times} (step 6): {found[-1]['tokens']} tokens a pass" in ended.said


def test_amid_the_gradients(cell, tried):
    test_it_is_survived_at_the_same_step_with_the_result_of_smaller_passes("sft-lora", True, cell, tried)


def test_it_is_survived_with_dropout_and_the_same_again(cell):
    """What an attempt has drawn is put back: the same run out of memory twice gives the same bits."""
    first, second = cell("sft-lora", max_steps=20), cell("sft-lora", max_steps=20)
    for recipe in (first, second):
        assert Process(recipe, meanwhile=running_out(TIGHT, from_step=6)).wait().code == 0
    assert result(first) == result(second)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("sft-lora", marks=pytest.mark.slow), "preference-kto"])
def test_of_two_processes_one_halves_its_own_share(name, rank, cell):
    """The other one, which has room, waits for it and keeps to the plan of both."""
    changed = no_dropout(name, batch_size=8, micro_batch_tokens=64)
    one, two = cell(name, **changed), cell(name, **changed)
    assert Process(one).wait().code == 0
    start = running_out(TIGHT, from_step=6)
    ended = Several(two, meanwhile=lambda number: start() if number == rank else None).wait()
    assert [end.code for end in ended] == [0, 0], ended
    own, elsewhere = events(two)["halvings"], events(two)["halvings_elsewhere"]
    assert bool(own) == (rank == 0) != bool(elsewhere)
    if rank:
        assert {(one["process"], one["step"]) for one in elsewhere} == {(1, 6)}
        assert f"memory ran out in process 1 (step 6): {elsewhere[0]['tokens']} tokens a pass" in ended[0].said
    expected = weights(one)
    for key, tensor in weights(two).items():
        assert float((tensor - expected[key]).abs().max()) <= 1e-5, key


def test_a_run_that_goes_on_keeps_what_was_halved(cell):
    whole, killed = (cell("sft-lora", micro_batch_tokens=ROOMY, save_every=2) for _ in range(2))
    short = running_out(TIGHT, from_step=6)
    assert Process(whole, meanwhile=short).wait().code == 0

    def both() -> None:
        short()
        at_step(15, die)

    assert Process(killed, meanwhile=both).wait().killed
    ended = Process(killed, meanwhile=short).wait()
    assert ended.code == 0, ended.said
    assert "goes on after step 14" in ended.said
    assert "memory ran out at" not in ended.said, "what is too much is not tried again"
    assert events(killed)["halvings"] == events(whole)["halvings"] != []
    assert result(killed) == result(whole)


def test_it_ends_with_exit_6_where_nothing_helps_and_what_was_trained_is_kept(cell):
    recipe = cell("sft-lora", micro_batch_tokens=ROOMY)
    ended = Process(recipe, meanwhile=running_out(0, from_step=9)).wait()
    assert ended.code == 6
    assert "Traceback" not in ended.said
    error = ended.said[ended.said.index("error: ") :].strip()
    assert len(error.splitlines()) <= 3
    assert "stages.x, step 9: memory ran out" in error
    again = Process(recipe).wait()
    assert again.code == 0, again.said
    assert "goes on after step 8 of 60" in again.said


def test_out_of_memory_anywhere_else_is_no_traceback(cell):
    def start() -> None:
        import trivium.stage_runner

        def refuse(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        trivium.stage_runner.proven_by_first = refuse

    ended = Process(cell("sft-lora"), meanwhile=start).wait()
    assert ended.code == 6
    assert "Traceback" not in ended.said
    assert "error: memory ran out (tried to allocate 2.00 GiB)" in ended.said
