"""A reward model against transformers' own sequence-classification models; its padding; its start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from trivium.data.templates import chat_template
from trivium.errors import ModelError
from trivium.evaluate.score import by_sequence, rewarded, rewards
from trivium.folder import open_folder, save_model
from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.load import wrap
from trivium.model.reward import SCORE, as_reward_model, padding_of
from trivium.virtual import NEW_HEADS

END = "<|endoftext|>"
TEXTS = ["hello there! a red cat, a blue dog.", "Is it red?! No, blue...", "one two three hello! hello!"]
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
KINDS = {
    "llama": ("llama", COMMON),
    "qwen3": ("qwen3", COMMON),
    "gemma3": ("gemma3_text", {**COMMON, "sliding_window": 16}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
}
ROWS = [
    [{"role": "user", "content": "a red cat, a blue dog, a red cat?"}, {"role": "assistant", "content": said}]
    for said in ("blue", "red! red!", "hello there", "No, blue...", "!")
]  # fmt: skip
ROWS += [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one two three " * 4}]]


@pytest.fixture(scope="module")
def bpe():
    """Of bytes, as GPT-2's: the one control token ends documents, begins them, and is all else, too."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS * 9, trainer)
    made.add_special_tokens([END])
    return made


@pytest.fixture
def language_model(bpe):
    """``language_model("llama", pad_token=...)``: tiny, of random weights, always the same ones."""

    def build(kind="llama", **special):
        named = {"eos_token": END, "bos_token": END, "unk_token": END, **special}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), **named)
        family, values = KINDS[kind]
        config = AutoConfig.for_model(family, initializer_range=0.2, vocab_size=len(tokenizer), **values)
        torch.manual_seed(1)
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        return wrap(hf, tokenizer, "float32", torch.float32)

    return build


def read_by(model, messages):
    """The tokens that a reward model reads."""
    return rewarded(model, messages).inputs.tolist()


def saved(model, folder):
    save_model(model, folder, chat_template(model.tokenizer))
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_shared_rewards_are_those_of_transformers(language_model, tmp_path, kind):
    model = as_reward_model(language_model(kind), seed=3)
    found = rewards(model, ROWS)
    assert len({round(r, 3) for r in found}) == len(found), "rows that differ have rewards that differ"
    theirs = saved(model, tmp_path)
    with torch.no_grad():
        alone = [float(theirs(torch.tensor([read_by(model, row)])).logits) for row in ROWS]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=1e-5, atol=1e-5)

    tokens = [rewarded(model, row) for row in ROWS]
    forest = lay_out([Example(tuple(tokens))])
    assert len(forest.tokens) < sum(len(t.inputs) for t in tokens), "the prompt is read once"
    apart = lay_out([Example(tuple(tokens))], share=False)
    with model.laid_out("forest"), torch.no_grad():
        torch.testing.assert_close(model.logprob(forest), torch.tensor(alone), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.logprob(apart), torch.tensor(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("special", [{}, {"pad_token": END}, {"unk_token": "<unk>"}, {"pad_token": "<pad>"}])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_padded_by_transformers_get_the_same(language_model, tmp_path, kind, special):
    """The folder's own tokenizer and config, as anyone would use them."""
    if new := [name for name in special.values() if name != END]:
        # a name that the tokenizer has, and that is no end
        special = {key: "<new>" if name in new else name for key, name in special.items()}
        model = language_model(kind, additional_special_tokens=["<new>"])
        model.hf.resize_token_embeddings(len(model.tokenizer))
        for key, name in special.items():
            setattr(model.tokenizer, key, name)
    else:
        model = language_model(kind, **special)
    model = as_reward_model(model, seed=3)
    theirs = saved(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    template = chat_template(tokenizer)
    assert tokenizer.pad_token_id == theirs.config.pad_token_id == model.tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in template.stop_ids | {tokenizer.eos_token_id}
    ids = [read_by(model, row) for row in ROWS]
    assert {row[-1] for row in ids} <= template.stop_ids, "what is read ends with the end of the turn"
    assert len({len(row) for row in ids}) > 2
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        padded = theirs(**batch).logits[:, 0]
    torch.testing.assert_close(padded, torch.tensor(rewards(model, ROWS)), rtol=1e-5, atol=1e-5)


def test_padding_leaves_texts_as_they_were(language_model, tmp_path):
    """A pad token is looked for in texts by its name, so it must be none that texts hold."""
    base = language_model()
    model = as_reward_model(base, seed=0)
    assert base.tokenizer.pad_token is None, "the language model's own tokenizer stays as it was"
    words = "hello there! !!! a red cat ? ... Ġred one\n two " + " ".join(TEXTS)
    texts = [words, *words.split(), *(chr(n) for n in range(32, 600))]
    known = {text: base.tokenizer(text)["input_ids"] for text in texts}
    saved(model, tmp_path)
    for tokenizer in (model.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text, ids in known.items():
            assert tokenizer(text)["input_ids"] == ids, text
            assert tokenizer.decode(ids) == text
    assert rewards(open_folder(str(tmp_path)).model, ROWS) == rewards(model, ROWS)


def test_the_padding_is_the_tokenizers_own_where_that_ends_nothing(language_model):
    model = language_model(additional_special_tokens=["<one>", "<two>"])
    model.tokenizer.pad_token = "<two>"
    assert padding_of(model.tokenizer) == model.tokenizer.convert_tokens_to_ids("<two>")
    model.tokenizer.pad_token = END
    assert padding_of(model.tokenizer) == model.tokenizer.convert_tokens_to_ids("<one>")


@pytest.mark.parametrize("kind", KINDS)
def test_the_body_is_shared_and_nothing_of_the_base_changes(language_model, kind):
    base = language_model(kind)
    before = {name: p.clone() for name, p in base.hf.named_parameters()}
    config = base.hf.config.to_dict()
    model = as_reward_model(base, seed=0)
    own = {id(p) for p in base.hf.base_model.parameters()}
    assert {id(p) for p in model.hf.parameters()} == own | {id(model.hf.score.weight)}
    assert model.gives_rewards
    assert getattr(model.hf, NEW_HEADS) == (SCORE,)
    assert not base.gives_rewards
    assert base.hf.config.to_dict() == config
    assert all(torch.equal(p, before[name]) for name, p in base.hf.named_parameters())
    assert not any(p.is_meta for p in model.hf.parameters())
    assert model.parameters() == sum(p.numel() for p in base.hf.base_model.parameters()) + 32


def test_the_same_seed_is_the_same_start(language_model):
    base = language_model()
    first, again, other = (as_reward_model(base, seed=seed).hf.score.weight for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert as_reward_model(as_reward_model(base, 5), 6).hf.score.weight.equal(first), "a reward model stays as it is"
    half = language_model()
    half.hf.to(torch.bfloat16)
    assert torch.equal(as_reward_model(half, 5).hf.score.weight, first.bfloat16())


def test_the_start_has_the_variance_that_it_says():
    from trivium.model.reward import _new_score

    score = _new_score(torch.nn.Linear(4095, 2), torch.nn.Linear(2, 2), seed=0)
    assert score.weight.shape == (1, 4095)
    assert float(score.weight.detach().var() * 4096) == pytest.approx(1, abs=0.1)
    assert not score.bias.any()


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_an_architecture_without_such_a_model_is_refused(language_model, family):
    tokenizer = language_model().tokenizer
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), pad_token_id=0, **COMMON)
    with pytest.raises(ValueError, match="Unrecognized configuration"), torch.device("meta"):
        AutoModelForSequenceClassification.from_config(config)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="no sequence-classification model of this architecture") as raised:
        as_reward_model(wrap(hf, tokenizer, "float32", torch.float32), seed=0)
    assert raised.value.what.startswith(type(hf).__name__)
    assert "another base" in raised.value.remedy


def test_a_language_model_gives_no_rewards(language_model):
    with pytest.raises(ModelError, match="gives no rewards"):
        rewards(language_model(), ROWS)


def test_a_classifier_of_more_labels_is_refused(language_model, tmp_path):
    model = language_model()
    config = AutoConfig.for_model("llama", vocab_size=len(model.tokenizer), num_labels=3, **COMMON)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="classifier of 3 labels"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_classifier_that_is_no_decoder_is_refused(language_model, tmp_path, family):
    """DeBERTa, BERT and their like are reward models, too, but read both ways, and have another readout."""
    tokenizer = language_model().tokenizer
    sizes = {name: COMMON[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), num_labels=1, num_hidden_layers=1, pad_token_id=0, **sizes
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="ForSequenceClassification"):
        rewards(open_folder(str(tmp_path)).model, ROWS)


def test_a_reward_model_that_others_made_is_read(language_model, tmp_path):
    """Of one label, with a bias-free score: without trivium.json, without a padding token."""
    model = language_model()
    config = AutoConfig.for_model("qwen3", vocab_size=len(model.tokenizer), num_labels=1, **COMMON)
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    opened = open_folder(str(tmp_path)).model
    with torch.no_grad():
        alone = [float(theirs(torch.tensor([read_by(opened, row)])).logits) for row in ROWS]
    torch.testing.assert_close(torch.tensor(rewards(opened, ROWS)), torch.tensor(alone), rtol=1e-5, atol=1e-5)


def test_the_last_state_is_read_and_what_comes_after_it_is_not(language_model):
    model = as_reward_model(language_model(), seed=0)
    tokens = rewarded(model, ROWS[0])
    other = TokenSequence(np.append(tokens.tokens[:-1], 7), tokens.weights)
    (one,), (two,) = by_sequence(model, [Example((tokens,)), Example((other,))])
    assert one == two
