"""Every method in a forest: packed and shared equals separate, recomputed or not; each tree under its own adapter; and
generation with virtual tokens before the prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trivium.errors import ModelError, RecipeError
from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.generate import generate_many
from trivium.model.load import wrap
from trivium.model.proof import prove
from trivium.peft.base import adapter_names, attach, deltas, detach, merge, off, state
from trivium.peft.settings import settings_of
from trivium.peft.targets import decoder_layers
from trivium.train import recompute
from trivium.virtual import adapters_of

METHODS = {
    "lora": {"name": "lora", "r": 4, "modules_to_save": ["lm_head"]},
    "dora": {"name": "dora", "r": 4},
    "pissa": {"name": "pissa", "r": 4},
    "vera": {"name": "vera", "r": 8},
    "houlsby-norms": {"name": "houlsby", "r": 8, "layer_norms": True},
    "parallel": {"name": "scaled_parallel", "r": 8},
    "compacter": {"name": "compacter", "r": 8},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 5},
    "prefix": {"name": "prefix", "num_virtual_tokens": 7},
    "bitfit": {"name": "bitfit"},
    "layer_norms": {"name": "layer_norms"},
    "top_layers": {"name": "top_layers", "layers": 1},
}
KINDS = ["llama", "qwen3", "gemma3", "gpt2"]


def examples(seed: int = 0, adapter: str | None = None) -> list[Example]:
    """Two pairs with a shared prompt of 20 tokens, and two single rows."""
    random = np.random.default_rng(seed)

    def sequence(prompt, length):
        tokens = np.concatenate([prompt, random.integers(3, 128, length)])
        return TokenSequence(tokens, (np.arange(len(tokens)) >= max(1, len(prompt))).astype(np.float32))

    nothing = np.empty(0, np.int64)
    prompts = [random.integers(3, 128, 20) for _ in range(2)]
    pairs = [Example((sequence(p, 6), sequence(p, 9)), adapter=adapter) for p in prompts]
    return [*pairs, *(Example((sequence(nothing, n),), adapter=adapter) for n in (13, 30))]


def changed(model, scale: float = 0.1) -> None:
    """Trained weights that matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def under(model, layout: str, forest, again: bool = False):
    """(log-probabilities, gradients of a mixture) of a forest in one layout."""
    layers = list(decoder_layers(model.hf).values())
    with model.laid_out(layout), recompute.recomputed(layers if again else [], model.adapters):
        found = model.logprob(forest)
        model.hf.zero_grad()
        (torch.cos(torch.arange(len(found))) * found).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}


def close(one, other) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-3, atol=2e-4 * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_forest_equals_separate_sequences(tiny, kind, name):
    model = wrap(tiny(kind), None, "float32", torch.float32)
    attach(model.hf, settings_of(METHODS[name]), seed=0)
    changed(model.hf)
    forest = lay_out(examples())
    alone = under(model, "single", forest)
    close(under(model, "forest", forest), alone)
    close(under(model, "forest", forest, again=True), alone)
    close(under(model, "rows", forest, again=True), alone)
    assert prove(model, examples()).layout == "forest"


NAMED = {
    "a": {"name": "lora", "r": 4, "modules_to_save": ["lm_head"]},
    "b": {"name": "houlsby", "r": 8},
    "c": {"name": "prefix", "num_virtual_tokens": 7},
    "d": {"name": "ia3"},
    "e": {"name": "prompt", "num_virtual_tokens": 4},
    "f": {"name": "layer_norms"},
}


@pytest.fixture
def many(tiny):
    """One base with six adapters of different kinds."""

    def build(kind: str):
        model = wrap(tiny(kind), None, "float32", torch.float32)
        for name, written in NAMED.items():
            attach(model.hf, settings_of(written), seed=0, name=name)
        for name in NAMED:  # the last one that is attached is the one that trains
            for delta in deltas(model.hf, name).values():
                delta.requires_grad_(True)
        changed(model.hf)
        return model

    return build


@pytest.mark.parametrize("layout", ["forest", "rows", "single"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_tree_under_its_own_adapter(many, kind, layout):
    """Rows that begin alike but name different adapters share nothing; one pass gives what each would have alone."""
    model = many(kind)
    names = [*NAMED, None, "a"]
    rows = [replace(e, adapter=name) for name in names for e in examples(seed=0)]
    together = lay_out(rows)
    assert [name for name, _ in together.adapters] == [*NAMED, None]
    with torch.no_grad(), model.laid_out(layout):
        found = model.logprob(together).split([e.trained_tokens for e in rows])
        for number, name in enumerate(names):
            with off(model.hf) if name is None else adapters_of(model.hf).only(name):
                expected = model.logprob(lay_out(examples(seed=0)))
            mine = torch.cat([found[4 * number + n] for n in range(4)])
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("again", [False, True])
def test_trees_train_their_own_adapters_in_one_pass(many, again):
    model = many("llama")
    alone = {}
    for name in ("a", "b"):
        with adapters_of(model.hf).only(name):
            alone[name] = under(model, "forest", lay_out(examples(seed=3)))[1]
    both = lay_out([replace(e, adapter=name) for name in ("a", "b") for e in examples(seed=3)])
    layers = list(decoder_layers(model.hf).values())
    with model.laid_out("forest"), recompute.recomputed(layers if again else [], model.adapters):
        model.hf.zero_grad()
        for part in model.logprob(both).split(len(lay_out(examples(seed=3)).source)):
            (torch.cos(torch.arange(len(part))) * part).sum().backward(retain_graph=True)
    for name in ("a", "b"):
        for key, expected in alone[name].items():
            if f".{name}." in key:
                found = dict(model.hf.named_parameters())[key].grad
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_tree_that_names_an_adapter_wants_one(tiny):
    model = wrap(tiny("llama"), None, "float32", torch.float32)
    with model.laid_out("forest"), pytest.raises(ModelError, match="the model has none"):
        model.logprob(lay_out(examples(adapter="a")))


def test_switched_stacked_and_averaged(tiny, logits):
    model = tiny("llama")
    for name, seed in (("one", 1), ("two", 2)):
        attach(model, settings_of({"name": "lora", "r": 4}), seed=seed, name=name)
    torch.manual_seed(0)
    for name in ("one", "two"):
        for delta in deltas(model, name).values():
            torch.nn.init.normal_(delta.lora_B, std=0.1)
    use = adapters_of(model)
    assert adapter_names(model) == ["one", "two"]
    found = {}
    for key, active in (("one", {"one": 1.0}), ("two", {"two": 1.0}), ("both", {"one": 1.0, "two": 1.0})):
        use.switch(active)
        found[key] = logits(model)
    use.switch({"one": 0.25, "two": 0.75}, averaged=True)
    found["averaged"] = logits(model)
    with off(model):
        found["base"] = logits(model)
    assert len({float(x.sum()) for x in found.values()}) == 5

    # LoRAs are linear: stacked is the sum of the updates, averaged their weighted mean
    def merged(weights):
        plain = tiny("llama")
        with torch.no_grad():
            for name, weight in weights.items():
                for target, delta in deltas(model, name).items():
                    plain.get_submodule(target).weight += weight * delta.update()
        return logits(plain)

    torch.testing.assert_close(found["both"], merged({"one": 1, "two": 1}), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["averaged"], merged({"one": 0.25, "two": 0.75}), rtol=1e-4, atol=1e-4)
    use.switch({"one": 1.0})
    detach(model, "two")
    assert torch.equal(logits(model), found["one"])
    merge(model, "one")
    torch.testing.assert_close(logits(model), found["one"], rtol=1e-4, atol=1e-4)
    assert adapters_of(model) is None


def test_virtual_tokens_are_neither_stacked_nor_averaged(tiny):
    model = wrap(tiny("llama"), None, "float32", torch.float32)
    for name in ("one", "two"):
        attach(model.hf, settings_of({"name": "prompt", "num_virtual_tokens": 4}), seed=0, name=name)
    adapters_of(model.hf).switch({"one": 1.0, "two": 1.0})
    with pytest.raises(ModelError, match=r"cannot be stacked or averaged \(one, two\)"):
        model.logprob(lay_out(examples()))
    with pytest.raises(RecipeError, match="cannot be an adapter's name"):
        attach(model.hf, settings_of("ia3"), seed=0, name="a.b")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
def test_generation_is_the_likeliest_token_again_and_again(tiny, kind, name):
    """Prompts of different lengths side by side, with the cache, against whole passes without one."""
    model = wrap(tiny(kind), None, "float32", torch.float32)
    attach(model.hf, settings_of(METHODS[name]), seed=0)
    changed(model.hf, 0.3)
    prompts = [[5, 9, 11], [17, 3, 44, 90, 23, 8, 31], [100]]
    found = generate_many(model, prompts, 6, frozenset())

    def whole(ids):
        """One pass over prompt and answer so far; an entry for each token of the vocabulary."""
        tokens = np.array([*ids, 0])
        rows = [TokenSequence(np.array([*ids, t]), np.eye(len(tokens))[-1].astype(np.float32)) for t in range(128)]
        with torch.no_grad(), model.laid_out("forest"):
            return int(model.logprob(lay_out([Example((row,)) for row in rows], share=False)).argmax())

    ids = list(prompts[0])
    for token in found[0][:3]:
        assert token == whole(ids)
        ids.append(token)
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer == generate_many(model, [prompt], 6, frozenset())[0]
    assert model.context == 128 - {"prompt": 5, "prefix": 7}.get(name, 0)
    with off(model.hf):
        assert model.context == 128
        assert found != generate_many(model, prompts, 6, frozenset())


def test_state_is_of_one_adapter(many):
    model = many("llama")
    assert set(state(model.hf, "d")) == {f"{n}.ia3_l" for n in deltas(model.hf, "d")}
    assert state(model.hf, "nobody") == {}
