"""A reward model: a language model's body with one number read from the state after the last token.

    model = as_reward_model(model, seed=0)       # the body itself, no copy; a new readout in place of the head

It is a `transformers` sequence-classification model of one label, and is saved as one. Its readout starts as
N(0, 1 / (D + 1)) (Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B.1).

`transformers` reads the last token that is not padding, so that the padding token must be none that ends a sequence.

Shapes:  D width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from trivium.errors import ModelError
from trivium.model.language_model import LanguageModel
from trivium.virtual import NEW_HEADS

SCORE = "score"


def check_rewards(model: LanguageModel) -> None:
    """A reward model can be made of it; raises ModelError."""
    from transformers import AutoModelForSequenceClassification

    if type(model.hf.config) not in AutoModelForSequenceClassification._model_mapping:
        raise _no_such_model(model)


def as_reward_model(model: LanguageModel, seed: int) -> LanguageModel:
    """The same body as a reward model; one that is a reward model already stays as it is.

    Raises ModelError for an architecture of which `transformers` has no sequence-classification model.
    """
    from transformers import AutoModelForSequenceClassification

    if model.gives_rewards:
        return model
    config = copy.deepcopy(model.hf.config)
    config.num_labels = 1
    tokenizer = copy.deepcopy(model.tokenizer)
    filler = tokenizer.convert_ids_to_tokens(padding_of(tokenizer))
    tokenizer.add_special_tokens({"pad_token": filler})  # as one that is read from a folder has it
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.pad_token_id = tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError):
        raise _no_such_model(model) from None
    prefix, body = made.base_model_prefix, model.hf.base_model
    if type(getattr(made, prefix, None)) is not type(body) or not isinstance(getattr(made, SCORE, None), nn.Linear):
        raise _no_such_model(model)
    setattr(made, prefix, body)
    made.score = _new_score(made.score, body, seed)
    made.eval()
    setattr(made, NEW_HEADS, (SCORE,))
    return replace(model, hf=made, tokenizer=tokenizer, _readout=None)


def _no_such_model(model: LanguageModel) -> ModelError:
    what = f"{type(model.hf).__name__}: transformers has no sequence-classification model of this architecture"
    return ModelError(what, "train the reward model on another base")


def _new_score(score: nn.Linear, body: Any, seed: int) -> nn.Linear:
    like = next(body.parameters())
    made = nn.Linear(score.in_features, 1, bias=score.bias is not None, device=like.device, dtype=like.dtype)
    drawn = torch.randn(1, score.in_features, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.weight.copy_(drawn / (score.in_features + 1) ** 0.5)
        if made.bias is not None:
            made.bias.zero_()
    return made


def padding_of(tokenizer: Any) -> int:
    """A token to fill rows with that ends no sequence.

    Where no control token is one, it is one of the vocabulary that no text has by its name ("Ġhello" for " hello"):
    the name of a padding token is cut out of texts before they are read.
    """
    from trivium.data.templates import chat_template

    ends = chat_template(tokenizer).stop_ids | {tokenizer.eos_token_id}
    usual = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *sorted(tokenizer.all_special_ids))
    if (found := next((n for n in usual if n is not None and n not in ends), None)) is not None:
        return int(found)
    known = tokenizer.get_vocab()
    named = sorted(known, key=lambda name: (-len(name), name))
    others = (known[name] for name in named if tokenizer.decode([known[name]]) != name)
    return int(next((n for n in chain(others, range(len(tokenizer))) if n not in ends), 0))
