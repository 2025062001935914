"""Reward models in folders: what is saved is read again bitwise, and PEFT and transformers read it, too."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import peft
from trivium.errors import ModelError
from trivium.folder import open_folder, rewards_in
from trivium.forest import Example, TokenSequence, lay_out
from trivium.merging import merge, merge_difference, merge_model
from trivium.model.load import wrap
from trivium.model.reward import as_reward_model
from trivium.peft import folder as adapters
from trivium.peft.base import attach, continues, deltas, load_state, off, small_weights, state, swapped
from trivium.peft.lora import LoRA
from trivium.peft.settings import settings_of

END = "<end>"
METHODS = {
    "lora": {"name": "lora", "r": 4},
    "dora": {"name": "dora", "r": 4},
    "pissa": {"name": "pissa", "r": 2},
    "bottleneck": {"name": "bottleneck", "r": 4},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera", "r": 4},
    "bitfit": {"name": "bitfit"},
}
KINDS = ["llama", "qwen3", "gemma3", "gpt2"]


def tokenizer_of(size):
    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size - 2)} | {END: size - 2, "?": size - 1}, "?"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, unk_token="?")


@pytest.fixture
def base(tiny, tmp_path):
    """``base("llama")``: a language model's folder."""

    def write(kind):
        hf = tiny(kind)
        hf.save_pretrained(tmp_path / "base")
        tokenizer_of(128).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return write


@pytest.fixture
def reward(tiny):
    """``reward("llama")``: a reward model in hand, whose readout is not what every other one starts with."""
    return lambda kind: as_reward_model(wrap(tiny(kind), tokenizer_of(128), "float32", torch.float32), seed=9)


def forest_of(tokens):
    """Each row a sequence whose last state is read."""
    rows = [torch.cat([row, row[:1]]).numpy() for row in tokens]
    sequences = [TokenSequence(row, (torch.arange(len(row)) == len(row) - 1).float().numpy()) for row in rows]
    return lay_out([Example((s,)) for s in sequences])


def rewards_of(model, tokens):
    with model.laid_out("forest"), torch.no_grad():
        return model.logprob(forest_of(tokens))


def train(model, tokens, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.hf.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        with model.laid_out("forest"):
            found = model.logprob(forest_of(tokens))
        (-(found[0] - found[1])).exp().backward()
        optimizer.step()


def read_by_peft(base, folder):
    """By transformers and PEFT, which must have nothing to complain about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        return peft.PeftModel.from_pretrained(theirs, folder).eval()


@pytest.mark.promise(17)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_is_read_again_bitwise(base, reward, tokens, tmp_path, kind, name):
    if (kind, name) in {("llama", "bitfit"), ("qwen3", "bitfit"), ("gemma3", "bitfit")}:
        pytest.skip("it has no biases: those it gets are tried with methods of their own")
    place = base(kind)
    model, settings = reward(kind), settings_of(METHODS[name])
    attached = attach(model.hf, settings, seed=0)
    assert "score" in attached.targets, "the readout is trained whole beside the adapter"
    before = rewards_of(model, tokens)
    train(model, tokens)
    found = rewards_of(model, tokens)
    assert (found - before).abs().max() > 1e-2
    adapters.save(model.hf, tmp_path / "rm", str(place), settings)
    assert adapters.read_config(tmp_path / "rm")["task_type"] == "SEQ_CLS"
    assert rewards_in(tmp_path / "rm")
    assert not rewards_in(place)
    opened = open_folder(str(tmp_path / "rm"))
    assert opened.model.gives_rewards
    assert torch.equal(rewards_of(opened.model, tokens), found)
    assert opened.settings == settings or name in ("lora", "dora", "pissa")
    assert continues(opened.model.hf, settings)
    own = state(model.hf)
    assert {k: v.shape for k, v in state(opened.model.hf).items()} == {k: v.shape for k, v in own.items()}
    adapters.save(opened.model.hf, tmp_path / "again", str(place), opened.settings)
    one, other = (load_file(tmp_path / n / adapters.WEIGHTS) for n in ("rm", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[k]) for k, t in one.items())


@pytest.mark.promise(17)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_reward_model_is_read_again_bitwise(reward, tokens, tmp_path, kind):
    from trivium.data.templates import chat_template
    from trivium.folder import save_model

    model = reward(kind)
    attach(model.hf, settings_of({"name": "full"}), seed=0)
    train(model, tokens)
    save_model(model, tmp_path, chat_template(model.tokenizer))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert len(config["id2label"]) == 1
    assert rewards_in(tmp_path)
    found = rewards_of(model, tokens)
    assert torch.equal(rewards_of(open_folder(str(tmp_path)).model, tokens), found)
    with torch.no_grad():
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        alone = torch.cat([theirs(row[None]).logits[:, 0] for row in tokens])
    torch.testing.assert_close(alone, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_peft_reads_ours(base, reward, tokens, tmp_path, kind, name):
    place = base(kind)
    model, settings = reward(kind), settings_of(METHODS[name])
    attach(model.hf, settings, seed=0)
    train(model, tokens)
    adapters.save(model.hf, tmp_path / "rm", str(place), settings)
    config = adapters.read_config(tmp_path / "rm")
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    theirs = read_by_peft(place, tmp_path / "rm")
    with torch.no_grad():
        alone = torch.cat([theirs(input_ids=row[None]).logits[:, 0] for row in tokens])
    torch.testing.assert_close(alone, rewards_of(model, tokens), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_reads_pefts(base, tokens, tmp_path, kind):
    place = base(kind)
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type=peft.TaskType.SEQ_CLS, fan_in_fan_out=kind == "gpt2"
    )
    made = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        alone = torch.cat([made(input_ids=row[None]).logits[:, 0] for row in tokens])
    made.save_pretrained(tmp_path / "rm")
    assert adapters.read_config(tmp_path / "rm")["task_type"] == "SEQ_CLS"
    opened = open_folder(str(tmp_path / "rm"))
    assert opened.model.gives_rewards
    assert deltas(opened.model.hf)["score"].held.weight.equal(
        made.base_model.model.score.modules_to_save.default.weight
    )
    torch.testing.assert_close(rewards_of(opened.model, tokens), alone, rtol=1e-4, atol=2e-5)


def test_a_stage_goes_on_with_pefts(base, tmp_path):
    theirs = AutoModelForSequenceClassification.from_pretrained(base("llama"), num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type=peft.TaskType.SEQ_CLS)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "rm")
    opened = open_folder(str(tmp_path / "rm"))
    method = adapters.method_in(tmp_path / "rm")
    assert method is not None
    assert method["name"] == "lora"
    assert continues(opened.model.hf, settings_of(method))


def lora_folder(base, reward, tokens, tmp_path, kind="llama", dtype=torch.float32):
    place = base(kind)
    model, settings = reward(kind), settings_of(METHODS["lora"])
    attach(model.hf, settings, seed=0)
    train(model, tokens)
    adapters.save(model.hf, tmp_path / "rm", str(place), settings, dtype)
    model.tokenizer.save_pretrained(tmp_path / "rm")
    return model


@pytest.mark.promise(17)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_the_same_reward_model(base, reward, tokens, tmp_path, kind):
    model = lora_folder(base, reward, tokens, tmp_path, kind)
    gate = merge([str(tmp_path / "rm")], tmp_path / "merged")
    assert gate is not None
    assert gate.logits < 1e-5
    assert merge_difference(str(tmp_path / "rm")) == gate.logits
    merged = open_folder(str(tmp_path / "merged")).model
    assert merged.gives_rewards
    found = rewards_of(model, tokens)
    torch.testing.assert_close(rewards_of(merged, tokens), found, rtol=1e-5, atol=1e-5)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        alone = torch.cat([theirs(row[None]).logits[:, 0] for row in tokens])
    torch.testing.assert_close(alone, found, rtol=1e-5, atol=1e-5)


def test_the_gate_can_fail(base, reward, tokens, tmp_path, monkeypatch):
    lora_folder(base, reward, tokens, tmp_path)
    opened = open_folder(str(tmp_path / "rm"))
    monkeypatch.setattr(LoRA, "update", lambda self: 1.5 * self.scale * self.lora_B @ self.lora_A)
    with pytest.raises(ModelError, match="not the adapter's"):
        merge_model(opened)
    with pytest.raises(ModelError, match="not the adapter's"):
        merge([str(tmp_path / "rm")], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_readout_that_is_not_merged_is_seen(base, reward, tokens, tmp_path, monkeypatch):
    from trivium.peft.copies import Copies

    lora_folder(base, reward, tokens, tmp_path)
    monkeypatch.setattr(Copies, "merge", lambda *_: None)
    with pytest.raises(ModelError, match="not the adapter's"):
        merge([str(tmp_path / "rm")], tmp_path / "merged")


@pytest.mark.promise(17)
@pytest.mark.parametrize("name", METHODS)
def test_off_and_swapped(reward, tokens, name):
    kind = "gpt2" if name == "bitfit" else "llama"
    model = reward(kind)
    base = rewards_of(model, tokens)
    attach(model.hf, settings_of(METHODS[name]), seed=0)
    start = state(model.hf)
    first = rewards_of(model, tokens)
    train(model, tokens)
    trained, small = rewards_of(model, tokens), state(model.hf)
    assert any(not torch.equal(small[key], start[key]) for key in small if key.startswith("score"))
    with off(model.hf):
        assert torch.equal(rewards_of(model, tokens), base), "the readout's start, and the base's body"
    with swapped(model.hf, start):
        assert torch.equal(rewards_of(model, tokens), first)
    assert torch.equal(rewards_of(model, tokens), trained)
    load_state(model.hf, start)
    assert torch.equal(rewards_of(model, tokens), first)
    assert all(p.requires_grad for p in small_weights(deltas(model.hf)).values())


# --- folders that are not as they should be


def change(folder, **values):
    config = {**adapters.read_config(folder), **values}
    (folder / adapters.CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_folder_without_its_readout_is_refused(base, reward, tokens, tmp_path):
    lora_folder(base, reward, tokens, tmp_path)
    path = tmp_path / "rm" / adapters.WEIGHTS
    weights = load_file(path)
    score = next(name for name in weights if "score" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != score}, path)
    with pytest.raises(ModelError, match="score"):
        open_folder(str(tmp_path / "rm"))
    save_file({**weights, score: weights[score].repeat(2, 1)}, path)
    with pytest.raises(ModelError, match="score"):
        open_folder(str(tmp_path / "rm"))


def test_a_reward_adapter_that_says_nothing_of_its_readout_is_refused(base, reward, tokens, tmp_path):
    lora_folder(base, reward, tokens, tmp_path)
    change(tmp_path / "rm", modules_to_save=None)
    with pytest.raises(ModelError, match="score"):
        open_folder(str(tmp_path / "rm"))


def test_a_reward_adapter_that_says_it_writes_is_refused(base, reward, tokens, tmp_path):
    lora_folder(base, reward, tokens, tmp_path)
    change(tmp_path / "rm", task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="score"):
        open_folder(str(tmp_path / "rm"))


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_a_writing_adapter_that_says_it_gives_rewards_is_refused(base, tiny, tmp_path, name):
    """Else its readout would be a drawn one, and its rewards noise."""
    place = base("llama")
    model, settings = tiny("llama"), settings_of(METHODS[name])
    attach(model, settings, seed=0)
    adapters.save(model, tmp_path / "rm", str(place), settings)
    change(tmp_path / "rm", task_type="SEQ_CLS")
    with pytest.raises(ModelError, match="score"):
        open_folder(str(tmp_path / "rm"))


@pytest.mark.parametrize("value", ["TOKEN_CLS", 5, ["SEQ_CLS"], {"a": 1}])
def test_another_task_is_no_reward(base, reward, tokens, tmp_path, value):
    lora_folder(base, reward, tokens, tmp_path)
    change(tmp_path / "rm", task_type=value)
    assert not rewards_in(tmp_path / "rm")
    with pytest.raises(ModelError):
        open_folder(str(tmp_path / "rm"))


def test_a_reward_adapter_on_a_reward_model(reward, tokens, tmp_path):
    """A reward model that is trained on, with an adapter: its readout begins as its base's."""
    from trivium.data.templates import chat_template
    from trivium.folder import save_model

    model = reward("llama")
    save_model(model, tmp_path / "base", chat_template(model.tokenizer))
    before = rewards_of(model, tokens)
    settings = settings_of(METHODS["lora"])
    attach(model.hf, settings, seed=0)
    assert torch.equal(rewards_of(model, tokens), before)
    train(model, tokens)
    adapters.save(model.hf, tmp_path / "rm", str(tmp_path / "base"), settings)
    opened = open_folder(str(tmp_path / "rm")).model
    assert torch.equal(rewards_of(opened, tokens), rewards_of(model, tokens))
    with off(opened.hf):
        assert torch.equal(rewards_of(opened, tokens), before)


def test_several_adapters_that_give_rewards_are_not_combined_silently(base, reward, tokens, tmp_path):
    lora_folder(base, reward, tokens, tmp_path)
    with pytest.raises(ModelError, match="score"):
        merge([str(tmp_path / "rm"), str(tmp_path / "rm")], tmp_path / "both")
