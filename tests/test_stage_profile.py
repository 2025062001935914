"""Where the time goes: every moment is counted once, under what it is for, and measuring changes no bit."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trivium.forest import Example, TokenSequence, lay_out
from trivium.model import attention
from trivium.model.language_model import LanguageModel
from trivium.model.new import new_model
from trivium.objectives import objective
from trivium.peft.targets import decoder_layers
from trivium.profile_shares import (
    ATTENTION,
    DATA,
    ELEMENTWISE,
    KINDS,
    LOGPROB,
    NODE,
    OPTIMIZER,
    PRODUCTS,
    PYTHON,
    STEP,
    Event,
    Product,
    Shares,
    shares_of,
)  # fmt: skip
from trivium.stage_profile import Recorder, chosen, products_alone, profiled, told
from trivium.train.loop import StepLog, Task, train
from trivium.train.optimizer import build_optimizers
from trivium.train.recompute import recomputed
from trivium.train.reference import no_reference

LAYERS, LINEAR = 2, 7
SIZES = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 64, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def language_model(family: str = "llama", native: str = "sdpa") -> LanguageModel:
    hf = new_model(AutoConfig.for_model(family, **SIZES), seed=0).eval()
    return LanguageModel(hf, None, torch.float32, torch.float32, native_attention=native)


def example(number: int, tokens: int = 24) -> Example:
    rng = np.random.default_rng(number)
    return Example((TokenSequence(rng.integers(1, 64, tokens), np.ones(tokens, np.float32)),), f"rows:{number}")


def task(model: LanguageModel, steps: int) -> Task:
    return Task(
        objective=objective({"loss": "next_token"}),
        logprob=model.logprob,
        reference=no_reference,
        batches=lambda n: (lay_out([example(10 * n + i) for i in group]) for group in ((0, 1), (2,))),
        steps=steps,
        rate=lambda n: 1.0,
        optimizers=build_optimizers(model.hf, set(), "adamw", 0.01, 0.0),
        max_grad_norm=1.0,
    )


def recorded(model: LanguageModel, steps: int = 1) -> Shares:
    """The shares of the last of some steps."""
    found: list[Shares] = []
    recorder = Recorder(model, range(steps - 1, steps))
    made = task(model, steps)

    def batches(n):
        recorder.begin(n)
        return made.batches(n)

    def after(log: StepLog) -> None:
        recorder.end(log)
        found.append(recorder.shares)

    train(Task(**{**vars(made), "batches": batches}), after)
    return found[-1]


def by_kind(shares: Shares, *parts: str) -> set[str]:
    """The kinds under which operations of these names were counted."""
    return {kind for kind, name in shares.by_name if any(part in name for part in parts)}


def calls(shares: Shares, kind: str, name: str) -> int:
    return int(shares.by_name.get((kind, name), [0, 0])[1])


# --- a model's own step


def test_it_adds_up_and_every_product_is_counted_once():
    model = language_model()
    with model.laid_out("forest"):
        shares = recorded(model)
    assert sum(shares.by_kind.values()) == pytest.approx(shares.seconds, rel=1e-6)
    assert all(shares.by_kind[kind] > 0 for kind in KINDS if kind != DATA)  # these batches come without a label
    # in full training each linear layer is three products; the first layer's q, k, v, too, as the embedding is trained
    passes = 2
    linear = Counter(p for p in shares.products if 64 not in (p.k, p.n, p.m) or p.m == 32)
    assert linear
    assert sum(shares.products.values()) == passes * (3 * LAYERS * LINEAR + 3), "the head takes three"
    assert all(p.b == 1 and p.dtype == "float" for p in shares.products)


def test_the_backward_pass_is_counted_for_what_it_belongs_to():
    model = language_model()
    with model.laid_out("forest"):
        shares = recorded(model)
    assert by_kind(shares, "_scaled_dot_product", "flash_attention") == {ATTENTION}
    assert by_kind(shares, "scaled_dot_product_flash_attention_for_cpu_backward") == {ATTENTION}
    # the head's products, forward and backward, are the log-probabilities' own
    assert calls(shares, LOGPROB, "aten::mm") + calls(shares, LOGPROB, "aten::addmm_") == 2 * 3
    assert calls(shares, PRODUCTS, "aten::mm") == 2 * 3 * LAYERS * LINEAR
    assert by_kind(shares, "aten::silu", "aten::rsqrt") == {ELEMENTWISE}
    assert by_kind(shares, "_fused_adamw_") == {OPTIMIZER}
    assert by_kind(shares, "_foreach_norm", "linalg_vector_norm") >= {OPTIMIZER}


@pytest.mark.parametrize("native", ["sdpa", "eager"])
def test_a_models_own_attention(native):
    model = language_model(native=native)
    with model.laid_out("rows"):
        shares = recorded(model)
        if native == "eager":
            bmm = {kind: calls(shares, kind, "aten::bmm") for kind in KINDS}
            assert bmm == {**dict.fromkeys(KINDS, 0), ATTENTION: 2 * 2 * 3 * LAYERS}
        assert by_kind(shares, "softmax", "_scaled_dot_product") - {LOGPROB} == {ATTENTION}
    assert sum(shares.products.values()) == 2 * (3 * LAYERS * LINEAR + 3)


def test_recomputed_layers_are_no_attention():
    """They run again inside the backward node of whatever asks first."""
    model = language_model()
    layers = list(decoder_layers(model.hf).values())
    with model.laid_out("forest"), recomputed(layers):
        shares = recorded(model)
    assert by_kind(shares, "aten::mm") == {PRODUCTS, LOGPROB}
    assert calls(shares, PRODUCTS, "aten::mm") > 2 * 3 * LAYERS * LINEAR


# --- the run around it


def trained(file: Path | None, steps: int = 6) -> tuple[LanguageModel, list[StepLog], torch.Tensor]:
    torch.manual_seed(7)
    model = language_model()
    logs: list[StepLog] = []
    made = task(model, steps)
    with model.laid_out("forest"):
        handed = profiled(file, "chat", model, made, logs.append, 0) if file else None
        with handed or contextlib.nullcontext((made, logs.append)) as (used, after):
            train(used, after)
    return model, logs, torch.random.get_rng_state()


def test_a_profile_changes_no_bit_and_leaves_nothing_behind(tmp_path, capsys):
    clip, forest = torch.nn.utils.clip_grad_norm_, attention.forest_attention
    plain, plain_logs, plain_state = trained(None)
    model, logs, state = trained(tmp_path / "profile-chat.json")
    said = capsys.readouterr().err
    for (name, p), (_, q) in zip(plain.hf.named_parameters(), model.hf.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert [(log.loss, log.grad_norm, log.rows) for log in logs] == [(g.loss, g.grad_norm, g.rows) for g in plain_logs]
    assert torch.equal(state, plain_state)
    assert torch.nn.utils.clip_grad_norm_ is clip
    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is forest
    parts: list[nn.Module] = [*model.hf.modules(), model.readout]
    assert {n for p in parts for n in vars(p) if n == "forward"} == {
        n for p in [*plain.hf.modules(), plain.readout] for n in vars(p) if n == "forward"
    }
    found = json.loads((tmp_path / "profile-chat.json").read_text(encoding="utf-8"))
    assert found["steps"] == [3, 5]
    assert found["tokens"] == sum(log.tokens for log in logs[2:5])
    assert set(found["seconds_by_kind"]) == set(KINDS)
    assert sum(found["seconds_by_kind"].values()) == pytest.approx(found["seconds"], rel=1e-6)
    assert found["seconds_by_kind"][DATA] > 0
    assert found["seconds"] <= sum(log.seconds for log in logs[2:5])
    assert all(line in said for line in told(found))
    assert "where the time of steps 3 to 5 went" in said


def test_an_end_in_the_middle_of_a_step_leaves_nothing_behind(tmp_path):
    model = language_model()
    made = task(model, 3)
    broken = Task(**{**vars(made), "rate": lambda n: 1 / 0})
    file = tmp_path / "profile.json"
    with (
        model.laid_out("forest"),
        pytest.raises(ZeroDivisionError),
        profiled(file, "chat", model, broken, lambda log: None, 0) as (used, after),
    ):
        train(used, after)
    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.forest_attention
    assert not torch.autograd._profiler_enabled()
    assert not file.exists()


@pytest.mark.parametrize(
    ("done", "steps", "which"),
    [(0, 100, (3, 5)), (0, 5, (3, 5)), (0, 4, (2, 4)), (0, 3, (1, 3)), (0, 1, (1, 1)), (50, 100, (53, 55)),
     (96, 100, (98, 100)), (99, 100, (100, 100))],
)  # fmt: skip
def test_which_steps_are_recorded(done, steps, which):
    found = chosen(done, steps)
    assert (found.start + 1, found.stop) == which


def test_no_step_left(tmp_path, capsys):
    model = language_model()
    with profiled(tmp_path / "p.json", "chat", model, task(model, 2), lambda log: None, 2) as (used, after):
        train(used, after, 2)
    assert "no step of chat is left to train, so there is nothing to profile" in capsys.readouterr().err


# --- events made by hand


def op(name: str, start: int, end: int, sequence: int = -1, made_in: int = 0, thread: int = 1, **more) -> Event:
    return Event(name, start, end, thread, sequence, made_in, **more)


def test_time_belongs_to_the_innermost_and_is_counted_once():
    events = [
        op(STEP, 0, 1000),
        op("trivium::data", 0, 100),
        op("aten::copy_", 10, 30),
        op("aten::linear", 100, 200),
        op("aten::t", 110, 120),
        op("aten::mm", 120, 190, shapes=[[4, 3], [3, 5]], dtypes=["float", "float"]),
        op("aten::silu", 210, 260),
        op("trivium::attention", 300, 400),
        op("aten::split", 310, 330, sequence=5),
        op("aten::bmm", 340, 390, sequence=6, shapes=[[2, 4, 3], [2, 3, 4]], dtypes=["float", "float"]),
        op("aten::mul", 400, 410, sequence=7),
        op(NODE + "MulBackward0", 500, 520, sequence=7, made_in=1),
        op("aten::mul", 505, 515),
        op(NODE + "BmmBackward0", 520, 600, sequence=6, made_in=1),
        op("aten::bmm", 530, 600, shapes=[[2, 3, 4], [2, 4, 4]], dtypes=["float", "float"]),
        op(NODE + "SplitBackward0", 600, 640, sequence=5, made_in=1),
        op("aten::cat", 600, 640),
        op("trivium::module", 620, 640),  # computed again in there
        op("aten::mm", 630, 640, shapes=[[4, 3], [3, 5]], dtypes=["float", "float"]),
        op("Optimizer.step#AdamW.step", 700, 900),
        op("aten::mm", 710, 720, shapes=[[4, 3], [3, 5]], dtypes=["float", "float"]),
        op("aten::add", 1100, 1200),  # after the step
    ]
    shares = shares_of(events)
    ns = {kind: round(seconds * 1e9) for kind, seconds in shares.by_kind.items()}
    assert ns == {
        DATA: 100, PRODUCTS: 100 + 10, ELEMENTWISE: 50 + 10 + 10, ATTENTION: 20 + 50 + 70 + 20, LOGPROB: 0,
        OPTIMIZER: 200, PYTHON: 1000 - 100 - 110 - 70 - 160 - 200,
    }  # fmt: skip
    assert shares.products == {Product(1, 4, 3, 5, "float", True): 1, Product(1, 4, 3, 5, "float", False): 1}


def test_on_a_gpu_time_is_that_of_kernels_and_the_rest_is_waiting():
    events = [
        op(STEP, 0, 1000),
        op("trivium::data", 0, 100),
        op("trivium::attention", 100, 150),
        op("aten::split", 110, 130, sequence=3, kernels=200),
        op("aten::mm", 150, 160, kernels=300, shapes=[[4, 3], [3, 5]], dtypes=["c10::BFloat16"] * 2),
        op(NODE + "SplitBackward0", 300, 340, sequence=3, made_in=1, thread=2),
        op("aten::cat", 310, 330, thread=2, kernels=100),
    ]
    shares = shares_of(events, on_gpu=True)
    ns = {kind: round(seconds * 1e9) for kind, seconds in shares.by_kind.items() if seconds}
    assert ns == {ATTENTION: 300, PRODUCTS: 300, DATA: 100, PYTHON: 300}
    busy = [*events, op("aten::add", 400, 410, kernels=2000)]
    assert sum(shares_of(busy, on_gpu=True).by_kind.values()) * 1e9 == pytest.approx(1000)


def test_products_alone_draw_on_no_random_state_and_keep_to_their_time():
    state = torch.random.get_rng_state()
    products = Counter({Product(1, 64, 32, 48, "float", True): 3, Product(2, 8, 4, 8, "float", False): 1})
    found = products_alone(products, torch.device("cpu"))
    assert found["flop"] == 3 * 2 * 64 * 32 * 48 + 2 * 2 * 8 * 4 * 8
    assert found["measured"] == 1
    assert found["seconds"] > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert products_alone(products, torch.device("cpu"), most=-1.0)["measured"] == 0
    assert products_alone(Counter(), torch.device("cpu"))["seconds"] == 0
