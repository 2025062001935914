"""Forest attention against a dense reference that follows each token's path: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivium.forest import Example, Forest, TokenSequence, lay_out
from trivium.model.attention import MAX_FILL, Options, Plan, forest_attention, segment_attention
from trivium.model.flex import flex_forest_attention
from trivium.model.layout import filled

OPTIONS = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "window wider than any path": {"window": 500},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"scaling": 0.4, "window": 9, "softcap": 2.0, "sinks": True},
}
HEADS = {"equal heads": (2, 2), "grouped heads": (6, 2), "one key head": (4, 1)}


def grown(seed: int, rows: int = 6, longest: int = 40) -> Forest:
    """A forest of rows that begin with pieces of earlier rows."""
    rng = np.random.default_rng(seed)
    kept: list[np.ndarray] = [np.empty(0, np.int64)]
    for _ in range(rows):
        trunk = kept[rng.integers(len(kept))]
        cut = int(rng.integers(len(trunk) + 1)) if rng.random() < 0.5 else len(trunk)
        kept.append(np.concatenate([trunk[:cut], rng.integers(0, 9, rng.integers(1, longest))]))
    return lay_out([Example(tuple(TokenSequence(r, np.ones(len(r), np.float32)) for r in kept[1:]))])


def dense(q: Tensor, k: Tensor, v: Tensor, forest: Forest, options: Options) -> Tensor:
    """Softmax over each token's own path, written out one token and one head at a time, in float64."""
    q, k, v = (x[0].double() for x in (q, k, v))
    scaling = options.scaling if options.scaling is not None else q.shape[-1] ** -0.5
    path: list[int] = []
    out = []
    for i, depth in enumerate(forest.position.tolist()):
        path = [*path[:depth], i]
        seen = path if options.window is None else path[-options.window :]
        rows = []
        for head in range(q.shape[0]):
            group = head // (q.shape[0] // k.shape[0])
            scores = k[group, seen] @ q[head, i] * scaling
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head : head + 1].double()])
            rows.append(scores.softmax(0)[: len(seen)] @ v[group, seen])
        out.append(torch.stack(rows))
    return torch.stack(out)[None].float()


def inputs(forest: Forest, heads: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, h, len(forest.tokens), 8) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=generator).requires_grad_() for s in sizes]


def options_of(name: str, heads: int) -> Options:
    given_options = dict(OPTIONS[name])
    if given_options.pop("sinks", False):
        sinks = torch.randn(heads, generator=torch.Generator().manual_seed(9)).requires_grad_()
        return Options(**given_options, sinks=sinks)
    return Options(**given_options)


def values_and_gradients(run, qkv: list[Tensor], forest: Forest, options: Options) -> list[Tensor]:
    out = run(*qkv, forest, options)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    wanted = qkv if options.sinks is None else [*qkv, options.sinks]
    return [out.detach(), *torch.autograd.grad((out * pull).sum(), wanted)]


def by_segments(q, k, v, forest, options):
    return segment_attention(q, k, v, Plan(forest), options)


def by_flex(q, k, v, forest, options):
    return flex_forest_attention(q, k, v, Plan(forest), options)


def assert_same(found: list[Tensor], expected: list[Tensor], within: float = 2e-5) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert (f - e).abs().max() <= within * max(1.0, float(e.abs().max()))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_dense_reference(name, heads):
    forest = grown(seed=len(name))
    options = options_of(name, heads[0])
    qkv = inputs(forest, heads)
    assert_same(
        values_and_gradients(by_segments, qkv, forest, options), values_and_gradients(dense, qkv, forest, options)
    )


@given(st.integers(0, 10_000), st.sampled_from(sorted(OPTIONS)))
@settings(max_examples=25, deadline=None)
def test_equals_the_dense_reference_on_any_forest(seed, name):
    forest = grown(seed, rows=1 + seed % 7, longest=30)
    assume(len(forest.tokens))  # where nothing is trained nothing is read, and no attention is asked
    options = options_of(name, 2)
    qkv = inputs(forest, (2, 1), seed)
    with torch.no_grad():
        expected = dense(*qkv, forest, options)
        assert_same([by_segments(*qkv, forest, options)], [expected])


@pytest.mark.parametrize("name", OPTIONS)
def test_flex_attention_equals_segments(name):
    """The rule as CUDA computes it, here through FlexAttention's uncompiled form."""
    forest = grown(seed=3)
    options = options_of(name, 4)
    qkv = [x.detach() for x in inputs(forest, (4, 2))]
    with torch.no_grad():
        try:
            found = by_flex(*qkv, forest, options)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            pytest.skip(f"this torch has no FlexAttention on the CPU: {error}")
        assert_same([found], [by_segments(*qkv, forest, options)])


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_filled_line_changes_nothing(name):
    """The tail is for FlexAttention, which wants few lengths; segments have no need of it."""
    forest = grown(seed=5)
    longer = filled(forest, 64)
    assert len(longer.tokens) % 64 == 0
    assert len(longer.tokens) > len(forest.tokens)
    assert filled(longer, 64) is longer
    options = options_of(name, 4)
    qkv = [x.detach() for x in inputs(forest, (4, 2))]
    tail = [torch.full((1, x.shape[1], len(longer.tokens) - x.shape[2], 8), 50.0) for x in qkv]
    with torch.no_grad():
        found = by_flex(*(torch.cat([x, t], 2) for x, t in zip(qkv, tail, strict=True)), longer, options)
        assert_same([found[:, : len(forest.tokens)]], [dense(*qkv, forest, options)])
        assert torch.isfinite(found).all()


def test_segments_of_like_length_share_a_call_and_no_other():
    rows = [np.arange(n) + 1000 * at for at, n in enumerate((40, 41, 42, 41, 9, 10))]
    forest = lay_out([Example((TokenSequence(r, np.ones(len(r))),)) for r in rows])
    plan = Plan(forest)
    assert sorted(len(c.segments) for c in plan.calls) == [2, 4]
    assert all(plan.mask(n, None) is None for n in range(2)), "plain rows go under the causal flag, without a mask"
    assert sorted(n for c in plan.calls for n in c.segments) == list(range(6))


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_calls_hold_every_segment_once_and_little_fill(seed):
    plan = Plan(grown(seed, rows=10))
    assert sorted(n for c in plan.calls for n in c.segments) == list(range(len(plan.forest.segments)))
    for call in plan.calls:
        assert len({d > 0 for d in call.depths}) == 1, "roots with roots, branches with branches"
        paths = [d + n for d, n in zip(call.depths, call.lengths, strict=True)]
        used = sum(p * n for p, n in zip(paths, call.lengths, strict=True))
        assert max(paths) * max(call.lengths) * len(paths) <= MAX_FILL * used + 1e-6


def test_masks_are_built_once():
    plan = Plan(grown(seed=2))
    assert all(plan.mask(n, 5) is plan.mask(n, 5) for n in range(len(plan.calls)))


def test_what_it_does_not_know_is_refused():
    forest = grown(seed=1)
    q, k, v = inputs(forest, (2, 2))
    module = torch.nn.Module()
    plan = Plan(forest)
    with pytest.raises(NotImplementedError, match="one line"):
        forest_attention(module, q, k, v, None)
    with pytest.raises(NotImplementedError, match="one line"):
        forest_attention(module, *(x.expand(2, -1, -1, -1) for x in (q, k, v)), None, forest=plan)
    with pytest.raises(NotImplementedError, match="position bias"):
        forest_attention(module, q, k, v, None, position_bias=torch.zeros(1), forest=plan)
    with pytest.raises(NotImplementedError, match="dropout"):
        flex_forest_attention(q, k, v, plan, Options(dropout=0.1))


def test_the_registered_function_passes_every_option_on():
    forest = grown(seed=4)
    q, k, v = inputs(forest, (4, 2))
    sinks = torch.randn(4)
    found, weights = forest_attention(
        torch.nn.Module(), q, k, v, None, 0.0, 0.3, sliding_window=7, softcap=2.0, s_aux=sinks, forest=Plan(forest)
    )
    assert weights is None
    with torch.no_grad():
        expected = dense(q, k, v, forest, Options(scaling=0.3, window=7, softcap=2.0, sinks=sinks))
    assert_same([found.detach()], [expected])


@pytest.mark.parametrize("name", ["plain", "soft cap", "sinks"])
def test_dropout_drops(name):
    """A model's own attention dropout, where it is asked for: some weights fall out, the mean stays."""
    forest = grown(seed=6)
    q, k, v = (x.detach() for x in inputs(forest, (2, 2)))
    options = options_of(name, 2)
    dropped = Options(0.3, options.scaling, options.window, options.softcap, options.sinks)
    torch.manual_seed(0)
    with torch.no_grad():
        runs = torch.stack([by_segments(q, k, v, forest, dropped) for _ in range(300)])
        whole = by_segments(q, k, v, forest, options)
    assert runs.std(0).mean() > 0.05
    assert (runs.mean(0) - whole).abs().mean() < 0.06
