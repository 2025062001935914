"""Every preference loss that TRL has too: its value, the gradient of every weight and what is logged are TRL's.

Weights and texts are real. Of two models one is the policy and the other its parent: ``clean`` is what was downloaded,
``noisy`` the same with noise. TRL's trainers are made as their users make them, and both sides get the tokens that
those make of the texts.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.load import load_base
from trivium.objectives import OBJECTIVES, objective, shares
from trivium.objectives.base import Objective, Sums

NOISE = 0.005
ROWS = 4
# Of a loss, and of a weight's largest gradient. Of gradients in float64 TRL's are off by 1.6e-5 and ours by 1.4e-5;
# the two differ by 2.4e-5, with the forward KL, whose exponential multiplies what float32 rounds, by 9.2e-5.
LOSS_WITHIN, GRADIENT_WITHIN = 2e-5, 1e-4

TRLS_NAMES = {
    "dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "dpo_norm": "sigmoid_norm",
    "js": "js_divergence", "alpha": "alpha_divergence",
}  # fmt: skip
LOGGED = {
    "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected", "rewards/margins": "margin",
    "rewards/accuracies": "accuracy", "logps/chosen": "logprob_chosen", "logps/rejected": "logprob_rejected",
}  # fmt: skip
PER_TOKEN = ("ipo", "dpo_norm")  # losses whose rewards we log per token, and TRL as sums
REWARDS = [name for name in LOGGED if "rewards" in name]
BY_SIDE = [name for name in LOGGED if name.endswith(("chosen", "rejected"))]

Settings = dict[str, Any]


@dataclass(frozen=True)
class Models:
    clean: LanguageModel
    noisy: LanguageModel
    tokenizer: Any
    folder: Path

    def trainer(self, kind: type, config: type, rows: list[dict[str, Any]], **settings: Any) -> Any:
        """One of TRL's for the noisy model, or for a ``model``, whose parent is the clean one, or a ``ref_model``."""
        import datasets

        given = {"model": settings.pop("model", self.noisy.hf)}
        if kind.__name__ in ("DPOTrainer", "KTOTrainer"):
            given["ref_model"] = settings.pop("ref_model", self.clean.hf)
        args = config(
            str(self.folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            per_device_train_batch_size=ROWS, **settings,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        return kind(args=args, train_dataset=data, processing_class=self.tokenizer, **copy.deepcopy(given))


@pytest.fixture(scope="module")
def models(shared, tmp_path_factory) -> Models:
    from transformers import AutoTokenizer

    folder = str(shared / "weights" / "stories260K-hf")
    clean, noisy = (load_base(folder, "float32", "cpu") for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in noisy.hf.parameters():
            parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.unk_token  # not its end: TRL reads rewards from the last token that is no padding
    return Models(clean, noisy, tokenizer, tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def texts(shared) -> list[dict[str, Any]]:
    """Beginnings of pairs; the answers of all but one change places, so that some are won and some lost."""
    with gzip.open(shared / "tinystories" / "pref.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in itertools.islice(lines, ROWS)]
    found = []
    for number, pair in enumerate(pairs):
        answers = pair["chosen"][:150], pair["rejected"][: 80 + 50 * number]
        chosen, rejected = answers if number == 0 else answers[::-1]
        found.append({"prompt": pair["prompt"][-1]["content"], "chosen": chosen, "rejected": rejected})
    return found


def sequence(tokens: list[int], first: int) -> TokenSequence:
    return TokenSequence(np.array(tokens), (np.arange(len(tokens)) >= first).astype(np.float32))


def ours(
    goal: Objective, examples: list[Example], policy: LanguageModel, parent: LanguageModel
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and what the log says of it."""
    forest = lay_out(examples)
    with policy.laid_out("forest"), parent.laid_out("forest"):
        if goal.first is not None:
            others = [lay_out([e]) for e in goal.first.examples(examples)]
            goal = goal.first.known(policy.logprob, parent.logprob, others)
        with torch.no_grad():
            before = parent.logprob(forest) if goal.needs_reference else None
        result = goal.compute(policy.logprob(forest), forest, before)
    said = Sums()
    said.add(result, goal.weight(forest))
    return result.sum / goal.weight(forest), said.means()


def assert_same(
    loss: Tensor, model: nn.Module, expected: Tensor, theirs: nn.Module, within: float = GRADIENT_WITHIN
) -> None:
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=LOSS_WITHIN)
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights)
    other = torch.autograd.grad(expected, [theirs.get_parameter(n) for n in names])
    for name, a, b in zip(names, found, other, strict=True):
        largest = float(b.abs().max())
        assert largest > 1e-6, f"{name} has no gradient to compare"
        assert float((a - b).abs().max()) <= within * largest, name


def assert_logged(said: dict[str, float], logged: dict[str, float], beta: float, names: Any = LOGGED) -> None:
    """Of a gain, the difference of two sums over an answer, float32 has 1e-4 exactly."""
    for name in names:
        assert said[LOGGED[name]] == pytest.approx(logged[name], rel=1e-5, abs=1e-4 * beta), name


# --- pairs against a parent


@pytest.fixture(scope="module")
def dpo_trainer(models, texts) -> Any:
    from trl import DPOConfig, DPOTrainer

    return models.trainer(DPOTrainer, DPOConfig, texts)


def set_as(trainer: Any, settings: Settings) -> None:
    """Our settings in TRL's names: all that its loss reads."""
    mixed = {TRLS_NAMES.get(n, n): share for n, share in shares(settings["loss"]).items()}
    if "sft_weight" in settings:
        mixed["sft"] = settings["sft_weight"]
    divergence = settings.get("divergence", "reverse_kl")
    trainer.loss_types, trainer.loss_weights = list(mixed), list(mixed.values())
    trainer.beta, trainer.ld_alpha = settings["beta"], settings.get("ld_alpha")
    trainer.label_smoothing = settings.get("label_smoothing", 0.0)
    trainer.f_divergence_type = TRLS_NAMES.get(divergence, divergence)
    trainer.f_alpha_divergence_coef = settings.get("divergence_alpha")


def trls(trainer: Any, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and what TRL logs of it."""
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    return loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()}


def pair(row: dict[str, list[int]]) -> Example:
    prompt, answers = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    return Example(tuple(sequence([*prompt, *answer], len(prompt)) for answer in answers), scores=(1.0, -1.0))


def assert_as_dpo_trainer(
    models: Models, trainer: Any, settings: Settings, rows: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Loss and gradients are the same; what both log of them."""
    goal = objective(settings)
    loss, said = ours(goal, [pair(r) for r in rows], models.noisy, models.clean)
    assert goal.at_start is not None
    assert said[goal.at_start_of] != pytest.approx(goal.at_start, rel=1e-2), "it says little where little has changed"
    expected, logged = trls(trainer, rows)
    within = GRADIENT_WITHIN * (3 if settings.get("divergence") == "forward_kl" else 1)
    assert_same(loss, models.noisy.hf, expected, trainer.model, within)
    return said, logged


LOSSES: list[Settings] = [
    {"loss": "dpo", "beta": 0.3},
    {"loss": "hinge", "beta": 0.3},
    {"loss": "ipo", "beta": 2.0},
    {"loss": "exo", "beta": 0.3, "label_smoothing": 1e-3},
    {"loss": "nca", "beta": 0.3},
    {"loss": "robust", "beta": 0.3, "label_smoothing": 0.1},
    {"loss": "bco", "beta": 0.3},
    {"loss": "apo_zero", "beta": 1.0},
    {"loss": "apo_down", "beta": 0.3},
    {"loss": "dpo_norm", "beta": 10.0},
]
DIVERGENCES: list[Settings] = [
    {"divergence": "forward_kl"},
    {"divergence": "js"},
    {"divergence": "alpha", "divergence_alpha": 0.5},
    {"divergence": "alpha", "divergence_alpha": 1.0},
]
CASES = [
    *LOSSES,
    *(
        {**loss, **divergence}
        for loss in LOSSES
        if "divergence" in OBJECTIVES[loss["loss"]].settings
        for divergence in DIVERGENCES
    ),
    *({**loss, "ld_alpha": 0.3} for loss in LOSSES),
    {"loss": "dpo", "beta": 0.5, "ld_alpha": 0.3, "divergence": "js"},
    {"loss": {"dpo": 1.0, "hinge": 0.5}, "beta": 0.3},
    {"loss": {"apo_zero": 0.5, "robust": 1.5}, "beta": 0.3, "label_smoothing": 0.2},
]


def told(settings: Settings) -> str:
    return " ".join(f"{value}" for value in settings.values())


@pytest.mark.parametrize("settings", CASES, ids=told)
def test_a_loss_against_the_parent(models, dpo_trainer, settings):
    set_as(dpo_trainer, settings)
    said, logged = assert_as_dpo_trainer(models, dpo_trainer, settings, list(dpo_trainer.train_dataset))
    if settings["loss"] not in PER_TOKEN:
        assert 0 < logged["rewards/accuracies"] < 1
        assert_logged(said, logged, settings["beta"], REWARDS if "ld_alpha" in settings else LOGGED)


@pytest.mark.parametrize("settings", [s for s in LOSSES if s["loss"] in PER_TOKEN], ids=told)
def test_rewards_of_losses_per_token_are_trls_over_the_tokens(models, dpo_trainer, settings):
    set_as(dpo_trainer, settings)
    for row in dpo_trainer.train_dataset:
        _, logged = trls(dpo_trainer, [row])
        _, said = ours(objective(settings), [pair(row)], models.noisy, models.clean)
        for side in ("chosen", "rejected"):
            whole = said[f"reward_{side}"] * len(row[f"{side}_ids"])
            assert whole == pytest.approx(logged[f"rewards/{side}"], rel=1e-5, abs=1e-4 * settings["beta"])


@pytest.mark.parametrize("more", [{}, {"ld_alpha": 0.3}], ids=told)
def test_next_token_prediction_beside_a_loss(models, dpo_trainer, more):
    """Row by row: TRL takes the mean over the tokens of a batch, we that over its rows."""
    settings = {"loss": "dpo", "beta": 1.0, "sft_weight": 0.7, **more}
    set_as(dpo_trainer, settings)
    for row in dpo_trainer.train_dataset:
        said, _ = assert_as_dpo_trainer(models, dpo_trainer, settings, [row])
        assert said["sft_loss"] > 0.1


def test_smoothed_dpo_is_trls_aot_on_one_pair(models, dpo_trainer):
    """TRL's sigmoid has no label smoothing. Its AOT has: it compares sorted answers, and of one there is no order."""
    settings = {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.2}
    set_as(dpo_trainer, settings)
    dpo_trainer.loss_types = ["aot"]
    for row in dpo_trainer.train_dataset:
        said, logged = assert_as_dpo_trainer(models, dpo_trainer, settings, [row])
        assert_logged(said, logged, settings["beta"])


# --- ratings


@pytest.mark.parametrize("good", [(True, True, True, False), (False, True, False, False)])
@pytest.mark.parametrize("policy", ["noisy", "clean"])
def test_kto(models, texts, policy, good):
    """A noisy policy has lost on its parent, so that its baseline is 0; a clean one has won on a noisy parent."""
    from trl import KTOConfig, KTOTrainer

    settings = {"loss": "kto", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5}
    weights = {name: value for name, value in settings.items() if name != "loss"}
    mine, parent = (models.noisy, models.clean) if policy == "noisy" else (models.clean, models.noisy)
    rated = zip(texts, good, strict=True)
    rows = [{"prompt": t["prompt"], "completion": t["rejected"], "label": label} for t, label in rated]
    trainer = models.trainer(KTOTrainer, KTOConfig, rows, model=mine.hf, ref_model=parent.hf, **weights)
    rows = list(trainer.train_dataset)
    longest = max(len(r["prompt_ids"] + r["completion_ids"]) for r in rows)
    assert any(len(r["prompt_ids"] + r["KL_completion_ids"]) > longest for r in rows)
    trainer.data_collator.max_length = longest
    expected, logged = trls(trainer, rows)

    def rating(row: dict[str, Any]) -> Example:
        tokens = sequence(row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"]))
        return Example((tokens,), scores=(1.0 if row["label"] else -1.0,))

    loss, said = ours(objective(settings), [rating(r) for r in rows], mine, parent)
    assert_same(loss, mine.hf, expected, trainer.model)
    assert_logged(said, logged, settings["beta"], BY_SIDE)
    assert said["baseline"] == pytest.approx(settings["beta"] * logged["kl"], rel=1e-4)
    assert logged["kl"] == 0 if policy == "noisy" else logged["kl"] > 0.1


# --- pairs without a parent


def free_pair(row: dict[str, list[int]]) -> Example:
    """Of rows as the trainers of CPO and ORPO make them."""
    answers = [(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected")]
    return Example(tuple(sequence(tokens, labels.count(-100)) for tokens, labels in answers), scores=(1.0, -1.0))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"loss": "simpo", "beta": 2.0, "gamma": 1.0}, {"loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
        ({"loss": "simpo", "beta": 10.0, "gamma": 3.0}, {"loss_type": "simpo", "simpo_gamma": 3.0, "cpo_alpha": 0.0}),
        ({"loss": "cpo", "beta": 0.1, "sft_weight": 0.0}, {"loss_type": "sigmoid", "cpo_alpha": 0.0}),
        (
            {"loss": "cpo", "beta": 0.1, "label_smoothing": 0.2, "sft_weight": 0.0},
            {"loss_type": "sigmoid", "cpo_alpha": 0.0, "label_smoothing": 0.2},
        ),
    ],
    ids=told,
)
def test_simpo_and_cpo(models, texts, settings, theirs):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = models.trainer(CPOTrainer, CPOConfig, texts, beta=settings["beta"], **theirs)
    rows = list(trainer.train_dataset)
    expected, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows))
    loss, said = ours(objective(settings), [free_pair(r) for r in rows], models.noisy, models.clean)
    assert_same(loss, models.noisy.hf, expected, trainer.model)
    assert_logged(said, logged, settings["beta"], REWARDS)


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_cpo_with_its_next_token_prediction(models, texts, weight):
    """Row by row: TRL takes the mean over the tokens of a batch, we that over its rows."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = models.trainer(CPOTrainer, CPOConfig, texts, beta=0.1, loss_type="sigmoid", cpo_alpha=weight)
    settings = {"loss": "cpo", "beta": 0.1} | ({"sft_weight": weight} if weight != 1 else {})
    for row in trainer.train_dataset:
        expected, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator([row]))
        loss, said = ours(objective(settings), [free_pair(row)], models.noisy, models.clean)
        assert_same(loss, models.noisy.hf, expected, trainer.model)
        assert said["sft_loss"] == pytest.approx(logged["nll_loss"], rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(models, texts, beta):
    """TRL's next-token prediction is on the prompt too: here it is what is left out."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = models.trainer(ORPOTrainer, ORPOConfig, texts, beta=beta)
    rows = list(trainer.train_dataset)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, trainer.data_collator(rows))
    losses, chosen_rewards, rejected_rewards, *_ = trainer.odds_ratio_loss(chosen, rejected)
    goal = objective({"loss": "orpo", "beta": beta, "sft_weight": 0.0})
    loss, said = ours(goal, [free_pair(r) for r in rows], models.noisy, models.clean)
    assert_same(loss, models.noisy.hf, -losses.mean(), trainer.model)
    assert said["reward_chosen"] == pytest.approx(float(chosen_rewards.mean()), rel=1e-5)
    assert said["reward_rejected"] == pytest.approx(float(rejected_rewards.mean()), rel=1e-5)


def test_orpo_with_its_next_token_prediction(models, texts):
    """Of a prompt of one token TRL's is on the answer alone."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = models.trainer(ORPOTrainer, ORPOConfig, [{**t, "prompt": ""} for t in texts], beta=0.5)
    for row in trainer.train_dataset:
        assert len(row["prompt_input_ids"]) == 1
        expected, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator([row]))
        loss, said = ours(objective({"loss": "orpo", "beta": 0.5}), [free_pair(row)], models.noisy, models.clean)
        assert_same(loss, models.noisy.hf, expected, trainer.model)
        assert said["sft_loss"] == pytest.approx(logged["nll_loss"], rel=1e-5)
        assert_logged(said, logged, 0.5, REWARDS)


# --- rewards


@pytest.mark.parametrize("centre", [None, 0.01, 0.5])
@pytest.mark.parametrize("margins", [None, (0.0, 0.5, 1.0, 3.0)])
def test_bradley_terry(models, shared, texts, centre, margins):
    """Rewards are those of the real model with a new head, sequence by sequence."""
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    mine = AutoModelForSequenceClassification.from_pretrained(shared / "weights" / "stories260K-hf", num_labels=1)
    with torch.no_grad():
        mine.score.weight.mul_(20)
    mine.eval()
    rows = [{**t, "margin": m} for t, m in zip(texts, margins, strict=True)] if margins else texts
    trainer = models.trainer(RewardTrainer, RewardConfig, rows, model=mine, center_rewards_coefficient=centre)
    rows = list(trainer.train_dataset)
    trainer.model.eval()
    expected, logged = trls(trainer, rows)

    def example(row: dict[str, Any]) -> Example:
        ends = [sequence(row[side], len(row[side]) - 1) for side in ("chosen_ids", "rejected_ids")]
        return Example(tuple(ends), scores=(1.0, -1.0), margin=row.get("margin", 0.0))

    forest = lay_out([example(r) for r in rows])
    sequences = [s.tokens for e in forest.examples for s in e.sequences]
    rewards = torch.cat([mine(torch.from_numpy(tokens)[None]).logits[:, 0] for tokens in sequences])
    goal = objective({"loss": "bradley_terry", "center_rewards": centre})
    result = goal.compute(rewards, forest, None)
    assert_same(result.sum / goal.weight(forest), mine, expected, trainer.model)
    said = Sums()
    said.add(result, goal.weight(forest))
    means = said.means()
    assert abs(means["margin"]) > 0.1
    assert 0 < means["accuracy"] < 1
    assert means["accuracy"] == logged["accuracy"]
    assert means["margin"] == pytest.approx(logged["margin"], rel=1e-5)
