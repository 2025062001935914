"""A tokenizer of one's own: byte-level BPE with one stop token, for models pretrained from nothing.

    tokenizer = train_tokenizer(texts, vocab_size=4096)
    tokenizer.save_pretrained(folder)

Any text comes back exactly, byte for byte; the same texts give the same file. ``<|end|>`` ends documents and turns
alike, so that a pretrained model already knows the token with which its answers will stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL = (PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>")
SMALLEST = 256 + len(SPECIAL)

# A tool's answer is told to the model as the user's message: there is no marker of its own for it.
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- elif message['role'] == 'system' %}{{ '<|system|>' + message['content'] + eos_token }}
{%- elif message['role'] in ('user', 'tool') %}{{ '<|user|>' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('no such role: ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary of at most ``vocab_size`` tokens, the special ones included.

    Raises DataError where ``vocab_size`` leaves no room for the bytes, or there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small",
            f"give {SMALLEST} or more: 256 bytes and {len(SPECIAL)} special tokens",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_some(texts), trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        # The model's context is the limit that counts; without this, 10^30 is written, which some tools cannot read.
        model_max_length=1 << 20,
    )
    fast.chat_template = TEMPLATE
    return fast


def _some(texts: Iterable[str]) -> Iterator[str]:
    """The texts; DataError where there are none."""
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise DataError("no text to train a tokenizer on", "give at least one row with text")
