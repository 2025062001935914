"""Reward models, preferences and judges from the command line: a whole chain, every command, and every mistake."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SHORT = {"max_steps": 2, "batch_size": 4, "eval_data": 0.25, "learning_rate": 1e-2}
MODEL = {
    "architecture": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 128,
}  # fmt: skip
BASE = {"name": "base", "stage": "pretrain", "data": "text.jsonl", **SHORT}
CHAT = {"name": "chat", "stage": "sft", "from": "base", "data": "chats.jsonl", **SHORT, "max_steps": 8}
REWARD = {"name": "rm", "stage": "reward", "from": "chat", "data": "pairs.jsonl", **SHORT, "center_rewards": 0.01}
ALIGNED = {"name": "aligned", "stage": "preference", "from": "chat", "data": "pairs.jsonl", **SHORT}
CHAIN = {
    "name": "judged", "model": MODEL, "judge": {"reward": "rm"}, "judge_prompts": 3,
    "stages": [BASE, CHAT, REWARD, {**REWARD, "name": "small", "method": {"name": "lora", "r": 2}},
               {**ALIGNED, "learning_rate": 3e-2}],
}  # fmt: skip
NAN, INF = float("nan"), float("inf")


def write_rows(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chain(data, tmp_path_factory) -> Path:
    """A finished run: base, chat, two reward models, and what one of them judges; never written to by a test."""
    from trivium.chain import run_recipe
    from trivium.recipe_file import read_recipe

    here = Path(shutil.copytree(data, tmp_path_factory.mktemp("chain") / "data"))
    (here / "recipe.yaml").write_text(yaml.safe_dump(copy.deepcopy(CHAIN), sort_keys=False), encoding="utf-8")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        run_recipe(read_recipe(here / "recipe.yaml"), here / "out")
    (here / "said").write_text(said.getvalue(), encoding="utf-8")
    return here


@pytest.fixture
def here(data, tmp_path) -> Path:
    """A folder of one's own with the data."""
    for file in data.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


@pytest.fixture
def quick() -> Callable[[], float]:
    """Seconds that have passed, the imports not counted."""
    import trivium.stage_runner  # noqa: F401

    begun = time.perf_counter()
    return lambda: time.perf_counter() - begun


def check(done: Any, *says: str, code: int = 2) -> None:
    """A mistake is told as one: the exit code, one line of what and where, one of remedy, no traceback."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.error.strip().count("\n") == 1, done.error
    for text in says:
        assert text in done.error, f"{text!r} is not in {done.error!r}"


# --- the whole chain


def test_a_judged_chain(chain):
    summary = json.loads((chain / "out" / "summary.json").read_text(encoding="utf-8"))
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert [n for n, stage in stages.items() if "against" in stage] == ["aligned"]
    found = stages["aligned"]["against"]
    assert set(found) >= {"unchanged", "tokens", "kl", "won", "line"}
    assert "duels" not in found, "all answers are in measures.json"
    assert found["won"]["of"] == 3 == len(found["won"]["verdicts"])
    assert found["kl"] > 0
    assert found["unchanged"] < 1
    assert len(found["tokens"]) == 2
    for name in ("rm", "small"):
        assert stages[name]["metrics"]["after_accuracy"] >= 0
        assert "text_bits_per_byte" not in stages[name], "a reward model reads no text"
    said = (chain / "said").read_text(encoding="utf-8")
    assert f"against its parent: {found['line']}" in said
    measures = json.loads((chain / "out" / "measures.json").read_text(encoding="utf-8"))
    assert set(measures["models"]) == {"base", "chat", "aligned"}
    assert len(measures["models"]["aligned"]["against"]["duels"]) == 3


def test_the_report_shows_both_answers_and_the_verdict(chain):
    import html

    page = html.unescape((chain / "out" / "report.html").read_text(encoding="utf-8"))
    found = json.loads((chain / "out" / "measures.json").read_text(encoding="utf-8"))["models"]["aligned"]["against"]
    assert found["line"] in page
    plain = " ".join(page.split())
    for duel in found["duels"]:
        assert duel["prompt"][-1]["content"] in page
        for answer in (duel["new"], duel["old"]):
            assert " ".join(answer.split()) in plain or "\x00" in answer


def test_the_same_command_does_nothing_again(chain, tmp_path, trivium):
    here = Path(shutil.copytree(chain, tmp_path / "copy"))
    before = {p: p.stat().st_mtime_ns for p in (here / "out").rglob("*.safetensors")}
    measures = (here / "out" / "measures.json").read_bytes()
    begun = time.perf_counter()
    done = trivium("run", here / "recipe.yaml", "--out", here / "out")
    assert done.code == 0, done.err
    assert done.err.count("not run again") == 5
    for word in ("step 1/", "against its parent", "measured"):
        assert word not in done.err
    assert time.perf_counter() - begun < 5
    assert {p: p.stat().st_mtime_ns for p in (here / "out").rglob("*.safetensors")} == before
    assert json.loads(measures) == json.loads((here / "out" / "measures.json").read_text(encoding="utf-8"))
    assert json.loads((here / "out" / "summary.json").read_text())["stages"][-1]["against"]["won"]["of"] == 3


def test_another_judge_is_asked_without_training_again(chain, tmp_path, trivium):
    here = Path(shutil.copytree(chain, tmp_path / "copy"))
    done = trivium("run", here / "recipe.yaml", "--out", here / "out", "--set", "judge.reward=small")
    assert done.code == 0, done.err
    assert done.err.count("not run again") == 5
    assert done.err.count("against its parent") == 1
    done = trivium("run", here / "recipe.yaml", "--out", here / "out", "--set", "judge=null")
    assert done.code == 0, done.err
    assert "; won" not in done.err
    assert "against its parent" in done.err
    assert json.loads((here / "out" / "summary.json").read_text())["stages"][-1]["against"]["won"] is None


def test_a_judge_that_was_trained_again_is_asked_again(chain, tmp_path, trivium):
    here = Path(shutil.copytree(chain, tmp_path / "copy"))
    done = trivium("run", here / "recipe.yaml", "--out", here / "out", "--set", "stages.rm.center_rewards=0.5")
    assert done.code == 0, done.err
    assert done.err.count("not run again") == 4
    assert "against its parent" in done.err


def test_transformers_reads_the_reward_model(chain):
    from trivium.api import load
    from trivium.evaluate.score import rewarded, rewards

    row = [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "old dog"}]
    ours = load(str(chain / "out" / "rm"))._opened.model
    hf = AutoModelForSequenceClassification.from_pretrained(chain / "out" / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(chain / "out" / "rm")
    assert hf.config.pad_token_id == tokenizer.pad_token_id
    ids = rewarded(ours, row).inputs.tolist()
    batch = tokenizer.pad({"input_ids": [ids, [*ids[:4], ids[-1]]]}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        assert float(hf(**batch).logits[0]) == pytest.approx(rewards(ours, [row])[0], abs=1e-5)


# --- score, rank, judge, generate


@pytest.mark.parametrize("model", ["rm", "small"])
def test_score(chain, trivium, tmp_path, model):
    done = trivium("score", chain / "out" / model, chain / "pairs.jsonl", chain / "chats.jsonl")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [set(line) for line in lines] == [{"origin", "rewards"}] * 24 + [{"origin", "reward"}] * 24
    assert lines[0]["origin"] == f"{chain / 'pairs.jsonl'}:1"
    assert "72 answers of 48 rows have a reward" in done.err
    assert "of 24 rows rank best and worst as they did" in done.err
    again = trivium("score", chain / "out" / model, chain / "pairs.jsonl", "--out", tmp_path / "x.jsonl")
    assert (again.code, again.out) == (0, "")
    written = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [w["rewards"] for w in written] == [pytest.approx(x["rewards"], abs=1e-5) for x in lines[:24]]


def test_rank_and_train_on_it(chain, trivium, here):
    lists = [{"prompt": f"red {n}", "answers": ["old cat", f"dog {n}", "big"]} for n in range(12)]
    rows = write_rows(here / "lists.jsonl", [*lists, "broken"])
    for more, fields in (
        ([], {"prompt", "chosen", "rejected", "scores"}),
        (["--all"], {"prompt", "answers", "scores"}),
    ):
        out = here / f"ranked{len(more)}.jsonl"
        done = trivium("data", "rank", rows, "--reward", chain / "out" / "rm", "--out", out, *more)
        assert done.code == 0, done.err
        assert "12 rows written" in done.err
        assert "lists.jsonl:13: not JSON" in done.err
        assert {frozenset(json.loads(line)) for line in out.read_text().splitlines()} == {frozenset(fields)}
        stage = {**ALIGNED, "from": None, "data": out.name, "max_steps": 1}
        recipe = {"name": "x", "model": str(chain / "out" / "chat"), "prompts": [], "stages": [stage]}
        (here / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert trivium("run", here / "r.yaml", "--out", here / f"out{len(more)}").code == 0


def test_rank_answers_that_are_drawn(chain, trivium, tmp_path):
    rows = write_rows(tmp_path / "asks.jsonl", [{"prompt": "red cat"}, {"prompt": "cat " * 200}, {"prompt": "old"}])
    where = ["--reward", chain / "out" / "small", "--sample", chain / "out" / "chat", "-n", 3, "--max-new-tokens", 6]
    out = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for n, path in enumerate(out):
        done = trivium("data", "rank", rows, *where, "--out", path, "--all", "--seed", n // 2)
        assert done.code == 0, done.err
        assert "asks.jsonl:2: the prompt has" in done.err, "one prompt that is too long is no end of it"
    assert out[0].read_bytes() == out[1].read_bytes() != out[2].read_bytes()
    assert {len(json.loads(line)["answers"]) for line in out[0].read_text(encoding="utf-8").splitlines()} <= {2, 3}


def test_judge_by_a_reward_model(chain, trivium, tmp_path):
    where = [chain / "out" / "aligned", chain / "out" / "chat", "--prompts", chain / "pairs.jsonl", "--most", 5]
    done = trivium("judge", *where, "--reward", chain / "out" / "rm", "--html", tmp_path / "x.html", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (len(found["duels"]), found["won"]["of"]) == (5, 5)
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "aligned against chat" in page
    assert page.count("<article>") == 5
    assert "<script" not in page
    told = trivium("judge", *where, "--reward", chain / "out" / "rm")
    assert told.out.strip() == found["line"]
    without = trivium("judge", *where)
    assert without.code == 0, without.err
    assert "won" not in without.out
    same = trivium("judge", *where[:1], *where[:1], *where[2:], "--reward", chain / "out" / "rm")
    assert "100% of 5 greedy answers unchanged" in same.out
    assert "KL 0.000" in same.out
    assert "won 50%" in same.out


def test_a_hostile_answer_is_only_text_on_the_page(tmp_path):
    from trivium.report.write import write_judged

    evil = "<script>alert('x')</script><img src=x onerror=y>"
    duel = {"prompt": [{"role": "user", "content": evil}], "new": evil, "old": ""}
    write_judged({"duels": [duel], "won": None, "line": evil}, evil, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "(nothing)" in page


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint that finds the longer answer better, and what it was asked."""
    import re

    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "key": self.headers.get("Authorization")})
            text = body["messages"][-1]["content"]
            a, b = (re.search(rf"<answer {n} (\w+)>\n(.*?)\n</answer {n} \1>", text, re.S)[2] for n in "AB")  # type: ignore[index]
            mark = "[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]"
            raw = json.dumps({"choices": [{"message": {"content": mark}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_judge_by_an_endpoint(chain, trivium, endpoint):
    url, asked = endpoint
    where = [chain / "out" / "aligned", chain / "out" / "chat", "--prompts", chain / "pairs.jsonl", "--most", 4]
    done = trivium("judge", *where, "--endpoint", url, "--model", "a-judge", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    expected = [0.5 + 0.5 * ((len(d["new"]) > len(d["old"])) - (len(d["new"]) < len(d["old"]))) for d in found["duels"]]
    assert found["won"]["verdicts"] == expected
    differ = sum(d["new"] != d["old"] for d in found["duels"])
    assert len(asked) == 2 * differ > 0
    assert {(a["model"], a["key"]) for a in asked} == {("a-judge", "Bearer sk-secret")}
    assert "sk-secret" not in done.out + done.err


def test_a_run_judged_by_an_endpoint(chain, trivium, endpoint, tmp_path):
    url, asked = endpoint
    here = Path(shutil.copytree(chain, tmp_path / "copy"))
    recipe = yaml.safe_load((here / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["judge"] = {"endpoint": url, "model": "m"}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = trivium("run", here / "recipe.yaml", "--out", here / "out")
    assert done.code == 0, done.err
    assert asked
    assert "; won " in done.err
    for file in ("summary.json", "measures.json", "report.html"):
        assert "sk-secret" not in (here / "out" / file).read_text(encoding="utf-8")


def test_an_endpoint_that_is_down_does_not_end_the_run(chain, trivium, tmp_path, monkeypatch):
    """Nothing is lost, and the same command asks again; also where nothing else is asked of the models."""
    from trivium.evaluate import endpoint as judges

    monkeypatch.setattr(judges, "TRIES", 1)
    here = Path(shutil.copytree(chain, tmp_path / "copy"))
    recipe = yaml.safe_load((here / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"judge": {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}, "prompts": []}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = trivium("run", here / "recipe.yaml", "--out", here / "out")
    assert done.code == 0, done.err
    assert "aligned is not judged: " in done.err
    assert "the same command asks again" in done.err
    (_, _, _, _, last) = json.loads((here / "out" / "summary.json").read_text(encoding="utf-8"))["stages"]
    assert "against" not in last


def test_best_of_n(chain, trivium):
    where = ["generate", chain / "out" / "chat", "red cat", "--temperature", 1, "--max-new-tokens", 6, "--seed", 3]
    done = trivium(*where, "--best-of", 6, "--reward", chain / "out" / "rm")
    assert done.code == 0, done.err
    from trivium.evaluate.score import rewards
    from trivium.judging import reward_model
    from trivium.talk import Talker

    asked = [{"role": "user", "content": "red cat"}]
    drawn = Talker.open(str(chain / "out" / "chat")).answers([asked], 6, 1.0, 3, 6)
    worth = rewards(
        reward_model(str(chain / "out" / "rm")), [[*asked, {"role": "assistant", "content": a}] for a in drawn]
    )
    assert done.out == drawn[worth.index(max(worth))] + "\n"


# --- mistakes of commands


COMMANDS: dict[str, tuple[list[str], list[str], int]] = {
    "score by a language model": (["score", "OUT/chat", "ROWS"], ["chat: not a reward model", "reward stage"], 2),
    "score by an adapter that talks": (["score", "WALK", "ROWS"], ["not a reward model"], 2),
    "score by nothing": (["score", "OUT/nowhere", "ROWS"], ["nowhere: no such model folder"], 2),
    "score rows that are not there": (["score", "OUT/rm", "HERE/row.jsonl"], ["no such file", "row.jsonl"], 2),
    "score an empty path": (["score", "OUT/rm", ""], ["a path is empty"], 2),
    "score into a folder that is not there": (["score", "OUT/rm", "ROWS", "--out", "HERE/no/x"], ["no folder"], 3),
    "score into a folder": (["score", "OUT/rm", "ROWS", "--out", "HERE"], ["a folder, where a file"], 3),
    "generate by a reward model": (["generate", "OUT/rm", "red"], ["gives numbers, not text", "trivium score"], 2),
    "generate by a small one": (["generate", "OUT/small", "red"], ["gives numbers, not text", "trivium score"], 2),
    "chat with a reward model": (["chat", "OUT/rm"], ["gives numbers, not text"], 2),
    "best of n by nobody": (["generate", "OUT/chat", "x", "--best-of", "3"], ["--best-of and --reward"], 2),
    "a reward for one": (["generate", "OUT/chat", "x", "--reward", "OUT/rm"], ["--best-of and --reward"], 2),
    "best of n of the same": (
        ["generate", "OUT/chat", "x", "--best-of", "3", "--reward", "OUT/rm"], ["--temperature 0", "0.8"], 2),
    "best of n raw": (
        ["generate", "OUT/chat", "x", "--best-of", "3", "--reward", "OUT/rm", "--raw", "--temperature", "1"],
        ["--raw"], 2),
    "best of n by a language model": (
        ["generate", "OUT/chat", "x", "--best-of", "3", "--reward", "OUT/chat", "--temperature", "1"],
        ["chat: not a reward model"], 2),
    "merge a whole reward model": (["merge", "OUT/rm", "--out", "HERE/m"], ["not an adapter folder"], 2),
    "judge by both": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--reward", "OUT/rm", "--endpoint", "http://x/v1",
         "--model", "m"], ["either reward or endpoint", "--reward DIR"], 2),
    "judge by an endpoint's nobody": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--endpoint", "http://x/v1"],
        ["endpoint and model go together"], 2),
    "judge by a model of no endpoint": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--model", "m"], ["reward or endpoint"], 2),
    "judge by no address": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--endpoint", "ftp://x", "--model", "m"],
        ["'ftp://x'", "http://"], 2),
    "judge by a language model's folder": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--reward", "OUT/chat"],
        ["chat: not a reward model"], 2),
    "judge by a folder that is not there": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--reward", "OUT/nowhere"], ["nowhere: no such"], 2),
    "judge a reward model": (["judge", "OUT/rm", "OUT/chat", "--prompts", "ROWS"], ["numbers, not text"], 2),
    "judge against a reward model": (["judge", "OUT/chat", "OUT/rm", "--prompts", "ROWS", "--max-new-tokens", "1"],
                                     ["numbers, not text"], 2),
    "judge without room": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--max-new-tokens", "999"],
        ["leaves room for 999 more", "--max-new-tokens"], 2),
    "judge on texts": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "TEXT"], ["no prompt to ask", "text.jsonl:1"], 2),
    "a page in no folder": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--html", "HERE/no/x"], ["no folder"], 3),
    "a page that is a folder": (
        ["judge", "OUT/aligned", "OUT/chat", "--prompts", "ROWS", "--html", "HERE"], ["a folder, where a file"], 3),
    "rank by a language model": (
        ["data", "rank", "ROWS", "--reward", "OUT/chat", "--out", "HERE/x"], ["not a reward model"], 2),
    "rank into no folder": (["data", "rank", "ROWS", "--reward", "OUT/rm", "--out", "HERE/no/x"], ["no folder"], 3),
    "rank texts": (
        ["data", "rank", "TEXT", "--reward", "OUT/rm", "--out", "HERE/x"],
        ["no row could be ranked", "text.jsonl:1", "--sample"], 2),
    "rank what a reward model says": (
        ["data", "rank", "ROWS", "--reward", "OUT/rm", "--out", "HERE/x", "--sample", "OUT/rm"],
        ["numbers, not text"], 2),
    "rank so many of none": (
        ["data", "rank", "ROWS", "--reward", "OUT/rm", "--out", "HERE/x", "-n", "3"],
        ["-n is for answers that are drawn", "--sample DIR"], 2),
    "rank into a folder": (
        ["data", "rank", "ROWS", "--reward", "OUT/rm", "--out", "HERE"], ["a folder, where a file"], 3),
    "rank fields that are not there": (
        ["data", "rank", "ROWS", "--reward", "OUT/rm", "--out", "HERE/x", "--field", "prompt=zzz"],
        ["no field 'zzz'", "pairs.jsonl:1"], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_of_a_command_is_named(name, chain, walk, here, trivium, quick):
    arguments, says, code = COMMANDS[name]
    places = {"OUT": chain / "out", "ROWS": here / "pairs.jsonl", "TEXT": here / "text.jsonl", "HERE": here,
              "WALK": walk.folder / "chat"}  # fmt: skip
    told = []
    for argument in arguments:
        first, slash, rest = argument.partition("/")
        told.append(f"{places[first]}{slash}{rest}" if first in places else argument)
    before = {p.name for p in here.iterdir()}
    check(trivium(*told), *says, code=code)
    assert quick() < 2
    assert {p.name for p in here.iterdir()} == before, "nothing is left behind"


@pytest.mark.parametrize(
    "arguments",
    [
        ["judge", ".", "."],
        ["score", "."],
        ["data", "rank", "a", "--reward", ".", "--out", "x", "-n", "1"],
        ["data", "rank", "a", "--reward", ".", "--out", "x", "--temperature", "nan"],
        ["data", "rank", "a", "--reward", "."],
        ["judge", ".", ".", "--prompts", "c", "--most", "0"],
        ["judge", ".", ".", "--prompts", "c", "--max-new-tokens", "x"],
        ["generate", ".", "b", "--best-of", "0"],
    ],
)
def test_an_option_out_of_range(arguments, trivium):
    done = trivium(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "Error: " in done.err


def test_rewards_are_lines_that_a_pipe_may_leave(chain, tmp_path):
    """`trivium score DIR ROWS | head -1`"""
    import subprocess

    command = (
        f"{Path(sys.executable).parent / 'trivium'} score {chain / 'out' / 'rm'} {chain / 'pairs.jsonl'} | head -1"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_no_reward_of_hostile_rows_is_lost_or_invented(chain, trivium, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"prompt": "é😀 مرحبا", "answers": ["a\u2028b", "نعم", "x" * 40]},
        {"prompt": "x", "answers": ["a", "b"], "scores": [1e308, -1e308]},
        {"prompt": "x", "answers": ["a", "b"], "scores": ["x", None]},
        {"prompt": "x", "answers": [["a"], {"b": 1}]},
        {"prompt": "x", "chosen": {"role": "assistant"}, "rejected": 3},
        {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"prompt": "<|im_end|>", "chosen": "<|im_start|>assistant", "rejected": "<s></s>"},
        '{"prompt": "\\ud800", "answers": ["a", "b"]}', "null", "3", '"x"', "[[[[", "{}", '{"": 1}',
        {"prompt": "x", "answers": "ab"}, {"prompt": None, "answers": None}, {"answers": ["a", "b"]},
        {"prompt": "x", "answers": ["a", "b"], "weight": 10**400},
    ])  # fmt: skip
    done = trivium("score", chain / "out" / "rm", rows)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert len(lines) == 18
    assert [line["origin"].rsplit(":", 1)[1] for line in lines] == [str(n) for n in range(1, 19)]
    for line in lines:
        assert set(line) - {"origin"} in ({"reward"}, {"rewards"}, {"reason"})
        assert all(abs(r) < 1e6 for r in line.get("rewards", []))
    assert "rewards" in lines[0]
    assert "rewards" in lines[6]


# --- mistakes of recipes: each is seen before anything is trained


def recipe_of(stage: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"name": "bad", "model": MODEL, "stages": [BASE, {**ALIGNED, "from": "base", **stage}], **top}


def judged(judge: Any, **top: Any) -> dict[str, Any]:
    stages = top.pop("stages", [BASE, {**REWARD, "from": "base"}, {**ALIGNED, "from": "base"}])
    return {"name": "bad", "model": MODEL, "stages": stages, "judge": judge, **top}


PRE = {"stage": "preference"}
RECIPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{f"beta {v}": (recipe_of({"beta": v}), ["stages.aligned.beta", str(v)]) for v in (0, NAN, -1, INF)},
    "beta of text": (recipe_of({"beta": "é"}), ["stages.aligned.beta", "'é'", "number"]),
    "beta of a list": (recipe_of({"beta": [1]}), ["stages.aligned.beta", "number"]),
    "a misspelt loss": (recipe_of({"loss": "dpoo"}), ["stages.aligned", "not dpoo; did you mean 'dpo'?"]),
    "a loss in capitals": (recipe_of({"loss": "DPO"}), ["not DPO; did you mean 'dpo'?"]),
    "the loss of TRL": (recipe_of({"loss": "sigmoid"}), ["not sigmoid; it is called dpo here"]),
    "the KTO of TRL": (recipe_of({"loss": "kto_pair"}), ["not kto_pair; it is called kto here"]),
    "SFT as a loss": (recipe_of({"loss": "sft"}), ["sft_weight beside another loss"]),
    "a reward loss": (recipe_of({"loss": "bradley_terry"}), ["not bradley_terry"]),
    "a loss of a number": (recipe_of({"loss": 5}), ["stages.aligned.loss"]),
    "a loss of a list": (recipe_of({"loss": ["dpo"]}), ["stages.aligned.loss"]),
    "gamma on dpo": (recipe_of({"gamma": 1.0}), ["gamma: dpo has no such setting; it is for simpo"]),
    "no smoothing of exo": (recipe_of({"loss": "exo", "label_smoothing": 0}), ["label_smoothing: exo needs one"]),
    "all labels wrong": (recipe_of({"label_smoothing": 0.5}), ["stages.aligned.label_smoothing", "less than 0.5"]),
    "smoothing of hinge": (recipe_of({"loss": "hinge", "label_smoothing": 0.1}), ["hinge has no such setting"]),
    "kto mixed": (recipe_of({"loss": {"dpo": 1, "kto": 1}}), ["only losses of pairs can be mixed"]),
    "a negative weight": (recipe_of({"loss": {"dpo": 1, "hinge": -1}}), ["the weight of hinge is -1"]),
    "a weight of nothing": (recipe_of({"loss": {"dpo": 0}}), ["the weight of dpo is 0"]),
    "a weight of NaN": (recipe_of({"loss": {"dpo": NAN}}), ["the weight of dpo is nan"]),
    "a weight of text": (recipe_of({"loss": {"dpo": "x"}}), ["stages.aligned.loss"]),
    "a misspelt one in a mixture": (recipe_of({"loss": {"dpo": 1, "hinje": 1}}), ["did you mean 'hinge'?"]),
    "no common beta": (recipe_of({"loss": {"dpo": 1, "simpo": 1}}), ["beta: dpo and simpo have different defaults"]),
    "kto one by one": (recipe_of({"loss": "kto", "batch_size": 1}), ["batch_size: kto compares"]),
    "a reference of none": (recipe_of({"loss": "simpo", "reference": "kept"}), ["reference: simpo compares with none"]),
    "a mixup of nothing": (recipe_of({"reference_mixup": 0.5}), ["reference_mixup: without reference_sync_steps"]),
    "a mixup of two": (recipe_of({"reference_mixup": 2, "reference_sync_steps": 1}), ["reference_mixup", "equal to 1"]),
    "a reference that moves and stays": (
        recipe_of({"reference": "kept", "reference_sync_steps": 1}), ["reference: one that moves"]),
    "alpha of no divergence": (recipe_of({"divergence_alpha": 0.5}), ["divergence_alpha: it goes with"]),
    "a divergence without alpha": (recipe_of({"divergence": "alpha"}), ["divergence_alpha: it goes with"]),
    "alpha of NaN": (recipe_of({"divergence": "alpha", "divergence_alpha": NAN}), ["divergence_alpha", "nan"]),
    "a divergence of apo": (recipe_of({"loss": "apo_zero", "divergence": "js"}), ["divergence: apo_zero has no such"]),
    "a negative centre": (recipe_of({**REWARD, "center_rewards": -1}), ["stages.rm.center_rewards", "-1"]),
    "a centre of dpo": (recipe_of({"center_rewards": 0.1}), ["center_rewards: dpo has no such setting"]),
    "dpo in a reward stage": (recipe_of({**REWARD, "loss": "dpo"}), ["a reward stage has bradley_terry, not dpo"]),
    "beta in a reward stage": (recipe_of({**REWARD, "beta": 1.0}), ["beta: bradley_terry has no such setting"]),
    "a reference of rewards": (recipe_of({**REWARD, "reference": "kept"}), ["bradley_terry compares with none"]),
    "preferences of a reward model": (
        judged(None, stages=[BASE, {**REWARD, "from": "base"}, {**ALIGNED, "from": "rm"}]),
        ["stages.aligned.from", "'rm' is a reward model", "start from what rm was made of"]),
    "a reward stage on a new model": (
        judged(None, stages=[{**REWARD, "from": None}]), ["stages.rm", "no tokenizer", "pretrain"]),
    "a judge that is nobody": (judged({"reward": "rmm"}), ["rmm: no such model folder"]),
    "a judge of another folder": (judged({"reward": "."}), ["no reward model", "a reward stage (there are: rm)"]),
    "a judge that is a file": (judged({"reward": "./pairs.jsonl"}), ["pairs.jsonl: not a model"]),
    "a judge that is another stage": (judged({"reward": "base"}), ["judge.reward: stage 'base' gives no rewards"]),
    "a judge that comes later": (
        judged({"reward": "rm"}, stages=[BASE, {**ALIGNED, "from": "base"}, {**REWARD, "from": "base"}]),
        ["stage 'aligned' comes before 'rm'", "put rm before it"]),
    "both judges": (judged({"reward": "rm", "endpoint": "http://x", "model": "m"}), ["judge: give either"]),
    "no judge": (judged({}), ["judge: give either reward or endpoint"]),
    "a judge's model alone": (judged({"model": "m"}), ["judge: give either reward or endpoint"]),
    "an endpoint alone": (judged({"endpoint": "http://x/v1"}), ["endpoint and model go together"]),
    "an endpoint that is none": (judged({"endpoint": "x", "model": "m"}), ["the judge's url is 'x'"]),
    "a judge of text": (judged("rm"), ["judge: 'rm' is no judge", "write judge: {reward: NAME}"]),
    "a judge of a list": (judged(["rm"]), ["judge:"]),
    "a misspelt judge": (judged({"rewards": "rm"}), ["unknown key judge.rewards; did you mean 'reward'?"]),
    "fewer than no prompts": (judged(None, judge_prompts=-1), ["judge_prompts", "-1"]),
    "prompts of a fraction": (judged(None, judge_prompts=1.5), ["judge_prompts"]),
}  # fmt: skip


def run(here: Path, trivium: Callable[..., Any], recipe: dict[str, Any]) -> Any:
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    done = trivium("run", path, "--out", here / "out")
    assert "Traceback" not in done.err
    return done


@pytest.mark.parametrize("name", RECIPES)
def test_a_mistake_of_a_recipe_is_named_before_anything_is_trained(name, here, trivium, quick):
    recipe, says = RECIPES[name]
    done = run(here, trivium, recipe)
    check(done, *says)
    assert quick() < 2
    assert "step 1/" not in done.err
    assert not list(here.glob("out/*"))


def test_a_judge_that_writes_is_found_out_before_training(here, walk, trivium):
    """Every kind of folder of a language model."""
    for name in ("base", "chat", "tutor"):
        done = run(here, trivium, judged({"reward": str(walk.folder / name)}))
        check(done, f"judge.reward: {walk.folder / name} is no reward model", "there are: rm")
        assert "step 1/" not in done.err


@pytest.mark.parametrize("stage", [{"loss": ""}, {"loss": {}}], ids=["without a name", "a mixture of nothing"])
def test_a_loss_that_names_none(stage, here, trivium):
    done = run(here, trivium, recipe_of(stage))
    check(done, "stages.aligned", "loss")
    assert "step 1/" not in done.err


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"reference": "computed"}, ["stages.aligned.reference", "full training", "kept"]),
        ({"reference_sync_steps": 1, "method": "prefix"}, ["stages.aligned.reference_sync_steps", "prefix"]),
    ],
)
def test_a_reference_that_cannot_be_is_told_before_the_stages_before_it_are_trained(stage, says, here, trivium):
    done = run(here, trivium, recipe_of(stage))
    check(done, *says)
    assert "step 1/" not in done.err


def test_an_architecture_without_reward_models_is_told_before_training(here, trivium):
    stages = [BASE, {**REWARD, "from": "base"}]
    done = run(here, trivium, {"name": "x", "model": {**MODEL, "architecture": "granite"}, "stages": stages})
    check(done, "no sequence-classification model of this architecture", "another base")
    assert "step 1/" not in done.err


def test_a_reward_model_is_trained_on(chain, here, trivium):
    """From a folder, with its recipe's defaults: it is asked no prompts."""
    for name in ("rm", "small"):
        stage = {**REWARD, "name": "more", "from": None, "max_steps": 1}
        done = run(here, trivium, {"name": "x", "model": str(chain / "out" / name), "stages": [stage]})
        assert done.code == 0, done.err
        shutil.rmtree(here / "out")


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_words_of_a_reward_model_s_folder(chain, here, trivium, stage):
    rows = {"sft": "chats.jsonl", "preference": "pairs.jsonl"}[stage]
    recipe = {"name": "x", "model": str(chain / "out" / "rm"), "stages": [{"name": "s", "stage": stage, "data": rows}]}
    check(run(here, trivium, recipe), "rm is a reward model", "has no words left to train", "start stages.s from")


# --- mistakes of rows

PAIR = {"prompt": "red", "chosen": "cat", "rejected": "dog"}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "one answer twice": ({}, {**PAIR, "rejected": "cat"}, ["chosen and rejected are the same"]),
    "an empty answer": ({}, {**PAIR, "rejected": " "}, ["empty answer: 'rejected'"]),
    "no common prompt": ({}, {"chosen": "cat", "rejected": "dog"}, ["a pair without a prompt: add 'prompt'"]),
    "conversations that begin apart": (
        {}, {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
             "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}]},
        ["without a common prompt"]),
    "ratings for dpo": ({}, {"prompt": "red", "completion": "cat", "label": True}, ["a rating", "loss: kto"]),
    "conversations for dpo": ({}, {"messages": [{"role": "user", "content": "x"}]}, ["rows.jsonl:1", "preference"]),
    "ratings for rewards": (REWARD, {"prompt": "red", "completion": "cat", "label": True}, ["a rating"]),
    "only good ratings": (
        {"loss": "kto"}, {"prompt": "red", "completion": "cat", "label": True}, ["rated good", "sft stage"]),
    "only bad ratings": ({"loss": "kto"}, {"prompt": "red", "completion": "cat", "label": 0}, ["rated bad"]),
    "a verdict that is none": ({"loss": "kto"}, {"prompt": "red", "completion": "cat", "label": "good"}, [":1"]),
    "a weight of nothing": ({}, {**PAIR, "weight": 0}, ["the row's weight is 0", "above 0"]),
    "a negative weight": ({}, {**PAIR, "weight": -1e300}, ["the row's weight is -1e+300"]),
    "a weight of text": ({}, {**PAIR, "weight": "heavy"}, ["'weight' is \"heavy\", not a finite number"]),
    "an endless weight": ({}, {**PAIR, "weight": 10**400}, ["not a finite number"]),
    "a margin of a list": ({}, {**PAIR, "margin": [1]}, ["'margin' is [1], not a finite number"]),
    "a margin of text": (REWARD, {**PAIR, "margin": "wide"}, ["'margin' is"]),
    "equal scores": ({}, {"prompt": "red", "answers": ["a", "b"], "scores": [1, 1]}, ["the same score"]),
    "fewer scores": ({}, {"prompt": "red", "answers": ["a", "b"], "scores": [1]}, ["2 answers", "1 scores"]),
    "a score of text": ({}, {"prompt": "red", "answers": ["a", "b"], "scores": ["x", 1]}, ["the score of answer 1"]),
    "one answer": (REWARD, {"prompt": "red", "answers": ["a"], "scores": [1]}, ["only one answer"]),
    "half a character": ({}, {**PAIR, "chosen": "\ud800"}, ["half a character"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_cannot_be_used_are_named(name, walk, tmp_path, trivium):
    stage, row, says = ROWS[name]
    rows = [json.loads(json.dumps(row).replace('"red"', f'"red {n}"')) for n in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    stage = {**ALIGNED, **stage, "from": None, "data": "rows.jsonl"}
    recipe = {"name": "x", "model": str(walk.folder / "base"), "stages": [stage], "prompts": []}
    done = run(tmp_path, trivium, recipe)
    check(done, "rows.jsonl", *says)
    assert "step 1/" not in done.err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_pairs_are_ratings_too(loss, walk, here, trivium):
    rated = [{"prompt": f"red {n}", "completion": "old cat", "label": n % 2 == 0} for n in range(12)]
    write_rows(here / "rated.jsonl", rated)
    data = ["pairs.jsonl", "rated.jsonl"] if loss == "kto" else ["pairs.jsonl"]
    stage = {**ALIGNED, "from": None, "loss": loss, "data": data}
    recipe = {"name": "x", "model": str(walk.folder / "base"), "stages": [stage], "prompts": []}
    done = run(here, trivium, recipe)
    assert done.code == 0, done.err


def test_a_beta_beyond_numbers_is_not_blamed_on_the_parent(walk, tmp_path, trivium):
    write_rows(tmp_path / "rows.jsonl", [{**PAIR, "prompt": f"{n}"} for n in range(8)])
    stage = {**ALIGNED, "from": None, "data": "rows.jsonl", "eval_data": 0, "loss": "ipo", "beta": 1e-308}
    recipe = {"name": "x", "model": str(walk.folder / "base"), "stages": [stage], "prompts": []}
    check(run(tmp_path, trivium, recipe), "ipo", "beyond what numbers can hold", "beta: 0.1")


def test_numbers_too_large_to_train_on_are_told_as_such(walk, tmp_path, trivium):
    write_rows(tmp_path / "rows.jsonl", [{**PAIR, "prompt": f"{n}", "weight": 1e308} for n in range(8)])
    stage = {**ALIGNED, "from": None, "data": "rows.jsonl", "eval_data": 0}
    recipe = {"name": "x", "model": str(walk.folder / "base"), "stages": [stage], "prompts": []}
    done = run(tmp_path, trivium, recipe)
    check(done, "not finite", "rows.jsonl", code=5)
