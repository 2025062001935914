"""Losses and their gradients against numbers worked by hand, torch, transformers and TRL."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.load import load_base, wrap
from trivium.model.new import new_model
from trivium.objectives import objective
from trivium.objectives.base import per_sequence
from trivium.objectives.next_token import next_token_loss
from trivium.objectives.pairs import pairwise

VOCABULARY = 64


def tiny(seed: int = 0) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=VOCABULARY, initializer_range=0.2,
    )  # fmt: skip
    return new_model(config, seed).eval()


def wrapped(hf: nn.Module, tokenizer: Any = None) -> LanguageModel:
    return wrap(hf, tokenizer, "float32", torch.float32)


def row(tokens: list[int], first: int) -> TokenSequence:
    return TokenSequence(np.array(tokens), (np.arange(len(tokens)) >= first).astype(np.float32))


def preference(prompt: list[int], chosen: list[int], rejected: list[int]) -> Example:
    return Example((row(prompt + chosen, len(prompt)), row(prompt + rejected, len(prompt))), scores=(1, -1))


def synthetic(count: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    draw = lambda most: rng.integers(3, VOCABULARY, rng.integers(1, most)).tolist()  # noqa: E731
    return [(draw(40), draw(20), draw(20)) for _ in range(count)]


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], within: float) -> None:
    assert any(float(g.abs().max()) > 1e-3 for g in expected.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= within * max(1.0, float(expected[name].abs().max())), (
            name
        )


def taken(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters()}


# --- next token


def test_next_token_is_torchs_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(20, 9, requires_grad=True)
    target, weight = torch.randint(0, 9, (20,)), torch.rand(20)
    logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    found = next_token_loss(logprob, weight)
    each = nn.functional.cross_entropy(logits, target, reduction="none")
    assert torch.allclose(found, (each * weight).sum())
    ours = torch.autograd.grad(found, logits, retain_graph=True)[0]
    assert torch.allclose(ours, torch.autograd.grad((each * weight).sum(), logits)[0], atol=1e-6)


def test_next_token_weighs_by_token_weights():
    forest = lay_out([Example((TokenSequence(np.arange(5), np.array([9, 1, 0, 0.5, 2], np.float32)),))])
    goal = objective({"loss": "next_token"})
    assert goal.weight(forest) == 3.5  # the first token's weight counts nowhere: nothing predicts it
    logprob = torch.tensor([-1.0, -2.0, -3.0])
    assert float(goal.compute(logprob, forest, None).sum) == 1 * 1 + 0.5 * 2 + 2 * 3
    assert (goal.needs_reference, goal.at_start) == (False, None)


def test_supervised_fine_tuning_is_transformers_own_loss():
    """Loss and gradients with answers alone trained: labels of -100 on the prompts, rows padded."""
    hf = tiny()
    twin = copy.deepcopy(hf)
    rows = [(p + c, len(p)) for p, c, _ in synthetic(5)]
    forest = lay_out([Example((row(tokens, first),)) for tokens, first in rows])
    goal, mine = objective({"loss": "next_token"}), wrapped(hf)
    with mine.laid_out("forest"):
        loss = goal.compute(mine.logprob(forest), forest, None).sum / goal.weight(forest)
        loss.backward()
    longest = max(len(t) for t, _ in rows)
    ids = torch.tensor([t + [0] * (longest - len(t)) for t, _ in rows])
    seen = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t, _ in rows])
    labels = torch.tensor([[-100] * first + t[first:] + [-100] * (longest - len(t)) for t, first in rows])
    expected = twin(input_ids=ids, attention_mask=seen, labels=labels).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_gradients(hf, taken(twin), 1e-5)


def test_sums_per_sequence_with_some_empty():
    forest = lay_out([Example((row([1, 2, 3], 1), row([4], 0), row([5, 6], 1)))])
    assert per_sequence(torch.tensor([1.0, 2.0, 4.0]), forest).tolist() == [3.0, 0.0, 4.0]


def preference_rows(shared: Path) -> list[dict[str, list[int]]]:
    import gzip
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "weights" / "stories260K-hf")
    file = shared / "tinystories" / "pref.jsonl.gz"
    found = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            pair = json.loads(line)
            texts = pair["prompt"][-1]["content"], pair["chosen"], pair["rejected"]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            if sum(map(len, ids)) < 500:
                found.append({"prompt_ids": [1, *ids[0]], "chosen_ids": ids[1], "rejected_ids": ids[2]})
            if len(found) == 4:
                return found
    raise AssertionError("too few short pairs")


def test_dpo_is_trls_on_a_real_model_and_real_pairs(shared, tmp_path):
    """Loss, margins and the gradient of every weight, with a parent that differs from the policy."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = str(shared / "weights" / "stories260K-hf")
    rows = preference_rows(shared)
    mine = load_base(folder, "float32", "cpu")
    parent = load_base(folder, "float32", "cpu")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in mine.hf.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    policy, reference = copy.deepcopy(mine.hf), copy.deepcopy(parent.hf)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            str(tmp_path), beta=0.2, report_to=[], use_cpu=True, per_device_train_batch_size=4, max_length=None,
            gradient_checkpointing=False, bf16=False, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )  # fmt: skip
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()

    goal = pairwise({"loss": "dpo", "beta": 0.2, "label_smoothing": 0.0})
    forest = lay_out([preference(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows])
    with mine.laid_out("forest"), parent.laid_out("forest"):
        with torch.no_grad():
            before = parent.logprob(forest)
        result = goal.compute(mine.logprob(forest), forest, before)
        loss = result.sum / goal.weight(forest)
        loss.backward()
    assert abs(float(loss.detach()) - math.log(2)) > 1e-2, "the parent must differ, or the test says little"
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5)
    logged = {k: v[-1] for k, v in trainer._metrics["eval"].items()}
    assert float(result.stats["margin"]) / 4 == pytest.approx(logged["rewards/margins"], rel=1e-4)
    assert float(result.stats["accuracy"]) / 4 == pytest.approx(logged["rewards/accuracies"])
    assert_gradients(mine.hf, taken(policy), 1e-4)
