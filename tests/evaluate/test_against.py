"""A model against its parent: the KL against one worked out on whole distributions, unchanged answers, lengths."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from trivium.errors import ModelError
from trivium.evaluate.against import Against, against, kl_per_token
from trivium.evaluate.score import rewards
from trivium.evaluate.win_rate import by_program, by_reward
from trivium.talk import Talker

PROMPTS = [[{"role": "user", "content": text}] for text in ("A hare", "What did the turtle say?", "no", "The hare ran")]


def nearby(random_model, size, seed=0):
    """The same model, a little changed in every weight."""
    model = random_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def talkers(new, parent):
    return (lambda: Talker.of(new)), (lambda: Talker.of(parent))


def compared(new, parent, prompts=PROMPTS, prefers=None, most=8, seed=0):
    return against(*talkers(new, parent), prompts, prefers, most, seed)


def test_the_same_model_is_unchanged(random_model, reward):
    one = compared(random_model(), random_model(), prefers=by_reward(lambda rows: rewards(reward, rows)))
    assert one is not None
    assert (one.unchanged, one.kl) == (1.0, pytest.approx(0.0, abs=1e-10))
    assert one.tokens[0] == one.tokens[1]
    assert (one.won.share, one.won.ties, one.won.of) == (0.5, 4, 4)
    assert [duel.new for duel in one.duels] == [duel.old for duel in one.duels]
    assert "100% of 4 greedy answers unchanged" in one.line()


def test_what_is_counted_is_what_both_say(random_model):
    new, parent = nearby(random_model, 0.05), random_model()
    found = compared(new, parent, prefers=by_program(lambda prompt, answer: len(answer)))
    assert found is not None
    mine, theirs = Talker.of(new), Talker.of(parent)
    ids = [mine.prompt(prompt) for prompt in PROMPTS]
    after, before = (t.ids_after(ids, 8) for t in (mine, theirs))
    assert found.unchanged == sum(a == b for a, b in zip(after, before, strict=True)) / 4 < 1
    assert found.tokens == (sum(map(len, before)) / 4, sum(map(len, after)) / 4)
    for n, duel in enumerate(found.duels):
        assert list(duel.prompt) == PROMPTS[n]
        assert (duel.new, duel.old) == (mine.texts(after)[n], theirs.texts(before)[n])
    expected = [0.5 + 0.5 * ((len(d.new) > len(d.old)) - (len(d.new) < len(d.old))) for d in found.duels]
    assert found.won.verdicts == expected
    assert json.loads(json.dumps(found.as_dict()))["won"]["of"] == 4


def logprobs_after(model, ids):
    with torch.no_grad():
        return model.hf(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def exact(new, parent, ids, most, stops):
    """(KL to the parent in sum over the tokens of an answer, tokens of it), both expected under ``new``: over every
    answer there is, until a stop token or ``most`` tokens."""
    ours, theirs = logprobs_after(new, ids), logprobs_after(parent, ids)
    kl, length = float((ours.exp() * (ours - theirs)).sum()), 1.0
    if most > 1:
        for token, p in enumerate(ours.exp().tolist()):
            if token not in stops and p > 1e-9:
                more, longer = exact(new, parent, [*ids, token], most - 1, stops)
                kl, length = kl + p * more, length + p * longer
    return kl, length


def biased(model, stop, by):
    """``model`` with another readiness to end: the stop token's logit grows by about ``by``."""
    head = model.hf.get_output_embeddings()

    def shift(_module, _inputs, output):
        output = output.clone()
        output[..., stop] += by
        return output

    head.register_forward_hook(shift)
    return model


@pytest.mark.parametrize("ready", [0.0, 4.0])
def test_the_kl_is_the_one_of_the_whole_distributions(random_model, ready):
    """Two tokens of an answer, all of them: what the model says of ending there is part of it."""
    parent, new = random_model(spread=0.1), nearby(lambda: random_model(spread=0.1), 0.15)
    template = Talker.of(parent).template
    if ready:  # tuned to end soon, which is nearly all that it has learnt
        new = biased(random_model(spread=0.1), template.stop_id, ready)
    prompts = PROMPTS[:2]
    parts = [exact(new, parent, Talker.of(new).prompt(p), 2, template.stop_ids) for p in prompts]
    expected = sum(kl for kl, _ in parts) / sum(length for _, length in parts)
    assert expected > 0.02
    found = [compared(new, parent, [p for p in prompts for _ in range(64)], most=2, seed=1000 * n).kl for n in range(6)]
    mean, spread = sum(found) / 6, torch.tensor(found).std().item() / math.sqrt(6)
    assert abs(mean - expected) < 4 * spread
    assert spread < 0.15 * expected, "else nothing is shown"


def test_kl_per_token_is_unbiased_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(50, generator=generator).double().log_softmax(0) for _ in range(2))
    expected = float((ours.exp() * (ours - theirs)).sum())
    drawn = torch.multinomial(ours.exp(), 200_000, replacement=True, generator=generator)
    found = kl_per_token([ours[drawn[:7]], ours[drawn[7:]]], [theirs[drawn[:7]], theirs[drawn[7:]]])
    assert found == pytest.approx(expected, rel=0.02)
    for a, b in itertools.product([-1e-30, -0.1, -20.0, -700.0], repeat=2):
        assert kl_per_token([torch.tensor([a])], [torch.tensor([b])]) >= 0
    assert kl_per_token([ours[drawn]], [ours[drawn]]) == 0
    assert kl_per_token([], []) == 0


def test_a_prompt_that_does_not_fit_one_of_them_is_left_out(random_model):
    """Also where the parent's context is the shorter one: nothing longer may be read by it."""
    long = [{"role": "user", "content": "turtle hare " * 20}]
    assert 32 < len(Talker.of(random_model()).prompt(long)) <= 56
    prompts = [PROMPTS[0], long, PROMPTS[1], [{"role": "elder", "content": "x"}]]
    for new, parent in itertools.permutations((random_model(context=64), random_model(context=36))):
        found = compared(new, parent, prompts)
        assert found is not None
        assert [list(duel.prompt) for duel in found.duels] == [PROMPTS[0], PROMPTS[1]]
        assert found.kl == pytest.approx(0, abs=1e-9)
    assert compared(random_model(), random_model(context=36), [long]) is None
    assert compared(random_model(), random_model(), PROMPTS, most=1000) is None
    assert compared(random_model(), random_model(), []) is None


def test_models_of_other_tokenizers_are_not_compared(random_model):
    from trivium.data.tokenizer import train_tokenizer

    other = random_model()
    other.tokenizer = train_tokenizer(["b c d e f"], 280)
    assert compared(random_model(), other) is None
    assert compared(other, random_model()) is None


def test_tokens_that_the_parent_does_not_have(random_model):
    """The new model has a longer vocabulary, and uses it: the parent cannot be asked about that."""
    new, parent = random_model(), random_model()
    size = len(parent.tokenizer)
    new.hf.resize_token_embeddings(size + 8)
    with torch.no_grad():
        new.hf.lm_head.weight[size:] = 5 * new.hf.lm_head.weight[:8]
    found = compared(new, parent, [*PROMPTS, *PROMPTS, *PROMPTS], most=16)
    assert found is None or len(found.duels) <= 12


def test_answers_of_no_tokens(random_model):
    """A model that ends at once: nothing is said, and that is told."""
    parent = random_model()
    new = biased(random_model(), Talker.of(parent).template.stop_id, 1e4)
    found = compared(new, parent)
    assert found is not None
    assert found.tokens[1] == 0
    assert [duel.new for duel in found.duels] == [""] * 4
    assert found.kl > 1
    assert math.isfinite(found.kl)


def test_one_model_is_in_memory_at_a_time(random_model):
    import gc
    import weakref

    seen = []

    def opening():
        gc.collect()
        assert [ref() for ref in seen] == [None] * len(seen), "the one before is still held"
        talker = Talker.of(random_model())
        seen.append(weakref.ref(talker.model))
        return talker

    def prefers(duels):
        gc.collect()
        assert [ref() for ref in seen] == [None, None]
        return [0.5] * len(duels)

    assert against(opening, opening, PROMPTS, prefers, 4) is not None
    assert len(seen) == 2


def test_a_reward_model_has_no_answers(random_model, reward):
    with pytest.raises(ModelError, match="numbers, not text"):
        compared(reward, random_model())


def test_the_line_for_a_person():
    line = Against(0.25, (58.4, 71.0), 0.04149, ()).line()
    assert line == "25% of 0 greedy answers unchanged, 58 → 71 tokens long, KL 0.041 nats per token"
