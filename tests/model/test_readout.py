"""Log-probabilities and their gradients in chunks, against the whole logits and ``log_softmax`` in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.errors import RecipeError
from trivium.model import readout as module
from trivium.model.new import new_model
from trivium.model.readout import Readout, readout_of
from trivium.peft import LoRASettings
from trivium.peft.base import attach

K, D, V = 53, 24, 101
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "soft cap": {"softcap": 1.2},
    "all": {"bias": True, "scale": 1.7, "softcap": 0.9},
}


class Hung(nn.Module):
    """A low-rank term on a head, by a forward hook: what an adapter does."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(3, head.in_features, generator=generator))
        self.b = nn.Parameter(torch.randn(head.out_features, 3, generator=generator))

    def forward(self, head, inputs, output):
        return output + inputs[0] @ self.a.T @ self.b.T


@pytest.fixture
def made():
    """``made("bias")``: the readout of that kind, hidden states and targets."""

    def make(kind: str, frozen: bool = False):
        torch.manual_seed(0)
        options = dict(KINDS[kind])
        head = nn.Linear(D, V, bias=options.pop("bias", False)).requires_grad_(not frozen)
        with torch.no_grad():
            head.weight.normal_()
        return Readout(head, **options), torch.randn(K, D).requires_grad_(), torch.randint(0, V, (K,))

    return make


def reference(readout: Readout, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = readout.head(hidden).double() * readout.scale
    if readout.softcap is not None:
        logits = readout.softcap * torch.tanh(logits / readout.softcap)
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


def gradients(logprob: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    pull = torch.cos(torch.arange(len(logprob))).to(logprob.dtype)  # signs of both kinds, and one of zero
    pull[3] = 0
    return list(torch.autograd.grad((pull * logprob).sum(), wanted))


def check(readout: Readout, hidden: torch.Tensor, target: torch.Tensor, within: float = 1e-5) -> None:
    wanted = [hidden, *(p for p in readout.parameters() if p.requires_grad)]
    wanted = [w for w in wanted if w.requires_grad]
    found, expected = readout(hidden, target), reference(readout, hidden, target)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < within
    for f, e in zip(gradients(found, wanted), gradients(expected, wanted), strict=True):
        assert f.dtype == e.dtype
        assert (f - e).abs().max() <= within * max(1.0, float(e.abs().max()))


@pytest.mark.parametrize("chunk", [16, 17, 52, 53, 54, 1000])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_logits(made, monkeypatch, kind, frozen, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * chunk)
    assert module._chunk_size(V) == chunk
    check(*made(kind, frozen))


@pytest.mark.parametrize("child", [True, False], ids=["child", "hook alone"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_with_an_adapter(made, monkeypatch, kind, frozen, child):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * 20)
    readout, hidden, target = made(kind, frozen)
    hung = Hung(readout.head)
    readout.head.register_forward_hook(hung)
    (readout.head if child else readout).add_module("hung", hung)
    assert not readout.plain
    check(readout, hidden, target, within=3e-5)
    bare = Readout(nn.Linear(D, V, bias=readout.head.bias is not None), readout.scale, readout.softcap)
    bare.head.load_state_dict({k: v for k, v in readout.head.state_dict().items() if "hung" not in k})
    assert (bare(hidden, target) - readout(hidden, target)).abs().max() > 0.1, "the adapter must count"


def test_only_the_head_is_trained(made):
    """Hidden states without gradient, as when every layer below is frozen."""
    readout, hidden, target = made("all")
    check(readout, hidden.detach(), target)


def test_only_the_bias_is_trained(made):
    readout, hidden, target = made("bias")
    readout.head.weight.requires_grad_(False)
    check(readout, hidden, target)


def test_nothing_to_read(made):
    readout, hidden, target = made("plain")
    assert readout(hidden[:0], target[:0]).shape == (0,)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_by_finite_differences(made, frozen):
    readout, hidden, target = made("all", frozen)
    readout, hidden = readout.double(), hidden.detach().double().requires_grad_()
    direction, step = torch.randn_like(hidden), 1e-5
    (gradient,) = torch.autograd.grad(readout(hidden, target).sum(), [hidden])
    with torch.no_grad():
        ahead, behind = (reference(readout, hidden + s * step * direction, target).sum() for s in (1, -1))
    slope = float((ahead - behind) / (2 * step))
    assert abs(slope - float((gradient * direction).sum())) < 1e-4 * abs(slope)


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("frozen", [True, False])
def test_bfloat16_autocast(made, kind, frozen):
    """Float32 weights under autocast: products in bfloat16, softmax in float32, gradients of the weights float32."""
    readout, hidden, target = made(kind, frozen)
    rounded = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = readout(rounded, target)
        logits = (readout.head(rounded).float() * readout.scale).float()
    if readout.softcap is not None:
        logits = readout.softcap * torch.tanh(logits / readout.softcap)
    expected = logits.log_softmax(-1)[torch.arange(K), target]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-3
    wanted = [rounded] + ([] if frozen else list(readout.parameters()))
    for f, e, w in zip(gradients(found, wanted), gradients(expected, wanted), wanted, strict=True):
        assert f.dtype == w.dtype
        assert (f.float() - e.float()).abs().max() <= 0.03 * float(e.abs().max())


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


@pytest.mark.parametrize("hung", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_whole_logits_are_never_held(monkeypatch, frozen, hung):
    entries, width, vocabulary = 512, 16, 1024
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * vocabulary * 32)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(not frozen)
    if hung:
        head.register_forward_hook(Hung(head))
    hidden = torch.randn(entries, width, requires_grad=True)
    with Largest() as largest:
        Readout(head)(hidden, torch.arange(entries)).sum().backward()
    assert 32 * vocabulary <= largest.numel < entries * vocabulary / 8
    with Largest() as whole:
        head(hidden).log_softmax(-1)
    assert whole.numel == entries * vocabulary, "the count would have seen it"


@pytest.mark.parametrize(
    ("name", "values", "scale", "softcap"),
    [
        ("llama", {}, 1.0, None),
        ("granite", {"logits_scaling": 8.0}, 0.125, None),
        ("cohere", {"logit_scale": 0.25}, 0.25, None),
        ("gemma2", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
    ],
)
def test_what_a_config_declares_is_read(name, values, scale, softcap):
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "intermediate_size": 32, "vocab_size": 64, "pad_token_id": 0}
    model = new_model(AutoConfig.for_model(name, **sizes, **values), seed=0)
    found = readout_of(model)
    assert (found.scale, found.softcap) == (scale, softcap)
    assert found.head is model.get_output_embeddings()


def test_an_adapter_on_the_head_is_refused_by_the_methods():
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    with pytest.raises(RecipeError):
        attach(new_model(config, seed=0), LoRASettings(r=2, target_modules=("lm_head",)), seed=0)
