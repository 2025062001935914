"""Answers: `transformers`' greedy search, stop tokens, whole characters, seeds; and a real model's known numbers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from trivium.errors import ModelError
from trivium.forest import Example, TokenSequence, lay_out
from trivium.model import generate as generation
from trivium.model.generate import generate, generate_many
from trivium.model.language_model import LanguageModel
from trivium.model.load import load_base, wrap
from trivium.model.new import new_model
from trivium.talk import Talker

FAMILIES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "gemma3_text": {
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {},
    "lfm2": {"num_key_value_heads": 2, "intermediate_size": 48, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
PROMPT = [1, 17, 33, 8, 25, 40, 2, 9]
NO_STOP: frozenset[int] = frozenset()


def tiny(name: str, tokenizer: object = None, context: int = 64) -> LanguageModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    sizes |= {"max_position_embeddings": context, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    sizes["tie_word_embeddings"] = False  # a tied head of random weights repeats the last token
    hf = new_model(AutoConfig.for_model(name, **sizes, **FAMILIES[name]), seed=1).eval()
    hf.generation_config.eos_token_id = None  # else it ends where the comparison goes on
    return wrap(hf, tokenizer, "float32", torch.float32)


@pytest.fixture(scope="module")
def stories(shared) -> LanguageModel:
    return load_base(str(shared / "weights" / "stories260K-hf"), "float32", "cpu")


# --- a real model


def test_a_real_models_known_numbers(stories, shared):
    golden = json.loads((shared / "weights" / "stories260K-hf" / "golden.json").read_text())
    ids, tokenizer = golden["ids"], stories.tokenizer
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] == ids
    with torch.no_grad():
        logits = stories.hf(torch.tensor([ids])).logits[0]
    assert logits.argmax(-1).tolist() == golden["argmax"]
    assert logits[-1, :8].tolist() == pytest.approx(golden["last_logits_first8"], abs=1e-4)


def test_a_real_models_log_probabilities(stories, shared):
    """The known numbers once more, through the forest: differences of log-probabilities are those of logits."""
    golden = json.loads((shared / "weights" / "stories260K-hf" / "golden.json").read_text())
    ids = golden["ids"]
    rows = [[*ids, best] for best in range(8)]  # every candidate behind the same beginning
    weights = [0.0] * len(ids) + [1.0]
    examples = [Example((TokenSequence(torch.tensor(r).numpy(), torch.tensor(weights).numpy()),)) for r in rows]
    with torch.no_grad(), stories.laid_out("forest"):
        found = stories.logprob(lay_out(examples))
    expected = torch.tensor(golden["last_logits_first8"])
    assert (found - found[0]).tolist() == pytest.approx((expected - expected[0]).tolist(), abs=1e-4)


# --- greedy


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_transformers_greedy(name):
    model = tiny(name)
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.hf.generate(torch.tensor([PROMPT]), generation_config=config)[0, len(PROMPT) :].tolist()
    assert list(generate(model, PROMPT, 30, NO_STOP)) == expected
    assert len(set(expected)) > 3, "a model that repeats one token shows little"


def test_greedy_on_a_real_model(stories):
    ids = [1, *stories.tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]
    config = GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = stories.hf.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
    assert list(generate(stories, ids, 40, NO_STOP)) == expected
    talker = Talker(stories, None, NO_STOP)
    assert talker.raw_prompt("Once upon a time") == ids
    text = "".join(talker.stream(ids, 40))
    assert text == stories.tokenizer.decode(expected, skip_special_tokens=True)
    assert "little girl" in text


# --- where it ends


def test_a_stop_token_ends_it_and_is_not_part_of_it():
    model = tiny("llama")
    free = list(generate(model, PROMPT, 30, NO_STOP))
    stop = free[7]
    assert list(generate(model, PROMPT, 30, frozenset({stop, 999}))) == free[: free.index(stop)]


def test_as_many_as_asked_and_never_past_the_context():
    model = tiny("llama", context=20)
    assert len(list(generate(model, PROMPT, 5, NO_STOP))) == 5
    assert list(generate(model, PROMPT, 0, NO_STOP)) == []
    assert len(list(generate(model, PROMPT, 1000, NO_STOP))) == 20 - len(PROMPT)
    with pytest.raises(ModelError, match="20 tokens, the model's context is 20"):
        next(generate(model, list(range(20)), 5, NO_STOP))
    with pytest.raises(ModelError, match="prompt is empty"):
        next(generate(model, [], 5, NO_STOP))


# --- sampling


def test_a_seed_repeats_an_answer_and_another_does_not():
    model = tiny("llama")

    def sample(seed: int, temperature: float = 1.0) -> list[int]:
        return list(generate(model, PROMPT, 20, NO_STOP, temperature, seed))

    torch.manual_seed(1)
    one = sample(0)
    torch.manual_seed(2)
    assert sample(0) == one, "the global generator has no part in it"
    assert len({tuple(sample(seed)) for seed in range(6)}) == 6
    assert sample(5, 1e-4) == list(generate(model, PROMPT, 20, NO_STOP)), "a low temperature is greedy"


def test_samples_follow_the_models_probabilities():
    model = tiny("llama")
    with torch.no_grad():
        expected = (model.hf(torch.tensor([PROMPT])).logits[0, -1] / 2.0).softmax(-1)
    drawn = torch.tensor([next(generate(model, PROMPT, 1, NO_STOP, 2.0, seed)) for seed in range(600)])
    found = torch.bincount(drawn, minlength=64) / 600
    assert (found - expected).abs().max() < 0.06
    assert float(expected.max()) < 0.7


# --- streaming


class Bytes:
    """A tokenizer with one token per byte, as byte-level ones are for rare characters."""

    bos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def spoken(text: bytes, stop: int = 0) -> LanguageModel:
    """A model that says ``text`` and then its stop token, whatever it is asked."""
    place = [0]

    def forward(**_: object) -> SimpleNamespace:
        logits = torch.full((1, 1, 256), -10.0)
        logits[0, 0, (*text, stop)[place[0]]] = 10.0
        place[0] += 1
        return SimpleNamespace(logits=logits, past_key_values=None)

    class Hf:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=500))

        def parameters(self):
            return iter([torch.zeros(1)])

        def get_input_embeddings(self):
            return torch.nn.Embedding(300, 1)

        def __call__(self, **kwargs: object) -> SimpleNamespace:
            return forward(**kwargs)

    return LanguageModel(Hf(), Bytes(), torch.float32, torch.float32)


def test_only_whole_characters_are_shown():
    text = "Grün 茶, 🙂!"
    pieces = list(Talker(spoken(text.encode()), None, frozenset({0})).stream([65], 100))
    assert pieces == list(text)


def test_a_character_that_never_ends_is_not_shown():
    cut = "ab茶".encode()[:-1]
    assert "".join(Talker(spoken(cut), None, frozenset({0})).stream([65], 100)) == "ab"
    # what is left of a broken character does not hold back what follows it
    broken = "茶".encode()[:2] + b"cd"
    assert "".join(Talker(spoken(broken), None, frozenset({0})).stream([65], 100)) == "\ufffdcd"


def test_a_documents_prompt_begins_as_documents_do(stories):
    assert Talker(spoken(b""), None, NO_STOP).raw_prompt("hé") == [104, 195, 169]
    assert Talker(stories, None, NO_STOP).raw_prompt("The")[0] == stories.tokenizer.bos_token_id


# --- many side by side

LENGTHS = (8, 3, 12, 1, 6, 8, 20)


def prompts(vocabulary: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", FAMILIES)
def test_many_prompts_get_what_each_gets_alone(name, temperature):
    model = tiny(name)
    stop = frozenset({5, 11, 29})  # so that rows end at different times, and leave
    alone = [list(generate(model, ids, 25, stop, temperature, 7 + n)) for n, ids in enumerate(prompts())]
    assert generate_many(model, prompts(), 25, stop, temperature, 7) == alone
    assert len({len(found) for found in alone}) > 1, "rows of one length show little"


@pytest.mark.parametrize("name", FAMILIES)
def test_several_answers_to_each_prompt(name):
    model, stop = tiny(name), frozenset({5, 11, 29})
    repeated = [ids for ids in prompts() for _ in range(3)]
    expected = generate_many(model, repeated, 12, stop, 0.8, 7)
    assert generate_many(model, prompts(), 12, stop, 0.8, 7, samples=3) == expected
    assert len(set(map(tuple, expected[:3]))) > 1, "each draws by itself"


def test_a_prompt_of_several_answers_is_read_once(monkeypatch):
    model, sizes = tiny("llama"), []
    forward = generation._forward
    monkeypatch.setattr(
        generation, "_forward", lambda m, t, *more: sizes.append(tuple(t["input_ids"].shape)) or forward(m, t, *more)
    )
    generate_many(model, prompts()[:1], 4, NO_STOP, 0.8, samples=5)
    assert sizes == [(1, LENGTHS[0]), *[(5, 1)] * 3]


@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_filled_prompts_are_answered_together(name, monkeypatch):
    """What is fast is used: one pass a token for all rows, fewer of them as rows end."""
    model, sizes = tiny(name), []
    forward = generation._forward

    def counted(model, tokens, mask, cache):
        sizes.append(tuple(tokens["input_ids"].shape))
        return forward(model, tokens, mask, cache)

    monkeypatch.setattr(generation, "_forward", counted)
    found = generate_many(model, prompts(), 25, frozenset({5, 11, 29}))
    assert sizes[0] == (len(LENGTHS), max(LENGTHS))
    assert len(sizes) <= 2 + max(map(len, found))
    assert sizes[-1][0] < len(LENGTHS)


def test_a_model_that_reads_the_fill_is_asked_row_by_row(monkeypatch):
    model = tiny("llama")
    alone = [list(generate(model, ids, 10, NO_STOP)) for ids in prompts()]
    forward = model.hf.forward
    monkeypatch.setattr(model.hf, "forward", lambda attention_mask=None, position_ids=None, **more: forward(**more))
    assert generate_many(model, prompts(), 10, NO_STOP) == alone


def test_rows_stay_where_a_cache_cannot_shrink(monkeypatch):
    model, stop = tiny("llama"), frozenset({5, 11, 29})
    expected = generate_many(model, prompts(), 25, stop)
    monkeypatch.setattr(generation, "_can_shrink", lambda cache: False)
    assert generate_many(model, prompts(), 25, stop) == expected


def test_batches_are_as_large_as_the_cache_may_be(monkeypatch):
    model = tiny("llama")
    expected = generate_many(model, prompts(), 10, NO_STOP)
    a_token = 2 * 2 * 32 * 4
    monkeypatch.setattr(generation, "CACHE_BYTES", 30 * a_token)
    groups, rows = [], sorted(enumerate(prompts()), key=lambda row: len(row[1]))
    while rows:
        group, rows = generation._that_fit(model, rows, 10, 1)
        groups.append([len(ids) for _, ids in group])
    assert groups == [[1, 3], [6], [8], [8], [12], [20]]
    assert generate_many(model, prompts(), 10, NO_STOP) == expected


def test_many_and_the_edges(monkeypatch):
    model = tiny("llama", context=20)
    assert generate_many(model, [], 5, NO_STOP) == []
    assert generate_many(model, prompts()[:3], 0, NO_STOP) == [[], [], []]
    assert [len(found) for found in generate_many(model, prompts()[:3], 1000, NO_STOP)] == [12, 17, 8]
    monkeypatch.setattr(generation, "_forward", lambda *_: pytest.fail("a mistake in one prompt comes before any work"))
    for wrong, says in ([], "prompt is empty"), (list(range(20)), "context is 20"):
        with pytest.raises(ModelError, match=says):
            generate_many(model, [[3], wrong], 5, NO_STOP)
