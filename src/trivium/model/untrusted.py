"""A folder from elsewhere is looked at here before any library opens it: nothing in it may run, lead out, or lie.

    check_folder(Path("given"))         # a model: files, settings, headers of the weights, sizes against the weights
    check_files(Path("given"))          # a tokenizer or an adapter: files and settings

Every file that will be read is a regular one, in the folder (or in the hub cache's own ``blobs``), and no larger than
such files are. No setting names code, a class or a file: `transformers` 5 would import modules for ``auto_map``, fetch
and run kernels for ``attn_implementation: owner/kernel``, and unpickle for ``transformers_weights: adapter_model.bin``.
Weights are safetensors whose headers add up, and the sizes in config.json are such that the weights can have them.

Cost: milliseconds. tokenizer.json is only searched for its patterns; no tensor is read.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trivium.errors import ModelError
from trivium.files import read_json
from trivium.model.headers import header
from trivium.model.vocabulary import check_ids
from trivium.terminal import size

READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")  # what is read of a folder, or hashed
TEMPLATES = "additional_chat_templates"
MOST = {".json": 256 * 2**20, ".jinja": 2**20, ".model": 256 * 2**20, ".txt": 256 * 2**20, ".tiktoken": 64 * 2**20}
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json",
)  # fmt: skip
MOST_SETTINGS = 16 * 2**20  # bytes of each
DEEPEST = 32  # levels of a settings file

# What would have code run or a file opened that the folder names, whatever its value (but none, false and empty ones).
CODE = (
    "trust_remote_code", "custom_pipelines", "custom_generate", "_target_", "_class_name", "__class__", "py/object",
    "py/reduce", "use_kernels", "kernel_config", "fusion_config", "distributed_config", "gguf_file",
    "tokenizer_object", "post_processor", "init_inputs",
)  # fmt: skip
# What chooses among things that transformers has, by a plain name; with a slash or colon it would be fetched and run.
PLAIN = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
NAMES = ("model_type", "tokenizer_class", "processor_class", "architectures")  # of classes in transformers
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(?:\.[0-9][A-Za-z0-9_-]*)*")  # also of a model type: qwen2.5, glm4-moe
DTYPE = re.compile(r"(torch\.)?(b?float|u?int|complex)\d+\w*|auto|bool")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
WIDTHS = (
    *HIDDEN, "vocab_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner",
    "ffn_dim", "ffn_hidden_size", "d_ff", *HEADS, *EXPERTS, "head_dim", "n_positions", "n_ctx", "word_embed_proj_dim",
    "max_target_positions",
)  # fmt: skip
SMALL = 2**16  # what any model may say of its sizes; a product of two of them takes no memory to speak of
MOST_NUMBER = 2**40  # of any whole number in a config


def check_folder(folder: Path) -> dict[str, Any]:
    """A whole model's folder; returns what its config.json says. Raises ModelError."""
    check_files(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ModelError(f"{folder}/config.json: no model_type", "give a folder written by transformers")
    weights = {file: header(file) for file in _weights(folder)}
    _check_sizes(folder / "config.json", config, weights)
    return config


def check_files(folder: Path) -> None:
    """Every file that is read of a folder, of whatever it holds, and every setting in it. Raises ModelError."""
    for path in _read_of(folder):
        length = inside(path, folder).stat().st_size
        most = MOST_SETTINGS if path.name in SETTINGS else MOST.get(path.suffix, length)
        if length > most:
            raise ModelError(f"{path}: {size(length)}, where {size(most)} is the most", "restore the file")
    for name in SETTINGS:
        if (folder / name).exists():
            check_settings(folder / name, read_json(folder / name))
    if (folder / "tokenizer.json").exists():
        _check_patterns(folder / "tokenizer.json")
    check_ids(folder)
    _check_known(folder)


def _read_of(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix in READ:
            yield path
    templates = folder / TEMPLATES
    if templates.is_symlink():
        raise ModelError(f"{templates} is a link", "copy the files themselves into the folder")
    if templates.is_dir():
        yield from sorted(templates.glob("*.jinja"))


def inside(path: Path, folder: Path) -> Path:
    """The file itself, where it is a regular one in the folder, or a link of a hub cache to its own blobs.

    Any other link is refused: what a folder says must not decide which other files of this machine are read.
    Raises ModelError.
    """
    root = folder.resolve()
    try:
        real = path.resolve(strict=True)
        kind = real.stat().st_mode
    except (OSError, RuntimeError):  # a loop of links
        raise ModelError(f"{path} is a link to nothing", "restore the file") from None
    blobs = root.parent.parent / "blobs"
    cached = root.parent.name == "snapshots" and real.is_relative_to(blobs)
    if not cached and not real.is_relative_to(root):
        raise ModelError(f"{path} is a link out of its folder", "copy the file itself into the folder")
    if not stat.S_ISREG(kind):
        raise ModelError(f"{path} is no regular file", "restore the file")
    return real


# --- settings


def check_settings(path: Path, value: Any) -> None:
    """What a settings file says, at any depth. Raises ModelError naming the key."""
    if not isinstance(value, dict):
        return  # its reader says so
    for key, found in _entries(path, value):
        if (told := _fault(key, found, path.parent)) is not None:
            remedy = "trivium runs nothing that a folder names; remove the key, or use a model without it"
            raise ModelError(f"{path}: {key}: {str(found)[:60]}: {told}", remedy)


def _entries(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every entry of a mapping, and of those in it; of a list in it, under the list's own key.

    Without recursion, as it may be deep. Raises ModelError where it is deeper than settings are.
    """
    waiting = [("", value, 1)]
    while waiting:
        name, at, depth = waiting.pop()
        if depth > DEEPEST:
            raise ModelError(f"{path}: nested too deeply", "restore the file")
        for key, one in at.items() if isinstance(at, dict) else ((name, one) for one in at):
            if isinstance(at, dict) or isinstance(one, float):
                yield str(key), one
            if isinstance(one, (dict, list)):
                waiting.append((str(key), one, depth + 1))


def _fault(key: str, value: Any, folder: Path) -> str | None:
    """What is wrong with one setting; None: nothing."""
    if key in CODE and value not in (None, False, [], {}, ""):
        return "it names code or a file to be used"
    if key in PLAIN:
        named = value.values() if isinstance(value, dict) else [value]
        if not all(one is None or (isinstance(one, str) and re.fullmatch(r"\w*", one)) for one in named):
            return "it names code that would be fetched and run"
    if key in NAMES and value is not None:
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) and NAME.fullmatch(one) for one in listed):
            return "it is no class of transformers"
    if key in ("dtype", "torch_dtype") and isinstance(value, str) and not DTYPE.fullmatch(value):
        return "it is no dtype of weights"
    if key == "transformers_weights" and value is not None:
        plain = (
            isinstance(value, str) and "/" not in value and value.endswith((".safetensors", ".safetensors.index.json"))
        )
        if not plain or not (folder / str(value)).exists():
            return "it names no safetensors file in this folder"
    if key == "auto_mapping" and isinstance(value, dict):
        library = str(value.get("parent_library") or "transformers.")
        return None if library.startswith("transformers.") else "it names code that is not of transformers"
    if key == "quantization_config" and value is not None:
        return _quantization_fault(value, folder)
    if isinstance(value, float) and math.isnan(value):
        return "it is no number"
    if isinstance(value, int) and abs(value) > MOST_NUMBER and key != "model_max_length":
        return "no size is so large"
    return None


def _quantization_fault(value: Any, folder: Path) -> str | None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    if not isinstance(value, dict):
        return "it holds no settings"
    method = value.get("quant_method")
    if method is None and any(value.get(f"load_in_{bits}bit") is True for bits in (4, 8)):
        method = "bitsandbytes"
    if not isinstance(method, str) or not (method in KNOWN or f"{method}_4bit" in KNOWN):
        return "transformers knows no such way to quantise"
    for key, found in _entries(folder, value):
        for pattern in [key, *(found if isinstance(found, list) else [found])]:
            if isinstance(pattern, str) and can_hang(pattern):
                return f"{pattern[:40]} is a pattern that may never end"
    return None


def _check_known(folder: Path) -> None:
    """What has its code in its folder or on the hub is refused (``auto_map``), unless `transformers` has the same
    itself: it then takes its own, as ``trust_remote_code=False`` has it. Raises ModelError."""
    config, tokenizer = (_told(folder / name) for name in ("config.json", "tokenizer_config.json"))
    remedy = "trivium runs no code from model folders; use a model that transformers itself knows"
    known = bool(config.get("model_type")) and _has_model(config["model_type"])
    if config.get("auto_map") and not known:
        raise ModelError(f"{folder}: its architecture needs code of its own", remedy)
    if tokenizer.get("auto_map") and not known and not _has_tokenizer(tokenizer.get("tokenizer_class")):
        raise ModelError(f"{folder}: its tokenizer needs code of its own", remedy)


def _told(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.exists() else None
    return found if isinstance(found, dict) else {}


def _has_model(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _has_tokenizer(name: str | None) -> bool:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    there = {*TOKENIZER_MAPPING_NAMES.values(), "TokenizersBackend", "PreTrainedTokenizer"}
    return str(name).removesuffix("Fast") in {str(one).removesuffix("Fast") for one in there}


# --- sizes


def _weights(folder: Path) -> list[Path]:
    """The files of weights that `transformers` will read: the whole one, those of the index, or all there are."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    found = sorted(folder.glob("*.safetensors"))
    if index.exists():
        listed = read_json(index)
        parts = listed.get("weight_map") if isinstance(listed, dict) else None
        names = {path.name for path in found}
        if not isinstance(parts, dict) or not {str(name) for name in parts.values()} <= names:
            raise ModelError(f"{index}: names files that are not in this folder", "copy all parts of the model")
        return sorted({folder / str(name) for name in parts.values()})
    return found


def _check_sizes(path: Path, config: dict[str, Any], weights: dict[Path, dict[str, Any]]) -> None:
    """No size is one that the weights cannot have: a layer has a tensor, a number takes a bit at least.

    What a config claims is otherwise allocated, or counted up to, before a tensor is found missing. Raises ModelError.
    """
    tensors = sum(len(one) for one in weights.values())
    bits = 8 * sum(t["data_offsets"][1] - t["data_offsets"][0] for one in weights.values() for t in one.values())
    for part in [config, *(value for _, value in _entries(path, config) if isinstance(value, dict))]:
        for key, claimed, most in _claims(part, tensors, max(bits, SMALL)):
            if part[key] < 0 or claimed > most:
                what = f"{path}: {key} is {part[key]:,}, and its weights are {tensors:,} tensors of {size(bits // 8)}"
                raise ModelError(what, "restore both files, so that they fit together")


def _claims(part: dict[str, Any], tensors: int, bits: int) -> Iterator[tuple[str, int, int]]:
    """(key, what a config claims by it, the most that the weights have): of layers, and of numbers in matrices."""

    def first(keys: tuple[str, ...]) -> int:
        return max(1, next((part[key] for key in keys if _is_size(part.get(key))), 1))

    hidden, layers = first(HIDDEN), first(LAYERS)
    for key in LAYERS:
        if _is_size(part.get(key)):
            yield key, part[key], tensors
    times = {**dict.fromkeys(WIDTHS, 1), "head_dim": first(HEADS), "intermediate_size": layers, "n_inner": layers,
             "moe_intermediate_size": first(EXPERTS)}  # fmt: skip
    for key, others in times.items():
        if _is_size(part.get(key)):
            yield key, part[key] * hidden * others, bits


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- patterns


def _check_patterns(path: Path) -> None:
    """Refuses a tokenizer whose regular expressions may take forever on some text. Raises ModelError."""
    data = path.read_bytes()
    if re.search(rb"\\u00(?:[46][1-9A-Fa-f]|[57][0-9Aa])", data):  # a letter that no writer would escape
        patterns = [v for key, v in _entries(path, read_json(path)) if key == "Regex"]
    else:
        found = re.findall(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")', data)
        patterns = [json.loads(text) for text in found]
    for pattern in patterns:
        if isinstance(pattern, str) and can_hang(pattern):
            what = f"{path}: the pattern {pattern[:60]} may take forever on some text"
            raise ModelError(what, "use another tokenizer: none that is in use has one like it")


def can_hang(pattern: str) -> bool:
    """Whether a group that repeats without bound holds something that does, as ``(a+)+``: exponential when it fails.

    Wary: what is refused need not hang, and a pattern of 4096 characters or more is refused unread.
    """
    if len(pattern) > 4096:
        return True
    inner = [False]  # for each open group: whether something in it repeats without bound
    at, closed = 0, False
    while at < len(pattern):
        sign = pattern[at]
        ended = False  # the group that ends here, and what is in it
        if sign == "\\":
            at += 1
        elif sign == "[":
            at = _end_of_set(pattern, at)
        elif sign == "(":
            inner.append(False)
        elif sign == ")" and len(inner) > 1:
            ended = inner.pop()
            inner[-1] = inner[-1] or ended
        elif sign in "*+" or re.match(r"\{\d*,\}", pattern[at:]):
            if closed:
                return True
            inner[-1] = True
        closed = ended
        at += 1
    return False


def _end_of_set(pattern: str, at: int) -> int:
    """The place of the bracket that ends the set of characters that begins at ``at``."""
    depth = 0
    start = at
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]" and at > start + 1:
            depth -= 1
            if not depth:
                return at
        at += 1
    return at
