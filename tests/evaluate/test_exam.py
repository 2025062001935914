"""The exam: bits per byte against a count by hand, prompts and texts that nothing trains on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoConfig

from trivium.data.rows import Listed
from trivium.data.tokenizer import train_tokenizer
from trivium.evaluate import exam
from trivium.evaluate.exam import Exam, prompts_from, texts_from
from trivium.model.load import wrap
from trivium.model.new import new_model
from trivium.talk import Talker

TEXTS = ("A turtle and a hare, é😀.", "The hare ran. " * 12, "x")


@pytest.fixture(scope="module")
def talker() -> Talker:
    tokenizer = train_tokenizer(["A turtle and a hare. The hare ran."], 300)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("llama", **sizes, **ids, max_position_embeddings=32, initializer_range=0.3)
    model = wrap(new_model(config, seed=0).eval(), tokenizer, "float32", torch.float32)
    return Talker.of(model)


def test_bits_per_byte_is_what_the_logits_say(talker):
    tokenizer, nats = talker.model.tokenizer, 0.0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, 31):  # pieces of the context's length that share one token
            piece = torch.tensor([ids[start : start + 32]])
            with torch.no_grad():
                logprobs = talker.model.hf(piece).logits[0, :-1].log_softmax(-1)
            nats -= float(logprobs.gather(1, piece[0, 1:, None]).sum())
    expected = nats / math.log(2) / sum(len(t.encode()) for t in TEXTS)
    assert Exam(texts=TEXTS).take(talker)["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_answers_and_prompts_that_do_not_fit(talker):
    user = {"role": "user", "content": "A hare"}
    asked = ((user,), "A turtle", ({"role": "user", "content": "turtle " * 60},), ({"role": "elder", "content": "x"},))
    found = Exam(prompts=asked).take(talker)
    assert found["bits_per_byte"] is None
    first, second, *others = found["answers"]
    assert first == "".join(talker.stream(talker.prompt([user]), exam.ANSWER_TOKENS))
    assert second == "".join(talker.stream(talker.raw_prompt("A turtle"), exam.ANSWER_TOKENS))
    assert others == [None, None]


def test_prompts_are_shown_for_a_person():
    one = {"role": "user", "content": "Hello"}
    asked = ((one,), "Once", ({"role": "system", "content": "Be kind."}, one))
    assert Exam(prompts=asked).shown() == ["Hello", "Once", "system: Be kind.\nuser: Hello"]


def conversation(n: int, length: int = 3) -> dict:
    turns = [{"role": "user", "content": f"question {n} " * length}, {"role": "assistant", "content": "yes"}]
    return {"messages": [{"role": "system", "content": "s"}, *turns, *turns]}


def test_prompts_end_before_the_first_answer_and_long_ones_give_way():
    rows = [conversation(0, 200), *(conversation(n) for n in range(1, 9)), {"no": "row"}, "junk"]
    found = prompts_from([Listed(rows)], "conversation", None)
    assert len(found) == exam.PROMPTS
    assert [[m["role"] for m in prompt] for prompt in found] == [["system", "user"]] * 3
    assert "question 1 " in found[0][1]["content"], "the long one is passed over"
    assert len(prompts_from([Listed(rows[:1])], "conversation", None)) == 1, "if there are shorter ones"


def test_prompts_of_pairs_and_of_texts():
    pair = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    assert prompts_from([Listed([pair])], "pair", None)[0][0]["content"] == "Why?"
    text = {"text": "Once upon a time there was a turtle who wanted to see the whole wide world."}
    (start,) = prompts_from([Listed([text])], "text", None)
    assert text["text"].startswith(start)
    assert len(start) <= exam.BEGINNING
    assert not start.endswith("wh"), "cut at a word"


def test_only_what_is_held_out_is_asked(tmp_path, talker):
    from trivium.data.prepare import prepare

    rows = [conversation(n) for n in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = prompts_from([path], "conversation", 0.1)
    done = prepare(path, kind="conversation", tokenizer=talker.model.tokenizer, template=talker.template,
                   context=10_000, holdout=0.1)  # fmt: skip
    lines = {int(example.origin.rsplit(":", 1)[1]) for example in done.examples}
    for prompt in held_out:
        number = int(prompt[1]["content"].split()[1])
        assert number + 1 not in lines, "trained on"


def test_texts_up_to_a_size():
    rows = [{"text": "x" * 30_000}, {"text": " "}, {"no": "text"}, {"text": "y" * 30_000}, {"text": "z"}]
    assert [len(t) for t in texts_from([Listed(rows)], None)] == [30_000, 20_000]
