"""Scores of answers and rewards of conversations: shared beginnings, several passes, order, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trivium.data.blocks import Row
from trivium.data.encoder import Encoder
from trivium.data.examples import Maker, Spec
from trivium.data.templates import chat_template
from trivium.errors import DataError, ModelError
from trivium.evaluate import score
from trivium.evaluate.score import best, by_sequence, per_entry, rewarded, rewards, scored
from trivium.forest import Example, TokenSequence
from trivium.model.reward import as_reward_model


def asking(text="What did the hare say to the turtle?"):
    return {"role": "user", "content": text}


def saying(text):
    return {"role": "assistant", "content": text}


ANSWERS = ["no", "It said no.", "The hare ran.", "", "é😀", "A turtle and a hare.", "<|im_end|>", "a" * 20]
CONVERSATIONS = [[asking(), saying(text)] for text in ANSWERS]
OTHERS = [
    [asking("A?"), saying("no")],
    [{"role": "system", "content": "Be kind."}, asking("A?"), saying("no")],
    [asking("A?"), saying("no"), asking("B?"), saying("no")],
]


def alone(model, messages):
    """The reward as the model itself gives it, of one row."""
    ids = rewarded(model, messages).inputs
    with torch.no_grad():
        return float(model.hf(torch.tensor([ids.tolist()])).logits)


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_shared_prompts_give_what_rows_alone_give(reward):
    expected = [alone(reward, c) for c in CONVERSATIONS]
    found = rewards(reward, CONVERSATIONS)
    assert len({round(r, 4) for r in found}) == len(found)
    close(found, expected)
    close([rewards(reward, [c])[0] for c in CONVERSATIONS], expected)
    mixed = [*CONVERSATIONS[::2], *OTHERS, *CONVERSATIONS[1::2]]
    close(rewards(reward, mixed), [alone(reward, c) for c in mixed])


def test_several_passes_keep_the_order(reward, monkeypatch):
    mixed = [*OTHERS, *CONVERSATIONS, *OTHERS[::-1]]
    expected = rewards(reward, mixed)
    monkeypatch.setattr(score, "PASS_TOKENS", 1)
    close(rewards(reward, mixed), expected)
    assert rewards(reward, []) == []


def test_a_row_is_read_as_it_is_trained(reward):
    """The tokens of a preference stage's row, where it says more than its texts, too."""
    template = chat_template(reward.tokenizer)
    maker = Maker(Spec("pair", 64, ends=True), Encoder.of(reward.tokenizer), template)
    prompt = [{"role": "system", "content": "Be kind."}, asking("A?"), saying("no"), asking("B?")]

    row = Row({"prompt": prompt, "chosen": "It said no.", "rejected": "no"}, "x", 1)
    (example,) = maker.make([row]).examples
    for sequence, answer in zip(example.sequences, ("It said no.", "no"), strict=True):
        for extra in ({}, {"train": False}, {"weight": 0}):
            read = rewarded(reward, [*({**m, "train": True} for m in prompt), {**saying(answer), **extra}])
            assert np.array_equal(read.tokens, sequence.tokens)
            assert np.array_equal(read.weights, sequence.weights)
            assert read.inputs[-1] in template.stop_ids


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "cannot be read"),
        ([asking()], "no assistant turn"),
        ([asking(), saying("turtle " * 60)], "tokens, and the model reads 64"),
        ([{"role": "elder", "content": "x"}, saying("y")], "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(reward, messages, says):
    with pytest.raises(DataError, match=says) as raised:
        rewards(reward, [CONVERSATIONS[0], messages])
    assert raised.value.remedy


def test_the_longest_that_fits_is_read(reward):
    def read(n):
        return rewarded(reward, [asking("A"), saying("Z" * n)])

    n = 64 - len(read(1).inputs) + 1
    assert len(read(n).inputs) == 64
    assert np.isfinite(rewards(reward, [[asking("A"), saying("Z" * n)]])[0])
    with pytest.raises(DataError, match="has 65 tokens"):
        read(n + 1)


def test_a_reward_that_is_no_number_is_no_rank(random_model):
    """Of weights that are damaged, but not for what is proved on the shortest row and the longest."""
    model = as_reward_model(random_model(), seed=0)
    texts = ("no", "no @ no", "no no no no no no no")
    rows = [[asking(f"{n}?"), saying(text)] for n, text in enumerate(texts)]
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[model.tokenizer("@", add_special_tokens=False)["input_ids"]] = np.nan
    assert len(rewards(model, rows[::2])) == 2
    with pytest.raises(ModelError, match="no finite number"):
        rewards(model, rows)


def test_the_best_of_several(reward):
    prompts = [[asking()], [asking("A?")]]
    answers = [ANSWERS[:4], ANSWERS[4:]]
    for prompt, some, chosen in zip(prompts, answers, best(reward, prompts, answers), strict=True):
        found = {answer: alone(reward, [*prompt, saying(answer)]) for answer in some}
        assert chosen == max(found, key=found.__getitem__)


def test_log_probabilities_of_trained_tokens(random_model):
    """By sequence, by entry, in sum: what the logits say, and weights of 0 are left out."""
    model = random_model()
    generator = np.random.default_rng(0)
    first = generator.integers(3, 250, 20)
    examples = []
    for size in (5, 9, 1):
        rows = [np.concatenate([first, generator.integers(3, 250, n)]) for n in (size, size + 2)]
        examples.append(Example(tuple(TokenSequence(r, (np.arange(len(r)) >= 18).astype(np.float32)) for r in rows)))
    entries, sums = per_entry(model, examples), by_sequence(model, examples)
    for example, values, summed in zip(examples, entries, sums, strict=True):
        parts = values.split([s.trained_tokens for s in example.sequences])
        for sequence, part, total in zip(example.sequences, parts, summed, strict=True):
            ids = torch.tensor(sequence.tokens)[None]
            with torch.no_grad():
                logprobs = model.hf(ids).logits[0, 17:-1].log_softmax(-1).gather(1, ids[0, 18:, None])[:, 0]
            torch.testing.assert_close(part, logprobs, rtol=1e-4, atol=1e-4)
            assert total == pytest.approx(float(logprobs.sum()), rel=1e-4)
    assert scored(model, examples) == pytest.approx([sum(s) for s in sums])
    assert per_entry(model, []) == []
