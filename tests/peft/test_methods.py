"""The list of checks that every method passes on every family of models (promise 17)."""

from __future__ import annotations

import copy
import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch

from trivium.errors import ModelError
from trivium.model.quantized import quantize
from trivium.peft import METHODS, FullSettings, folder, settings_for
from trivium.peft.base import (
    CHILD,
    attach,
    continues,
    deltas,
    detach,
    dropping,
    load_state,
    make_full,
    merge,
    off,
    state,
    swapped,
)
from trivium.peft.delta import Delta, Plan
from trivium.peft.settings import Method, settings_of
from trivium.peft.targets import find_targets

SETTINGS = {
    name: settings_of(written)
    for name, written in {
        "lora": {"name": "lora", "r": 4},
        "lora-dropout": {"name": "lora", "r": 4, "dropout": 0.5},
        "rslora": {"name": "rslora", "r": 4, "alpha": 3},
        "dora": {"name": "dora", "r": 4, "dropout": 0.5},
        "pissa": {"name": "pissa", "r": 4},
        "olora": {"name": "olora", "r": 4, "rslora": True},
        "vera": {"name": "vera", "r": 8, "dropout": 0.5},
        "houlsby": {"name": "bottleneck", "r": 8},
        "pfeiffer": {"name": "pfeiffer", "r": 8, "non_linearity": "relu", "dropout": 0.5},
        "houlsby-norms": {"name": "houlsby", "r": 8, "non_linearity": "silu", "layer_norms": True},
        "parallel": {"name": "scaled_parallel", "reduction_factor": 8, "non_linearity": "tanh"},
        "dropped": {"name": "houlsby", "r": 8, "skip_layers": 1},
        "compacter": {"name": "compacter", "r": 8},
        "ia3": {"name": "ia3"},
        "prompt": {"name": "prompt", "num_virtual_tokens": 5},
        "prefix": {"name": "prefix", "num_virtual_tokens": 5},
        "bitfit": {"name": "bitfit"},
        "layer_norms": {"name": "layer_norms"},
        "top_layers": {"name": "top_layers", "layers": 1},
    }.items()
}
MERGED = ["lora", "lora-dropout", "rslora", "dora", "pissa", "olora", "vera", "ia3", "layer_norms", "top_layers"]
REFUSED = {
    "houlsby-norms": "non-linear", "parallel": "non-linear", "compacter": "non-linear", "prompt": "virtual tokens",
    "prefix": "virtual tokens",
}  # fmt: skip
ELSEWHERE = ["prompt", "prefix"]  # do not start as the base


@pytest.fixture(params=["llama", "qwen3", "gemma3", "gpt2"])
def base(request, tiny):
    return tiny(request.param)


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture
def model(base, settings):
    attach(base, settings, seed=0)
    return base


def dropout_of(settings) -> float:
    return getattr(settings, "dropout", 0.0)


def plain(settings):
    return replace(settings, dropout=0.0) if dropout_of(settings) else settings


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.promise(17)
def test_start_is_the_base_bitwise(base, settings, logits):
    before = logits(base)
    attached = attach(base, settings, seed=0)
    dropping(base, True)
    assert attached.targets
    elsewhere = settings in (SETTINGS[name] for name in ELSEWHERE)
    assert torch.equal(logits(base), before) != elsewhere
    assert all(delta.starts_as_base != elsewhere for delta in deltas(base).values())


@pytest.mark.promise(17)
def test_off_is_the_base_bitwise_after_training(base, settings, logits, train):
    before, names = logits(base), set(base.state_dict())
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    attach(base, settings, seed=0)
    train(base)
    assert not torch.equal(logits(base), before)
    with off(base):
        assert torch.equal(logits(base), before)
    assert not torch.equal(logits(base), before)
    assert {name for name in base.state_dict() if CHILD not in name} == names
    detach(base)
    assert torch.equal(logits(base), before)
    assert same(base.state_dict(), weights)
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.promise(17)
def test_off_is_undone_after_an_error(model, logits, train):
    train(model)
    after = logits(model)
    with pytest.raises(ZeroDivisionError), off(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), after)


def test_only_the_deltas_get_gradients(model, loss):
    loss(model).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (CHILD in name), name
        assert parameter.requires_grad == (CHILD in name)
    assert len(state(model)) == sum(p.requires_grad for p in model.parameters())


def test_every_delta_learns(model, train):
    before = state(model)
    train(model)
    after = state(model)
    assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.promise(17)
def test_saved_and_loaded_is_bitwise(base, settings, logits, train, tmp_path):
    fresh = copy.deepcopy(base)
    made = attach(base, settings, seed=0)
    train(base)
    folder.save(base, tmp_path / "adapter", base="tiny", settings=settings)
    loaded = folder.load(fresh, tmp_path / "adapter")
    assert same(state(fresh), state(base))
    assert torch.equal(logits(fresh), logits(base))
    assert (loaded.targets, loaded.trained_parameters) == (made.targets, made.trained_parameters)
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in base.parameters()]
    again = tmp_path / "again"
    folder.save(fresh, again, base="tiny", settings=loaded.settings)
    for name in (folder.WEIGHTS, folder.CONFIG):
        assert (again / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_a_loaded_adapter_goes_on_under_the_same_settings(base, settings, tmp_path):
    fresh = copy.deepcopy(base)
    attach(base, settings, seed=0)
    folder.save(base, tmp_path, base="tiny", settings=settings)
    folder.load(fresh, tmp_path)
    for model in (base, fresh):
        assert continues(model, settings)
        if hasattr(settings, "dropout"):
            assert continues(model, replace(settings, dropout=0.25))
        if getattr(settings, "r", None):
            assert not continues(model, replace(settings, r=12))
        assert not continues(model, FullSettings())
        others = [other for other in SETTINGS.values() if plain(other) != plain(settings)]
        assert not [other for other in others if continues(model, other)]


@pytest.mark.promise(17)
def test_swapped_restores_bitwise(model, logits, train, tokens):
    parent, at_start = state(model), logits(model)
    train(model)
    mine, after = state(model), logits(model)
    parameters = [id(p) for p in model.parameters()]
    with swapped(model, parent):
        assert torch.equal(logits(model), at_start)
    assert torch.equal(logits(model), after)
    with pytest.raises(ZeroDivisionError), swapped(model, parent):
        raise ZeroDivisionError
    assert same(state(model), mine)
    assert parameters == [id(p) for p in model.parameters()]


def test_a_pass_under_swapped_weights_does_not_disturb_a_backward(model, logits, train, loss):
    parent = state(model)
    train(model)

    def gradients(between: bool):
        model.zero_grad()
        found = loss(model)
        if between:
            with swapped(model, parent):
                logits(model)
        found.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert same(gradients(True), gradients(False))


@pytest.mark.promise(17)
def test_load_state_restores(model, logits, train):
    start, before = state(model), logits(model)
    train(model)
    load_state(model, start)
    assert torch.equal(logits(model), before)


def test_a_deepcopy_lives_on_its_own(model, logits, train):
    train(model)
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    train(twin)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    with off(twin):
        assert torch.equal(logits(model), before)
    detach(twin)
    assert torch.equal(logits(model), before)
    with off(model):
        assert torch.equal(logits(twin), logits(model))


def test_same_seed_same_start(base, settings):
    other, third = copy.deepcopy(base), copy.deepcopy(base)
    attach(base, settings, seed=5)
    torch.rand(7)
    attach(other, settings, seed=5)
    attach(third, settings, seed=6)
    assert same(state(base), state(other))
    random = [kind for name, kind in SETTINGS.items() if name not in ("pissa", "olora", *FIXED)]
    assert same(state(base), state(third)) != (settings in random)


FIXED = ["vera", "ia3", "bitfit", "layer_norms", "top_layers"]


def test_a_bfloat16_base_trains_float32_deltas(base, settings, logits, loss):
    base.to(torch.bfloat16)
    before = logits(base)
    attach(base, settings, seed=0)
    if settings not in (SETTINGS[name] for name in ELSEWHERE):
        assert torch.equal(logits(base), before)
    loss(base).backward()
    for delta in deltas(base).values():
        for parameter in delta.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()


def test_autocast_runs(model, loss):
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(model)
    found.backward()
    assert all(p.grad.dtype == torch.float32 for d in deltas(model).values() for p in d.parameters())


def test_dropout_acts_only_when_asked(model, settings, logits, train):
    train(model)
    before = logits(model)
    dropping(model, True)
    assert torch.equal(logits(model), before) == (dropout_of(settings) == 0)
    dropping(model, False)
    assert torch.equal(logits(model), before)


def test_counts_are_what_is_there(base, settings):
    frozen = sum(p.numel() for p in base.parameters())
    attached = attach(base, settings, seed=0)
    assert attached.trained_parameters == sum(tensor.numel() for tensor in state(base).values())
    assert attached.total_parameters == frozen + attached.trained_parameters
    assert attached.targets == list(deltas(base))


@pytest.mark.promise(17)
@pytest.mark.parametrize("name", MERGED)
def test_merged_is_the_adapter(base, name, logits, train):
    attach(base, SETTINGS[name], seed=0)
    train(base)
    before, names = logits(base), [n for n in base.state_dict() if CHILD not in n]
    merge(base)
    assert (logits(base) - before).abs().max() <= 1e-5 * max(1, before.abs().max())
    assert not deltas(base)
    assert list(base.state_dict()) == names


@pytest.mark.promise(17)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_says_so(base, name, train, logits):
    attach(base, SETTINGS[name], seed=0)
    train(base)
    before = logits(base)
    with pytest.raises(ModelError, match=REFUSED[name]):
        merge(base)
    assert torch.equal(logits(base), before)


@pytest.mark.promise(17)
def test_biases_merge_where_there_are_any(base, train, logits):
    attach(base, SETTINGS["bitfit"], seed=0)
    train(base)
    before = logits(base)
    if base.config.model_type == "gpt2":
        merge(base)
    else:
        with pytest.raises(ModelError, match="no biases"):
            merge(base)
    assert (logits(base) - before).abs().max() <= 1e-5


QUANTIZED = [name for name, kind in SETTINGS.items() if hasattr(kind, "quantize")]


@pytest.mark.promise(17)
@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_on_a_quantised_base(tiny, name, how, logits, loss, train, tmp_path):
    model = tiny("llama")
    quantize(model, find_targets(model, "all-linear"), how)
    fresh, before = copy.deepcopy(model), logits(model)
    settings = replace(SETTINGS[name], quantize=how)
    attach(model, settings, seed=0)
    assert torch.equal(logits(model), before) != (name in ELSEWHERE)
    train(model)
    with off(model):
        assert torch.equal(logits(model), before)
    folder.save(model, tmp_path, base="tiny", settings=settings)
    assert folder.quantization_of(tmp_path) == how
    loaded = folder.load(fresh, tmp_path)
    assert loaded.settings.quantize == how
    assert torch.equal(logits(fresh), logits(model))


def test_full_trains_everything_in_float32(base, tokens):
    base.to(torch.bfloat16)
    attached = attach(base, FullSettings(), seed=0)
    assert attached.targets == []
    assert attached.trained_parameters == attached.total_parameters == sum(p.numel() for p in base.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in base.parameters())
    base(tokens, labels=tokens).loss.backward()


def test_full_refuses_quantised_weights(tiny):
    model = tiny("llama")
    packed = torch.zeros(4, dtype=torch.uint8)
    model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ModelError, match=r"lm_head.weight is quantised"):
        make_full(model)


def test_a_new_method_is_one_file_and_one_registry_line(tiny, logits, train, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class GainSettings:
        target_modules: tuple[str, ...] = ("q_proj",)

        def __post_init__(self) -> None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    class Gain(Delta):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.empty(width))

        def reset(self, target, generator: torch.Generator) -> None:
            torch.nn.init.ones_(self.gain)

        def forward(self, target, x, output):
            return output * self.gain

    module = types.ModuleType("gain_method")
    module.build = lambda model, settings: Plan({n: Gain(64) for n in find_targets(model, settings.target_modules)})
    monkeypatch.setitem(sys.modules, "gain_method", module)
    monkeypatch.setitem(METHODS, "gain", Method(GainSettings, "gain_method"))

    model, fresh = tiny("llama"), tiny("llama")
    before = logits(model)
    assert attach(model, settings_for("gain", {}), seed=0).trained_parameters == 2 * 64
    assert torch.equal(logits(model), before)
    train(model)
    folder.save(model, tmp_path, base="tiny", settings=GainSettings())
    assert folder.load(fresh, tmp_path).settings == GainSettings()
    assert torch.equal(logits(fresh), logits(model))


def test_other_small_weights_are_refused(model):
    small = state(model)
    first = sorted(small)[0]
    with pytest.raises(ModelError, match="is missing"):
        load_state(model, {name: tensor for name, tensor in small.items() if name != first})
    with pytest.raises(ModelError, match="not one of the deltas"):
        load_state(model, {**small, "zzz": torch.zeros(1)})
    with pytest.raises(ModelError, match="has shape"), swapped(model, {**small, first: torch.zeros(3)}):
        pass
