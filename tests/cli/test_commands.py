"""The commands as people and pipes use them: help, inspect, generate, chat, the live line, an interruption."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

COMMAND = [sys.executable, "-c", "from trivium.cli.main import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "TERM": "xterm"}


@pytest.mark.parametrize("command", [[], ["run"], ["demo"], ["generate"], ["chat"], ["inspect"], ["report"]])
def test_help(command, trivium):
    done = trivium(*command, "--help")
    assert done.code == 0
    assert "Usage:" in done.out
    listed = ["run", "generate", "chat", "inspect", "report"] if not command else ["--help"]
    assert all(word in done.out for word in listed)
    assert done.err == ""


def test_help_answers_at_once():
    code = "import sys\nsys.argv = ['trivium', '--help']\nfrom trivium.cli.main import main\n"
    code += "try:\n    main()\nfinally:\n    print('MODULES', *sys.modules)\n"
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        taken.append(time.perf_counter() - started)
        if taken[-1] < 0.5:
            break
    loaded = set(done.stdout.split("MODULES")[1].split())
    assert not loaded & {"torch", "transformers", "numpy", "pyarrow", "pydantic", "yaml", "tokenizers"}
    assert min(taken) < 0.5


@pytest.mark.parametrize(
    "arguments", [["trian"], ["run"], ["generate"], ["inspect", ".", "b"], ["run", "x", "--bogus"]]
)
def test_wrong_use_is_exit_code_2(arguments, trivium):
    done = trivium(*arguments)
    assert done.code == 2
    assert "Usage:" in done.err
    assert "Traceback" not in done.err


# --- report


def test_report(walk, trivium, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    one, two = (Path(shutil.copytree(walk.folder, tmp_path / name)) for name in ("one", "two"))
    (one / "report.html").unlink()
    done = trivium("report", one)
    assert (done.code, done.out, done.err) == (0, f"{one / 'report.html'}\n", "")
    assert (one / "report.html").is_file()
    done = trivium("report", one, two)
    assert (done.code, done.out) == (0, "report.html\n")
    assert "one against two" in (tmp_path / "report.html").read_text(encoding="utf-8")
    done = trivium("report", one, "--out", tmp_path / "new" / "x.html")
    assert done.code == 0
    assert (tmp_path / "new" / "x.html").is_file()


@pytest.mark.parametrize("runs", [["nowhere"], ["one", "one"], ["."]])
def test_report_of_what_is_no_run(runs, walk, trivium, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").symlink_to(walk.folder)
    done = trivium("report", *runs, "--out", tmp_path / "x.html")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 2
    assert not (tmp_path / "x.html").exists()


def test_a_report_of_every_run(walk):
    page = (walk.folder / "report.html").read_text(encoding="utf-8")
    for name in ("base", "chat", "aligned", "tutor", "judged", "whole", "again"):
        assert f"Loss of {name}" in page
    answers = page.partition('<section id="answers">')[2]
    assert answers.count('<div class="answer ') == 3 * 7, "three prompts, seven models"
    assert "Before and after preference tuning" in page
    assert "The same prompts, after each step" in page


# --- inspect


@pytest.mark.parametrize(
    ("name", "kind", "key"),
    [("base", "model", "total"), ("aligned", "adapter", "trained"), ("judged", "adapter", "trained")],
)
def test_inspect(name, kind, key, walk, trivium):
    done = trivium("inspect", walk.folder / name, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    record = walk.record(name)
    own = record[f"{key}_parameters"]
    assert (found["kind"], found["parameters"], found["dtype"]) == (kind, own, "F32")
    assert found["bytes"] == record["bytes_on_disk"]
    assert found["lineage"] == record["lineage"]
    assert found["metrics"] == record["metrics"]
    text = trivium("inspect", walk.folder / name).out
    assert f"{own:,} (F32)" in text
    for link in record["lineage"]:
        assert f"{link['name']} ({link['stage']}" in text
        assert link["identity"][:12] in text
    if kind == "adapter":
        assert Path(found["base"]).resolve() == walk.folder / "base"
        assert f"after       loss {record['metrics']['after_loss']:.4f}" in text


def test_inspect_a_folder_made_elsewhere(walk, tmp_path, trivium):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(walk.folder / "base").save_pretrained(tmp_path / "given")
    found = json.loads(trivium("inspect", tmp_path / "given", "--json").out)
    assert (found["kind"], found["architecture"]) == ("model", "llama")
    assert "lineage" not in found


# --- generate and chat


@pytest.mark.parametrize("name", ["base", "aligned", "judged"])
def test_generate(name, walk, trivium):
    folder = walk.folder / name
    one, other = (trivium("generate", folder, "red cat", "--max-new-tokens", 8) for _ in range(2))
    assert one.code == 0
    assert one.err == "", "no library has anything to say"
    assert one.out == other.out, "greedy by default"
    assert one.out.endswith("\n")
    assert "<|" not in one.out


def test_generate_samples_by_seed(walk, trivium):
    def said(*more: object) -> str:
        return trivium("generate", walk.folder / "aligned", "red", "--max-new-tokens", 12, *more).out

    hot = ["--temperature", 2.0, "--seed"]
    assert said(*hot, 1) == said(*hot, 1)
    assert len({said(*hot, seed) for seed in range(4)}) > 1
    assert said("--temperature", 1e-40) == said("--temperature", 0), "next to 0 is as good as 0"


def test_generate_raw_goes_on_with_the_text(walk, trivium, monkeypatch):
    """Against `transformers`' own greedy search, with the template and without."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, tokenizer = (c.from_pretrained(walk.folder / "base") for c in (AutoModelForCausalLM, AutoTokenizer))

    def theirs(text: str) -> str:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[
            0, ids.shape[1] :
        ]
        return tokenizer.decode(out, skip_special_tokens=True) + "\n"

    few = ["--max-new-tokens", 6]
    assert trivium("generate", walk.folder / "base", "red cat", *few, "--raw").out == theirs("<|begin|>red cat")
    asked = theirs("<|begin|><|user|>red cat<|end|><|assistant|>")
    assert trivium("generate", walk.folder / "base", "red cat", *few).out == asked
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"red cat")))
    assert trivium("generate", walk.folder / "base", "-", *few).out == asked


def test_chat_reads_a_pipe(walk, trivium, monkeypatch):
    def said(text: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        done = trivium("chat", walk.folder / "chat", "--max-new-tokens", 5, "--temperature", 0)
        assert done.code == 0, done.err
        return done.out.split("\n")

    one, two = said("red cat\n"), said("red cat\nblue dog\n")
    assert len(two) == len(one) + 1, "an answer to each line"
    assert two[0] == one[0]
    assert said("red cat\n\nblue dog\n") == one, "an empty line ends"
    assert said("") == [""]


def test_chat_remembers_what_was_said(walk, trivium, monkeypatch):
    from trivium.talk import Talker

    asked: list[list[dict[str, str]]] = []
    prompt = Talker.prompt

    def spy(self, messages):
        asked.append([dict(m) for m in messages])
        return prompt(self, messages)

    monkeypatch.setattr(Talker, "prompt", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("red\nblue\n"))
    trivium("chat", walk.folder / "chat", "--max-new-tokens", 3, "--system", "small")
    assert [m["role"] for m in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][0]["content"] == "small"
    assert asked[1][3]["content"] == "blue"


# --- what a run shows, and how it ends


def recipe_in(folder: Path, data: Path, base: Path, steps: int) -> Path:
    path = folder / "recipe.yaml"
    common = {"stage": "sft", "data": str(data / "chats.jsonl"), "batch_size": 2, "eval_data": 0, "method": "lora"}
    stages = [{"name": "one", **common, "max_steps": 1}, {"name": "two", "from": "one", **common, "max_steps": steps}]
    path.write_text(yaml.safe_dump({"name": "shown", "model": str(base), "stages": stages}), encoding="utf-8")
    return path


def test_without_a_terminal_there_are_plain_lines(walk):
    assert "\r" not in walk.said
    assert "\x1b" not in walk.said
    lines = re.findall(r"(?m)^  chat  step (\d)/2  loss \d\.\d{4}  [\d,]+ tokens/s  \d+ MB  \d:\d\d left$", walk.said)
    assert lines == ["1", "2"]
    assert re.search(r"(?m)^  aligned  step 2/2  loss .*accuracy \d\.\d{3}  margin -?\d\.\d{3}", walk.said)


def test_in_a_terminal_there_is_one_live_line(walk, data, tmp_path):
    import pty

    path = recipe_in(tmp_path, data, walk.folder / "base", steps=3)
    ours, theirs = pty.openpty()
    command = [*COMMAND, "run", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRONMENT)
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "\r\x1b[2K  two  step 1/3" in text, "each step is written over the one before"
    assert re.search(r"\x1b\[2K  two  step 3/3  [^\n]*\r?\n", text), "the last one stays"
    assert b"step" not in out
    assert b"summary.json" in out, "results go to standard output"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_keeps_finished_stages(number, walk, data, tmp_path):
    path = recipe_in(tmp_path, data, walk.folder / "base", steps=100_000)
    command = [*COMMAND, "run", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    for line in process.stderr:
        if "two  step 1/" in line:
            break
    process.send_signal(number)
    said = process.stderr.read()
    assert process.wait(timeout=30) == 75
    where = r"error: interrupted at step \d+ of 100000 of two, which is saved\n  run the same command again to go on\n$"
    assert re.search(where, said), said
    assert "Traceback" not in said
    left = sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != "one.training")
    assert left == ["measures.json", "one", "report.html", "summary.json", "two.training"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [s["name"] for s in summary["stages"]] == ["one"]


def test_a_reader_that_goes_away_gets_no_traceback(walk):
    process = subprocess.Popen([*COMMAND, "inspect", str(walk.folder / "base"), "--json"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=ENVIRONMENT)  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=60)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_cannot_be_written_is_a_clear_error(walk):
    with Path("/dev/full").open("w") as full:
        process = subprocess.run([*COMMAND, "inspect", str(walk.folder / "base")], stdout=full, stderr=subprocess.PIPE,
                                 env=ENVIRONMENT, text=True, check=False)  # fmt: skip
    assert process.returncode == 3, process.stderr
    assert process.stderr.startswith("error: the output cannot be written (No space left on device)\n")
    assert "Traceback" not in process.stderr
