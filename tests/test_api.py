"""The Python API: the same as the command line, in memory; transformers, peft and trivium load what it saves."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trivium
from trivium.demo import world
from trivium.evaluate.judge import Judge

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
SHORT = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2}
STORIES, REQUESTS, PAIRS = (list(rows(60, 0)) for rows in (world.stories, world.requests, world.pairs))
ASKED = "Tell a story about Mia at the park with a happy end."


@pytest.fixture
def base() -> trivium.Model:
    return trivium.new(STORIES, vocab_size=400, **SIZES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pretrained model in a folder; read only."""
    model = trivium.new(STORIES, vocab_size=400, **SIZES)
    model.train(STORIES, "pretrain", **SHORT)
    return model.save(tmp_path_factory.mktemp("api") / "base")


def weights(model: trivium.Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- several adapters on one base


def test_several_adapters_share_a_base(saved, tmp_path) -> None:
    folders = {}
    for name, method in (("anna", "lora"), ("ben", "houlsby"), ("cleo", "prefix")):
        model = trivium.load(saved).attach(method, seed=3)
        for parameter in model.hf.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        folders[name] = model.save(tmp_path / name)
    model = trivium.load(saved)
    assert model.adapters == []
    for name, path in folders.items():
        model.load_adapter(path, name)
    assert model.adapters == list(folders)
    answers = [(ASKED, "Mia found a ball."), ([{"role": "user", "content": ASKED}], "Mia found a ball."), ("Hi", "No.")]
    base = trivium.load(saved).score(answers)
    assert model.use(None).score(answers) == pytest.approx(base, abs=1e-3)
    alone = {name: trivium.load(path).score(answers) for name, path in folders.items()}
    for name, expected in alone.items():
        assert model.use(name).score(answers) == pytest.approx(expected, abs=1e-3)
        assert model.generate(ASKED, 5) == trivium.load(folders[name]).generate(ASKED, 5)
    mixed = model.score(answers, adapters=["anna", "cleo", None])
    assert mixed == pytest.approx([alone["anna"][0], alone["cleo"][1], base[2]], abs=1e-3)
    stacked, averaged = (model.use(how).score(answers) for how in (["anna", "ben"], {"anna": 0.5, "ben": 0.5}))
    assert len({round(found[0], 3) for found in (base, stacked, averaged, *alone.values())}) == 6
    assert model.detach("ben").adapters == ["anna", "cleo"]
    for act, said in (
        (lambda: model.use("bem"), "there is no adapter 'bem'"),
        (lambda: model.load_adapter(folders["ben"], "anna"), "an adapter 'anna' is there already"),
        (lambda: model.load_adapter(folders["ben"], "default"), "is what attach and train mean"),
        (lambda: model.load_adapter(folders["ben"], "1 x"), "cannot be an adapter's name"),
        (lambda: model.use({"anna": float("nan")}), "the weight of anna is nan"),
        (lambda: model.use(3), r"use\(3\) names no adapters"),
        (lambda: model.merge(), "other adapters"),
        (lambda: model.score(answers, adapters=["anna"]), "3 answers and 1 adapters"),
        (lambda: model.score(answers, adapters=["anna", "x", None]), "there is no adapter 'x'"),
        (lambda: model.detach("ben"), "there is no adapter 'ben'"),
        (lambda: model.train(REQUESTS, "sft", **SHORT), "other adapters"),
        (lambda: model.save(tmp_path / "no"), "other adapters"),
    ):
        with pytest.raises(trivium.UserError, match=said):
            act()


def test_an_adapter_of_another_base_is_refused(saved, tmp_path) -> None:
    model = trivium.load(saved)
    model.train(STORIES, "pretrain", **SHORT)
    other = model.save(tmp_path / "other")
    adapter = trivium.load(other).attach("lora").save(tmp_path / "adapter")
    with pytest.raises(trivium.UserError, match="an adapter on another base"):
        trivium.load(saved).load_adapter(adapter, "x")


def test_what_is_detached_leaves_the_base_and_its_lineage(saved, tmp_path) -> None:
    model = trivium.load(saved).attach("lora", r=2)
    lineage = trivium.load(saved).lineage
    model.use({"default": 0.0})
    model.train(REQUESTS, "sft", **SHORT)  # trains what is attached, whatever was in use
    assert model.score([(ASKED, "Yes.")]) != trivium.load(saved).score([(ASKED, "Yes.")])
    assert len(model.lineage) == len(lineage) + 1
    model.detach()
    assert model.lineage == lineage
    assert same(weights(model), weights(trivium.load(saved)))
    with pytest.raises(trivium.UserError, match="no adapter to merge"):
        model.merge()


def test_a_base_in_memory_is_saved_before_it_is_quantised(base, tmp_path) -> None:
    with pytest.raises(trivium.UserError, match="lies in no folder"):
        base.attach("qlora", r=2)
    with pytest.raises(trivium.UserError, match="lies in no folder"):
        base.train(REQUESTS, "sft", method={"name": "qlora", "r": 2}, **SHORT)
    base.attach("lora", r=2).save(tmp_path / "adapter")
    assert not [n for n in load_file(tmp_path / "adapter-base" / "model.safetensors") if "trivium" in n]


def test_a_quantised_base_in_a_notebook(saved, tmp_path) -> None:
    model = trivium.load(saved).attach("qlora", r=2)
    model.train(REQUESTS, "sft", **SHORT)
    answers = [(ASKED, "Mia found a ball.")]
    path = model.save(tmp_path / "q")
    again = trivium.load(path)
    assert again.score(answers) == pytest.approx(model.score(answers), abs=1e-4)
    assert again.method["quantize"] == "nf4"
    with pytest.raises(trivium.UserError, match="trained on a base held in nf4"):
        trivium.load(saved).load_adapter(path, "q")
    with pytest.raises(trivium.UserError, match="cannot be put back"):
        again.detach()


# --- what is exported


def test_every_exported_name_is_there_typed_and_documented() -> None:
    assert trivium.__all__ == [
        "Endpoint", "Model", "UserError", "by_endpoint", "by_program", "compare", "load", "new", "run",
    ]  # fmt: skip
    for name in trivium.__all__:
        assert getattr(trivium, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        trivium.lod  # noqa: B018
    public = {name: member for name, member in vars(trivium.Model).items() if not name.startswith("_")}
    assert set(public) >= {"attach", "train", "evaluate", "generate", "merge", "save", "hf", "tokenizer"}
    for name, member in [*public.items(), ("run", trivium.run), ("load", trivium.load), ("new", trivium.new)]:
        function = member.fget if isinstance(member, property) else member
        known = vars(sys.modules["trivium.api"]) | vars(sys.modules[function.__module__])
        assert "return" in typing.get_type_hints(function, known), name
        assert function.__doc__, name


def test_importing_trivium_imports_no_torch() -> None:
    code = "import sys, trivium; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- the three steps


def test_the_three_steps(base, tmp_path) -> None:
    report = base.train(STORIES, "pretrain", **SHORT)
    assert report["metrics"]["after_loss"] < report["metrics"]["before_loss"]
    assert [row["step"] for row in report["curve"] if "loss" in row] == [1, 2]
    before = weights(base)
    base.attach("lora", r=4)
    assert base.method["name"] == "lora"
    report = base.train(REQUESTS, "sft", **SHORT)
    assert report["rows"]["read"] == len(REQUESTS)
    parent = {n: p.clone() for n, p in base.hf.named_parameters() if p.requires_grad}
    report = base.train(PAIRS, "preference", **SHORT)
    assert report["metrics"]["before_loss"] == pytest.approx(0.693147, abs=1e-5), "its parent is the SFT model"
    assert any(not torch.equal(p, parent[n]) for n, p in base.hf.named_parameters() if p.requires_grad)
    now = weights(base)
    assert all(torch.equal(now[name], before[name]) for name in before), "the base is untouched"
    assert [link["stage"] for link in base.lineage] == ["random weights", "pretrain", "sft", "preference"]
    folder = base.save(tmp_path / "tuned")
    assert (tmp_path / "tuned-base" / "model.safetensors").is_file(), "a base that lies nowhere is written beside"
    record = json.loads((folder / "trivium.json").read_text(encoding="utf-8"))
    assert record["lineage"] == base.lineage
    assert "curve" not in record
    again = trivium.load(folder)
    assert again.generate(ASKED, 12) == base.generate(ASKED, 12)
    assert again.lineage == base.lineage


def test_the_same_as_a_recipe(saved, tmp_path) -> None:
    """A stage trained by `train` and one run from a recipe are the same model, bitwise."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in REQUESTS), encoding="utf-8")
    stage = {"name": "chat", "stage": "sft", "data": str(rows), "method": {"name": "lora", "r": 4}, **SHORT}
    summary = trivium.run({"name": "x", "model": str(saved), "stages": [stage]}, tmp_path / "out")
    from_file, in_memory = trivium.load(saved), trivium.load(saved).attach("lora", r=4)
    from_file.train(rows, "sft", method={"name": "lora", "r": 4}, **SHORT)
    report = in_memory.train(REQUESTS, "sft", **SHORT)
    theirs = weights(trivium.load(tmp_path / "out" / "chat"))
    assert same(weights(from_file), theirs)
    assert same(weights(in_memory), theirs)
    assert report["metrics"] == pytest.approx(summary["stages"][0]["metrics"])
    assert summary["stages"][0]["trained_parameters"] == report["trained_parameters"]


def test_run_takes_overrides_until_and_a_judge(saved, tmp_path) -> None:
    seen: list[int | None] = []

    def judge(talker: typing.Any, most: int | None) -> dict:
        seen.append(most)
        return {"asked": (1, 2), "length": 3.0}

    checked: Judge = judge
    stages = [
        {"name": "chat", "stage": "sft", "data": "rows.jsonl", "method": "lora", **SHORT},
        {"name": "more", "stage": "sft", "from": "chat", "data": "rows.jsonl", **SHORT},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in REQUESTS), encoding="utf-8")
    recipe = {"name": "x", "model": str(saved), "stages": stages}
    for stage in stages:
        stage["data"] = str(tmp_path / "rows.jsonl")
    summary = trivium.run(recipe, tmp_path / "out", overrides=["stages.chat.max_steps=1"], until="chat", judge=checked)
    (done,) = summary["stages"]
    assert done["metrics"]["after_asked"] == 0.5
    assert done["judged"]["asked"] == {"share": 0.5, "low": pytest.approx(0.0945, abs=1e-3),
                                       "high": pytest.approx(0.9055, abs=1e-3), "met": 1, "of": 2}  # fmt: skip
    assert done["judged"]["length"] == {"value": 3.0}
    assert seen == [50, 50, None, None], "before, after, then all: on the given model and on the finished one"
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "asked against steps" in report


# --- saving and loading


@pytest.mark.parametrize("method", [{"name": "lora", "r": 2}, {"name": "bottleneck", "r": 3}])
def test_an_adapter_that_a_stage_has_hung_is_known_and_saved_as_what_it_is(saved, tmp_path, method) -> None:
    model = trivium.load(saved)
    model.train(REQUESTS, "sft", method=method, **SHORT)
    assert {k: model.method[k] for k in method} == method
    again = trivium.load(model.save(tmp_path / "tuned"))
    assert {k: again.method[k] for k in method} == method
    assert again.generate(ASKED, 12) == model.generate(ASKED, 12)
    model.train(PAIRS, "preference", **SHORT)
    assert model.method["name"] == method["name"]
    assert model.lineage[-1]["method"] == method["name"]


def test_full_training_and_what_transformers_loads(base, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    base.train(STORIES, "pretrain", **SHORT)
    folder = base.save(tmp_path / "full")
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert same(weights(base), theirs)
    base.attach("lora", r=2)
    base.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(folder), "its base lies there already"
    assert not (tmp_path / "adapter-base").exists()


def test_merge(saved, tmp_path) -> None:
    model = trivium.load(saved).attach("lora", r=4)
    model.train(REQUESTS, "sft", **SHORT)
    answer = model.generate(ASKED, 12)
    folder = model.merge().save(tmp_path / "merged")
    again = trivium.load(folder)
    assert again.method == {"name": "full"}
    assert again.generate(ASKED, 12) == answer
    assert [link["stage"] for link in again.lineage][-2:] == ["sft", "merge"]
    bottleneck = trivium.load(saved).attach("bottleneck", r=4)
    with pytest.raises(trivium.UserError, match="merge"):
        bottleneck.merge()


def test_nothing_of_others_is_overwritten(saved, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    model = trivium.load(saved)
    for place in (tmp_path / "mine", tmp_path / "mine" / "letter.txt"):
        with pytest.raises(trivium.UserError, match="in the way"):
            model.save(place)
    assert (tmp_path / "mine" / "letter.txt").read_text(encoding="utf-8") == "dear"
    model.save(tmp_path / "out")
    model.save(tmp_path / "out")  # its own, again


# --- generating and evaluating


def test_generate_takes_texts_messages_and_lists_of_them(saved) -> None:
    model = trivium.load(saved)
    said = [{"role": "user", "content": ASKED}]
    one = model.generate(ASKED, 8)
    assert isinstance(one, str)
    assert model.generate(said, 8) == one
    assert model.generate([ASKED, said, "Hello"], 8) == [one, one, model.generate("Hello", 8)]
    assert model.generate([], 8) == []
    assert model.generate("Once upon", 8, raw=True) != ""
    several = model.generate([ASKED, "Hello"], 8, temperature=1.0, seed=3, samples=3)
    assert [len(answers) for answers in several] == [3, 3]
    assert several[0] == model.generate(ASKED, 8, temperature=1.0, seed=3, samples=3)
    assert several[0][0] == model.generate(ASKED, 8, temperature=1.0, seed=3)
    assert model.generate(ASKED, 8, temperature=1.0, seed=3) == model.generate(ASKED, 8, temperature=1.0, seed=3)


def test_evaluate_is_what_training_reports(saved) -> None:
    model = trivium.load(saved)
    report = model.train(REQUESTS[:40], "sft", eval_rows=REQUESTS[40:], **SHORT)
    found = model.evaluate(REQUESTS[40:])
    assert found["loss"] == pytest.approx(report["metrics"]["after_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(report["metrics"]["after_bits_per_byte"], rel=1e-5)
    assert model.evaluate(STORIES[:10], "pretrain")["loss"] > 0


# --- mistakes


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.train([], "sft"), ["no rows in rows"]),
        (lambda m: m.train([{"x": 1}], "sft"), ["rows:1", "messages"]),
        (lambda m: m.train(["text"], "pretrain"), ["rows:1", "mapping", "str"]),
        (lambda m: m.train({"text": "x"}, "pretrain"), ["dict is no list of rows"]),
        (lambda m: m.train(REQUESTS, "sfft"), ["'sfft' is no stage", "did you mean 'sft'"]),
        (lambda m: m.train(REQUESTS, lerning_rate=1), ["unknown key lerning_rate", "did you mean 'learning_rate'"]),
        (lambda m: m.train(REQUESTS, beta=1.0), ["beta: next_token has no such setting; it is for dpo, "]),
        (lambda m: m.train("nowhere.jsonl"), ["no such file", "nowhere.jsonl"]),
        (lambda m: m.train(REQUESTS, dtype="bfloat16"), ["dtype", "float32", "load()"]),
        (lambda m: m.train(REQUESTS, max_length=4096), ["max_length", "512"]),
        (lambda m: m.train("rows.jsonl", eval_rows=REQUESTS), ["eval_rows"]),
        (lambda m: m.train(REQUESTS, save_every=5), ["save_every", "in memory", "trivium.run"]),
        (lambda m: m.attach("lorra"), ["no method 'lorra'", "lora"]),
        (lambda m: m.attach("lora", rank=3), ["rank", "lora"]),
        (lambda m: m.attach("full"), ["full is no adapter"]),
        (lambda m: m.attach("lora").attach("lora"), ["adapter already", "merge()"]),
        (lambda m: m.attach("lora").train(REQUESTS, method="bottleneck"), ["another adapter", "merge()"]),
        (lambda m: m.evaluate(PAIRS, "preference"), ["compared with a parent"]),
        (lambda m: m.evaluate([]), ["no rows in rows"]),
        (lambda m: trivium.load("nowhere/at/all"), ["no such model folder"]),
        (lambda m: trivium.load("x/y", device="cudda"), ["device", "cudda"]),
        (lambda m: trivium.run({"name": "x"}), ["model is missing"]),
        (lambda m: trivium.run("nowhere.yaml"), ["nowhere.yaml: no such recipe"]),
        (lambda m: trivium.new(STORIES, vocab_size=400, hiden_size=3), ["hiden_size", "did you mean 'hidden_size'"]),
        (lambda m: trivium.new([{"x": 1}]), ["no text"]),
    ],
)  # fmt: skip
def test_a_mistake_is_a_user_error_with_a_remedy(call, says, saved, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(trivium.UserError) as error:
        call(trivium.load(saved))
    text = str(error.value)
    assert all(piece in text for piece in says), text
    assert len(text.splitlines()) <= 3
    assert error.value.remedy


# --- rewards, and a model against its parent


def test_a_reward_model_scores_chooses_and_judges(saved, tmp_path) -> None:
    reward = trivium.load(saved)
    report = reward.train(PAIRS, "reward", method="lora", max_steps=3, batch_size=4, learning_rate=1e-2, eval_data=0)
    assert report["trained_parameters"] > 0
    asked = [("Tell me a story.", "Once upon a time."), ("Tell me a story.", "No.")]
    given = reward.score(asked)
    assert given[0] != given[1]
    reward.save(tmp_path / "reward")
    assert trivium.load(tmp_path / "reward").score(asked) == given
    model, parent = trivium.load(saved), trivium.load(saved)
    drawn = model.generate("Tell me a story.", 8, samples=4, temperature=1.0, seed=3)
    best = model.generate("Tell me a story.", 8, samples=4, temperature=1.0, seed=3, best_by=reward)
    worth = reward.score([("Tell me a story.", text) for text in drawn])
    assert best == drawn[worth.index(max(worth))]
    same = model.against(parent, ["Tell me a story."], judge=reward, max_new_tokens=8)
    assert same is not None
    assert (same.unchanged, same.kl, same.won.ties) == (1.0, 0.0, 1)
    model.train(PAIRS, "preference", loss={"dpo": 1.0, "hinge": 0.5}, max_steps=4, batch_size=4, learning_rate=1e-2)
    found = model.against(parent, ["Tell me a story."], trivium.by_program(lambda _, text: len(text)), 8)
    assert found is not None
    assert found.kl > 0
    ((duel,), won) = found.duels, found.won.share
    assert won == (0.5 if len(duel.new) == len(duel.old) else float(len(duel.new) > len(duel.old)))


def test_a_mistake_makes_no_reward_model_of_a_language_model(saved) -> None:
    model = trivium.load(saved)
    with pytest.raises(trivium.UserError, match="lerning_rate"):
        model.train(PAIRS, "reward", lerning_rate=1)
    assert model.generate("Tell me a story.", 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r, m: r.generate("x"), ["a reward model gives numbers"]),
        (lambda r, m: r.train(REQUESTS, "sft"), ["no words left to train"]),
        (lambda r, m: r.evaluate(REQUESTS), ["no words left to train"]),
        (lambda r, m: m.attach("lora").train(PAIRS, "reward"), ["knows no reward", "merge()"]),
        (lambda r, m: m.generate("x", best_by=r), ["best_by chooses among several answers", "samples"]),
        (lambda r, m: m.generate("x", 4, samples=2, temperature=1.0, best_by=m), ["no reward model"]),
    ],
)
def test_mistakes_with_reward_models(call, says, saved) -> None:
    reward = trivium.load(saved)
    reward.train(PAIRS, "reward", method="lora", max_steps=1, batch_size=2, eval_data=0)
    with pytest.raises(trivium.UserError) as error:
        call(reward, trivium.load(saved))
    assert all(piece in str(error.value) for piece in says), str(error.value)
