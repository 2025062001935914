"""Base models from folders, GGUF files and the hub, through `transformers`; nothing in a folder is ever run.

Only safetensors and GGUF weights are read: never pickle, never remote code.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trivium.errors import ModelError, beside, said
from trivium.files import exists
from trivium.model.door import Extra, config_of, fetched, model_of, ready, tokenizer_of
from trivium.model.headers import check_gguf
from trivium.model.language_model import LanguageModel
from trivium.model.named import there
from trivium.model.untrusted import check_files, check_folder, check_settings
from trivium.virtual import NEW_HEADS

# What transformers says at length: a part of it, and what it means to a person.
KNOWN = (
    ("ignore_mismatched_sizes", "its weights do not have the shapes that its config.json gives", "restore both files"),
    (
        "does not recognize this architecture",
        "transformers does not know the model_type that its config.json gives",
        "a newer transformers may know it: pip install -U transformers",
    ),
    (
        "for this kind of AutoModel: AutoModelForCausalLM",
        "not a causal language model",
        "give a model that writes text from left to right",
    ),
    ("instantiate the backend tokenizer", "no tokenizer in it", "copy the model's tokenizer.json beside config.json"),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings or progress bars from libraries that the user can do nothing about."""
    import logging

    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings(), _no_gguf_bar():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """The one progress bar of transformers that asks no setting of its: that of reading GGUF weights."""
    module = sys.modules.get("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(module, "tqdm", None)
    if bar is None:
        yield
        return
    module.tqdm = lambda values, **_: values  # type: ignore[union-attr]
    try:
        yield
    finally:
        module.tqdm = bar  # type: ignore[union-attr]


def load_base(source: str, dtype: str, device: str, overrides: dict[str, Any] | None = None) -> LanguageModel:
    """A whole model: ``source`` is a folder, a ``.gguf`` file, or a hub id; ``dtype`` is that of the computation.

    ``overrides`` change settings of its config. Raises ModelError where it is not there or cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    ready()
    where, extra = locate(source)
    gguf = bool(extra)
    if gguf:
        with contextlib.suppress(ImportError):  # before `quiet`, which hides the bar that is in it
            importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with quiet(), clear_errors_of(source):
        where, extra = fetched(where, extra, weights=True)
        config = config_of(where, extra)
        saved = getattr(config, "dtype", None) if not gguf else None
        check_settings(Path(source) / "config.json", overrides or {})
        for key, value in (overrides or {}).items():
            if not hasattr(config, key):
                raise ModelError(f"{source}: its config has no '{key}' to override", "remove it from `model`")
            setattr(config, key, value)
        tokenizer = tokenizer_of(where, extra)
        kind = AutoModelForSequenceClassification if _gives_rewards(source, config) else AutoModelForCausalLM
        hf, info = model_of(kind, where, extra, config, getattr(torch, dtype))
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source}: its weights lack {len(missing)} tensors, e.g. {missing[0]}", "use a complete model folder"
        )
    if kind is AutoModelForSequenceClassification:
        if not isinstance(getattr(hf, "score", None), torch.nn.Linear):
            what = f"{source}: {type(hf).__name__} reads both ways, or has another readout than a score"
            raise ModelError(what, "give a reward model made of a causal language model")
        setattr(hf, NEW_HEADS, ("score",))
    if gguf and hasattr(hf.config, "quantization_config"):
        # GGUF is dequantised on loading; saving it would claim otherwise
        del hf.config.quantization_config
        hf.hf_quantizer = None
    return wrap(hf.to(device).eval(), tokenizer, dtype, getattr(torch, str(saved or "float32").removeprefix("torch.")))


def _gives_rewards(source: str, config: Any) -> bool:
    """Whether a config is that of a reward model. Raises ModelError for a classifier of another kind."""
    named = str((getattr(config, "architectures", None) or [""])[0])
    if not named.endswith("ForSequenceClassification"):
        return False
    if config.num_labels != 1:
        what = f"{source}: a classifier of {config.num_labels} labels, where a reward model has one"
        raise ModelError(what, "give a language model, or a reward model")
    return True


def shape_of(source: str) -> Any:
    """A model without weights, on the ``meta`` device, from its config alone: a folder (one that has nothing else
    will do), a ``.gguf`` file, or a hub id. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet(), clear_errors_of(source):
        config = config_of(*settings_at(source))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def settings_at(source: str) -> tuple[str, Extra]:
    """What ``config_of`` and ``tokenizer_of`` are given, where no weights are asked for. Raises ModelError."""
    path = Path(source).expanduser()
    if (path / "config.json").exists():
        check_files(path)
        return str(path), {}
    return fetched(*locate(source))


def wrap(hf: Any, tokenizer: Any, dtype: str, saved_dtype: Any) -> LanguageModel:
    """A `transformers` model with its tokenizer, as the rest of trivium uses it; its own dropout off."""
    import torch

    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    native = hf.config._attn_implementation
    return LanguageModel(hf, tokenizer, getattr(torch, dtype), saved_dtype, native_attention=native)


def locate(source: str) -> tuple[str, Extra]:
    """(what ``from_pretrained`` is given, its extra arguments); raises ModelError for what is not a model."""
    path = Path(source).expanduser()
    if exists(path) and path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: not a model", "give a model folder, a .gguf file, or a hub id")
        if path.open("rb").read(4) != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file (its first bytes are not GGUF)", "download it again")
        check_gguf(path)
        if (path.parent / "adapter_config.json").exists():  # transformers would load the base that it names instead
            what = f"{path}: there is an adapter_config.json beside it"
            raise ModelError(what, "put the .gguf file into a folder of its own")
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ModelError(f"{path}: reading GGUF needs a package", 'pip install "trivium[gguf]"') from None
        return str(path.parent), {"gguf_file": path.name}
    if exists(path) and path.is_dir():
        _check_folder(path)
        return str(path), {}
    if exists(path):  # a pipe, a socket, a device
        raise ModelError(f"{path}: not a model", "give a model folder, a .gguf file, or a hub id")
    there(source)
    offline_where_unreachable()
    return source, {}


def offline_where_unreachable() -> None:
    """Where the hub has no address, its client uses only its cache, instead of half a minute of silent retries."""
    from huggingface_hub import constants

    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in proxies):
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _check_folder(path: Path) -> None:
    names = {p.name for p in path.iterdir()}
    if "config.json" not in names:
        held = ", ".join(sorted(names)[:6]) or "nothing"
        raise ModelError(
            f"{path}: not a model folder, it has no config.json (it has: {held})", "give the model's folder"
        )
    if not any(n.endswith(".safetensors") for n in names):
        pickled = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")))
        if pickled:
            raise ModelError(
                f"{path}: weights only as {pickled[0]}, which can run code when opened",
                "convert it once with transformers: model.save_pretrained(folder) writes safetensors",
            )
        raise ModelError(
            f"{path}: a model folder without weights (no .safetensors)", "copy the weights beside config.json"
        )
    check_folder(path)


@contextlib.contextmanager
def clear_errors_of(source: str) -> Iterator[None]:
    """One line for whatever a library raises over a model folder."""
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        package = getattr(error, "name", None) or said(error, 80)
        raise ModelError(f"{source}: reading it needs a package: {package}", f"pip install {package}") from None
    except RecursionError:
        raise ModelError(f"{source}: its files are nested too deeply", "restore the folder") from None
    except Exception as error:  # transformers raises anything from KeyError to SafetensorError here
        if not (path := Path(source).expanduser()).exists():
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            remedy = f"check the id and the network; a local model is given by its folder{beside(path)}"
            raise ModelError(f"{source}: no such folder, and the hub did not give it{offline}", remedy) from None
        if "trust_remote_code" in str(error) or "remote code" in str(error):
            remedy = "trivium runs no code from model folders; use a model that transformers itself knows"
            raise ModelError(f"{source}: its architecture needs code of its own", remedy) from None
        for sign, what, remedy in KNOWN:
            if sign in str(error):
                raise ModelError(f"{source}: {what}", remedy) from None
        raise ModelError(
            f"{source}: cannot be loaded: {said(error)}", "check that the folder is whole and its files match"
        ) from None
