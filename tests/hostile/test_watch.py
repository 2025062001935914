"""The watcher sees what it is there to see: each kind of event once, done on purpose; and a sound folder has none."""

from __future__ import annotations

import contextlib
import ctypes
import io
import marshal
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.hostile.conftest import ways_in
from tests.hostile.spoil import code_in, device, pickle_in
from tests.hostile.watch import Ground, watched

pytestmark = pytest.mark.promise(18)


def imported(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    __import__("evil")


def spawned() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def forked() -> None:
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)


def loaded(folder: Path) -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL(str(folder / "other.so"))


def connected() -> None:
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))


def bound() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))


def seek_name() -> None:
    with contextlib.suppress(OSError):
        socket.getaddrinfo("no.such.host.invalid", 443)


# event: (what is done, given the folder and what lies outside; what the fault holds)
EVENTS = {
    "open outside": (lambda f, out: out.read_text(), "is outside"),
    "open through a link": (lambda f, out: (f / "link.json").read_text(), "is outside"),
    "open a device": (lambda f, out: (f / "zero.json").open("rb").read(1), "is outside"),
    "open by number": (lambda f, out: os.close(os.open(out, os.O_RDONLY)), "is outside"),
    "write outside": (lambda f, out: out.write_text("x"), "is written"),
    "write into the folder": (lambda f, out: (f / "new.json").write_text("x"), "is written"),
    "append by number": (lambda f, out: os.open(out, os.O_WRONLY | os.O_APPEND), "is written"),
    "remove": (lambda f, out: out.unlink(), "os.remove"),
    "rename": (lambda f, out: out.rename(out.parent / "y"), "os.rename"),
    "make a folder": (lambda f, out: (out.parent / "new").mkdir(), "os.mkdir"),
    "link": (lambda f, out: (out.parent / "l").symlink_to(out), "os.symlink"),
    "truncate": (lambda f, out: os.truncate(out, 1), "os.truncate"),
    "change rights": (lambda f, out: out.chmod(0o600), "os.chmod"),
    "open code": (lambda f, out: (f / "evil.py").read_text(), "is code"),
    "open a pickle": (lambda f, out: (f / "weights.bin").read_bytes(), "is code"),
    "import": (lambda f, out: imported(f), "evil.py"),
    "compile": (lambda f, out: compile("1", str(f / "evil.py"), "exec"), "compile"),
    "exec": (lambda f, out: exec(compile("1", str(f / "evil.py"), "exec")), "exec: code of"),
    "unpickle": (lambda f, out: pickle.load(io.BytesIO(pickle.dumps(Path))), "pickle.find_class"),
    "marshal": (lambda f, out: marshal.loads(marshal.dumps(1)), "marshal.loads"),
    "start a process": (lambda f, out: subprocess.run(["/bin/true"], check=False), "subprocess.Popen"),
    "a shell": (lambda f, out: os.system("true"), "os.system"),
    "spawn": (lambda f, out: spawned(), "os.posix_spawn"),
    "fork": (lambda f, out: forked(), "os.fork"),
    "connect": (lambda f, out: connected(), "socket.connect"),
    "bind": (lambda f, out: bound(), "socket.bind"),
    "look up a name": (lambda f, out: seek_name(), "socket.getaddrinfo"),
    "load a library": (lambda f, out: loaded(f), "ctypes.dlopen"),
    "open bait in Rust": (lambda f, out: safe_open(f / "bait.safetensors", "pt").keys(), "opened: "),
    "hang": (lambda f, out: time.sleep(60), "hangs"),
    "end": (lambda f, out: os.kill(os.getpid(), 9), "ended with -9"),
}  # fmt: skip


@pytest.fixture
def ground(tmp_path: Path) -> tuple[Path, Path, Ground]:
    folder, run, out = (tmp_path / name for name in ("folder", "run", "out"))
    for made in (folder, run, out):
        made.mkdir()
    (out / "x.txt").write_text("secret")
    (folder / "link.json").symlink_to(out / "x.txt")
    device(folder / "zero.json")
    code_in(folder)
    pickle_in(folder, "weights.bin")
    (folder / "other.so").write_bytes(b"no library")
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"a": zeros(1)}, folder / "bait.safetensors")
    return folder, out / "x.txt", Ground((folder,), run, bait=(folder / "bait.safetensors",))


@pytest.mark.parametrize("event", EVENTS)
def test_what_must_be_seen_is_seen(event, ground, monkeypatch):
    monkeypatch.setattr("tests.hostile.watch.HANGS_SECONDS", 0.5 if event == "hang" else 30.0)
    act, told = EVENTS[event]
    folder, out, where = ground
    seen = watched([lambda: act(folder, out)], where)
    assert any(told in fault for fault in seen.faults), seen


def test_what_is_allowed_is_no_fault(ground):
    folder, _, where = ground
    (folder / "config.json").write_text("{}")

    def act() -> None:
        (folder / "config.json").read_text()
        (where.run / "deep").mkdir()
        (where.run / "deep" / "x.json").write_text("{}")
        (where.run / "deep" / "x.json").rename(where.run / "y.json")

    seen = watched([act], where)
    assert (seen.faults, seen.ended) == ([], [(0, "")])


def test_memory_that_is_taken_is_counted(ground):
    seen = watched([lambda: print(len(b"x" * (300 << 20)))], ground[2])
    assert seen.grown > 250 << 20


def test_a_traceback_is_exit_code_1(ground):
    code, said = watched([lambda: print(1 / 0)], ground[2]).ended[0]
    assert code == 1
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_a_sound_folder_is_opened_in_every_way(kind, sound, tmp_path):
    """The same commands, the same watcher: what refuses a spoilt folder lets a sound one pass, and sees nothing."""
    folder = sound.copy(kind, tmp_path)
    seen = watched(ways_in(folder, tmp_path, sound), Ground((folder, sound.here), tmp_path))
    codes = [code for code, _ in seen.ended]
    assert codes == [0, 0, 0, 0, 2, 0, 0][: len(codes)], seen.ended  # it is no reward model
    assert seen.faults == [], "\n".join(seen.faults)


def test_this_process_is_as_it_was(sound):
    """What the fixture runs in this process must not change it: signals that are ignored are so in every child."""
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
