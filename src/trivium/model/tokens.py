"""ChatML's markers as single tokens, for a base model that has never seen a chat."""

from __future__ import annotations

import torch

from trivium.model.language_model import LanguageModel

MARKERS = ("<|im_start|>", "<|im_end|>")


def add_chat_tokens(model: LanguageModel, seed: int) -> int:
    """Add ChatML's tokens where the tokenizer has neither them nor a template; returns how many were added.

    The new rows of the embedding start near the mean of the others. They mean nothing until they are trained.
    """
    from tokenizers import AddedToken

    tokenizer = model.tokenizer
    if tokenizer.chat_template or all(m in tokenizer.get_vocab() for m in MARKERS):
        return 0
    added = int(
        tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS], special_tokens=True)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if len(tokenizer) > model.hf.get_input_embeddings().weight.shape[0]:
            model.hf.resize_token_embeddings(len(tokenizer))
    return added
