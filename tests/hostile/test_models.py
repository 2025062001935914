"""Hostile model and tokenizer folders: each is a sound one with one thing spoilt, and is refused in every way in.

A case says what is spoilt, and what the message must hold. What is harmless (`HARMLESS`) opens as if it were not there.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.hostile.conftest import check_refused, command, nothing_left, some, ways_in
from tests.hostile.spoil import (
    ARCHITECTURE,
    change_tensor,
    code_in,
    device,
    directory,
    gguf,
    gguf_text,
    header_of,
    moved_out,
    pickle_in,
    pipe,
    rename_tensor,
    rewrite,
    sparse,
    with_header,
)
from tests.hostile.watch import CODE, Ground, watched

pytestmark = pytest.mark.promise(18)

CONFIG, TOKENIZER, WEIGHTS, TEXT = "config.json", "tokenizer_config.json", "model.safetensors", "tokenizer.json"
AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
Spoil = Callable[[Path], Any]


def config(**changes: Any) -> Spoil:
    return lambda folder: (code_in(folder), rewrite(folder / CONFIG, **changes))


def tokenizer(**changes: Any) -> Spoil:
    return lambda folder: (code_in(folder), rewrite(folder / TOKENIZER, **changes))


def file(name: str, spoil: Callable[..., Any], *arguments: Any) -> Spoil:
    return lambda folder: spoil(folder / name, *arguments)


def in_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        value = json.loads((folder / TEXT).read_text(encoding="utf-8"))
        change(value)
        (folder / TEXT).write_text(json.dumps(value), encoding="utf-8")

    return spoil


def of_another_tokenizer(folder: Path) -> None:
    """A model that transformers has, with a tokenizer whose class lies in its folder; and no config to know it by."""
    code_in(folder)
    rewrite(folder / TOKENIZER, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, tokenizer_class="Tokenizer")
    rewrite(folder / CONFIG, model_type="mine")


def index(parts: dict[str, str]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
        (folder / "part.safetensors").write_bytes((folder.parent / "elsewhere.safetensors").read_bytes())
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))

    return spoil


def hidden_pattern(folder: Path) -> None:
    """The key is written with an escape, which is the same key to every reader of JSON."""
    in_tokenizer(lambda v: v.update(normalizer=replaces("(a+)+$")))(folder)
    text = (folder / TEXT).read_text(encoding="utf-8")
    (folder / TEXT).write_text(text.replace('"Regex"', '"\\u0052egex"'), encoding="utf-8")


def replaces(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}


def splits(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(text: str) -> Spoil:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def more_templates(folder: Path) -> None:
    """A named template outside the folder, by a link."""
    (folder / "additional_chat_templates").mkdir()
    secret = folder.parent / "outside" / "secret.jinja"
    secret.parent.mkdir()
    secret.write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "tool_use.jinja").symlink_to(secret)


def json_bomb(depth: int, key: str = "x") -> Callable[[Path], Any]:
    """As deep as this, inside settings that are sound."""
    return lambda path: path.write_text(
        path.read_text().rstrip().rstrip("}") + f', "{key}": {"[" * depth}{"]" * depth}}}'
    )


LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
MODELS: dict[str, tuple[Spoil, str]] = {
    # code
    "weights only as a pickle": (lambda f: ((f / WEIGHTS).unlink(), pickle_in(f, "pytorch_model.bin")), "can run code"),
    "a pickle named .safetensors": (lambda f: pickle_in(f, WEIGHTS), "not a safetensors file"),
    "a zip named .safetensors": (file(WEIGHTS, lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99))), "is a pickle"),
    "auto_map of an unknown architecture": (config(model_type="mine", auto_map=AUTO), "code of its own"),
    "auto_map of a repository": (config(model_type="mine", auto_map={"AutoConfig": "o/r--evil.C"}), "code of its own"),
    "auto_map of a tokenizer": (of_another_tokenizer, "code of its own"),
    "custom_pipelines": (config(custom_pipelines={"x": {"impl": "evil.Model", "pt": ["M"]}}), "custom_pipelines"),
    "trust_remote_code": (config(trust_remote_code=True), "trust_remote_code"),
    "trust_remote_code in the tokenizer": (tokenizer(trust_remote_code=True), "trust_remote_code"),
    "_target_": (config(_target_="os.system"), "_target_"),
    "_target_ deep inside": (
        config(rope_parameters={"rope_type": "default", "x": [{"_target_": "os.system"}]}), "_target_",
    ),
    "py/object": (config(extra={"py/object": "evil.Model"}), "py/object"),
    "attention from the hub": (config(attn_implementation="owner/kernel"), "attn_implementation"),
    "attention from the hub, hidden": (config(_attn_implementation="owner/kernel@v1:run"), "attn_implementation"),
    "attention from the hub, paged": (config(attn_implementation={"": "paged|owner/kernel"}), "attn_implementation"),
    "experts from the hub": (config(experts_implementation="owner/kernel"), "experts_implementation"),
    "use_kernels": (config(use_kernels=True), "use_kernels"),
    "kernel_config": (config(kernel_config={"RMSNorm": "owner/kernel:RMSNorm"}), "kernel_config"),
    "fusion_config": (config(fusion_config={"evil": True}), "fusion_config"),
    "weights named in the config, a pickle": (
        lambda f: (pickle_in(f, "adapter_model.bin"), rewrite(f / CONFIG, transformers_weights="adapter_model.bin")),
        "transformers_weights",
    ),
    "weights named in the config, outside": (config(transformers_weights="../x.safetensors"), "transformers_weights"),
    "quantiser of a module": (config(quantization_config={"quant_method": "evil.Quantizer"}), "quantization_config"),
    "quantiser called custom": (
        config(quantization_config={"quant_method": "custom", "x": "evil"}), "quantization_config",
    ),
    "quantiser that is a list": (config(quantization_config=["evil"]), "quantization_config"),
    "quantiser with a pattern that hangs": (
        config(quantization_config={"quant_method": "fp8", "modules_to_not_convert": ["(.*)*$"]}), "may never end",
    ),
    "tokenizer_class in a file": (tokenizer(tokenizer_class="evil.Tokenizer"), "tokenizer_class"),
    "tokenizer_class in a folder": (tokenizer(tokenizer_class="../evil/Tokenizer"), "tokenizer_class"),
    "tokenizer's positional arguments": (tokenizer(init_inputs=["/etc/passwd"]), "init_inputs"),
    "tokenizer from a GGUF file elsewhere": (tokenizer(gguf_file="../../x.gguf"), "gguf_file"),
    "model_type with path parts": (config(model_type="../../evil"), "model_type"),
    "architectures with dots": (config(architectures=["evil.Model"]), "architectures"),
    "dtype that is a function": (config(dtype="load"), "dtype"),
    "generation in code": (
        lambda f: (code_in(f, "custom_generate/generate.py"),
                   rewrite(f / "generation_config.json", custom_generate="owner/x")), "custom_generate",
    ),
    # weights
    "header longer than the file": (file(WEIGHTS, with_header, b"{}", 10**9), "longer than the file"),
    "header of 2**63 bytes": (file(WEIGHTS, with_header, b"{}", 2**63), "longer than the file"),
    "header nested without end": (file(WEIGHTS, with_header, b"[" * 100_000), "not a safetensors file"),
    "header that is a list": (file(WEIGHTS, with_header, []), "not a safetensors file"),
    "header with a name twice": (
        file(WEIGHTS, lambda p: with_header(p, b'{"a":1,"a":2}')), "names a tensor twice",
    ),
    "offsets below zero": (file(WEIGHTS, lambda p: change_tensor(p, data_offsets=[-8, 0])), "not a safetensors file"),
    "offsets that overlap": (
        file(WEIGHTS, lambda p: change_tensor(p, data_offsets=[4, 4 + 4], shape=[1])), "not a safetensors file",
    ),
    "a shape that overflows": (file(WEIGHTS, lambda p: change_tensor(p, shape=[2**62, 4])), "which is not its shape"),
    "a shape without end": (file(WEIGHTS, lambda p: change_tensor(p, shape=[2] * 99_999)), "not a safetensors file"),
    "a shape of no numbers": (file(WEIGHTS, lambda p: change_tensor(p, shape=[True, "x"])), "not a safetensors file"),
    "an unknown dtype": (file(WEIGHTS, lambda p: change_tensor(p, dtype="OBJECT")), "unknown dtype"),
    "a tensor named as a path": (file(WEIGHTS, rename_tensor, "../../etc/passwd"), "lack 2 tensors"),
    "an index to /etc": (index({"model.norm.weight": "../../../../etc/passwd"}), "not in this folder"),
    "an index to a place of its own": (index({"model.norm.weight": "/etc/passwd"}), "not in this folder"),
    "an index to the folder above": (index({"model.norm.weight": "../elsewhere.safetensors"}), "not in this folder"),
    "weights cut off": (file(WEIGHTS, lambda p: p.write_bytes(p.read_bytes()[:999])), "not a safetensors file"),
    # files that are none
    "weights that are a link out": (file(WEIGHTS, moved_out), "a link out of its folder"),
    "a config that is a link out": (file(CONFIG, moved_out), "a link out of its folder"),
    "a text that is a link out": (file("notes.txt", device, "/etc/passwd"), "a link out of its folder"),
    "weights that are a pipe": (file(WEIGHTS, pipe), "no regular file"),
    "a config that is a pipe": (file(CONFIG, pipe), "no regular file"),
    "a tokenizer that is a pipe": (file(TEXT, pipe), "no regular file"),
    "a generation config that is a pipe": (file("generation_config.json", pipe), "no regular file"),
    "weights that are a device": (file(WEIGHTS, device), "out of its folder"),
    "a config that is a device": (file(CONFIG, device), "out of its folder"),
    "a config that is a link to itself": (file(CONFIG, device, "config.json"), "a link to nothing"),
    "a config that is a folder": (file(CONFIG, directory), "no regular file"),
    "weights that are a folder": (file(WEIGHTS, directory), "no regular file"),
    # sizes
    "a config of 10 GB": (file(CONFIG, sparse, 10 * 10**9), "is the most"),
    "a tokenizer of 10 GB": (file(TEXT, sparse, 10 * 10**9), "is the most"),
    "a config nested 100,000 deep": (file(CONFIG, json_bomb(100_000)), "config.json"),
    "a config nested 500 deep": (file(CONFIG, json_bomb(500)), "nested too deeply"),
    "a number of 10,000 digits": (
        file(CONFIG, lambda p: p.write_text('{"model_type": "llama", "x": ' + "9" * 10_000 + "}")), "digit",
    ),
    "a size that is NaN": (config(hidden_size=float("nan")), "hidden_size"),
    "a size that is infinite": (config(hidden_size=float("inf")), "hidden_size"),
    "a config that is not text": (file(CONFIG, lambda p: p.write_bytes(b'{"model_type": "\xff\xfe"}')), "not UTF-8"),
    "hidden_size of a billion": (config(hidden_size=10**9), "hidden_size"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "a vocabulary of 10**12": (config(vocab_size=10**12), "vocab_size"),
    "a vocabulary of 10**30": (config(vocab_size=10**30), "vocab_size"),
    "a hidden vocabulary of 10**8": (config(vocab_size=10**8), "vocab_size"),
    "an intermediate_size of 10**9": (config(intermediate_size=10**9), "intermediate_size"),
    "a head of 10**9": (config(head_dim=10**9), "head_dim"),
    "a negative size": (config(hidden_size=-32), "hidden_size"),
    "a size that is true": (config(num_hidden_layers=True), "num_hidden_layers"),
    # tokenizers and templates
    "a normaliser that hangs": (in_tokenizer(lambda v: v.update(normalizer=replaces("(a+)+$"))), "may take forever"),
    "a splitter that hangs": (
        in_tokenizer(lambda v: v.update(pre_tokenizer=splits("(?:(?:a|aa)*)*$"))), "may take forever",
    ),
    "a pattern under another spelling": (hidden_pattern, "may take forever"),
    "a token with a negative id": (
        in_tokenizer(lambda v: v["added_tokens"].append({**v["added_tokens"][0], "content": "z", "id": -1})), "",
    ),
    "a tokenizer nested without end": (file(TEXT, lambda p: p.write_text("[" * 100_000)), ""),
    "a template that leaves the sandbox": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "chat template"),
    "a template that includes a file": (template("{% include '/etc/passwd' %}"), "chat template"),
    "a template that imports a file": (template("{% import 'evil.py' as x %}{{ x }}"), "chat template"),
    "a template that loops without end": (template(LOOP), "chat template"),
    "a template that prints 10**9 signs": (template("{{ 'x' * 1000000000 }}"), "chat template"),
    "a template of 10 MB": (template("{{ messages }}" + " " * (10 << 20)), "is the most"),
    "a template in the settings": (
        lambda f: ((f / "chat_template.jinja").unlink(missing_ok=True),
                   rewrite(f / TOKENIZER, chat_template="{{ cycler.__init__.__globals__.os.system('id') }}")),
        "chat template",
    ),
    "a list of named templates": (
        lambda f: ((f / "chat_template.jinja").unlink(missing_ok=True), rewrite(f / TOKENIZER, chat_template=[
            {"name": "default", "template": "{{ lipsum.__globals__ }}"}, {"name": "x", "template": LOOP}])),
        "chat template",
    ),
    "a named template outside": (more_templates, "a link out of its folder"),
    "a pipe among the templates": (
        lambda f: ((f / "additional_chat_templates").mkdir(), pipe(f / "additional_chat_templates" / "x.jinja")),
        "no regular file",
    ),
}  # fmt: skip

SHOW, INSPECT, JUDGED, LOAD = 2, 3, 4, 5
NAMES = list(MODELS)
OF_WEIGHTS = NAMES[NAMES.index("header longer than the file") : NAMES.index("weights that are a link out")]
OF_SIZES = NAMES[NAMES.index("hidden_size of a billion") : NAMES.index("a negative size") + 1]
# To show rows no weight is looked at. What is wrong with a tokenizer or template is found where it is used: no way that
# looks at weights alone comes across it.
LATE = {
    **dict.fromkeys([*OF_WEIGHTS, *OF_SIZES, "weights only as a pickle", "a pickle named .safetensors",
                     "a zip named .safetensors"], (SHOW,)),
    "a tensor named as a path": (SHOW, INSPECT, JUDGED),
    "a token with a negative id": (INSPECT, JUDGED), "a tokenizer nested without end": (INSPECT, JUDGED),
    **{name: (INSPECT, JUDGED, LOAD) for name, (_, says) in MODELS.items() if says == "chat template"},
    "a size that is infinite": (INSPECT, JUDGED), "a size that is true": (INSPECT, JUDGED),
}  # fmt: skip


def look(folder: Path, here: Path, sound: Any, most: int | None = None) -> Any:
    code = [p for p in folder.rglob("*") if p.suffix in CODE and p.is_file()]
    out = list((here / "outside").glob("*")) if (here / "outside").exists() else []
    return watched(ways_in(folder, here, sound)[:most], Ground((folder, sound.here), here, bait=(*code, *out)))


@pytest.mark.parametrize("name", some(MODELS))
def test_a_model_folder_is_refused(name, sound, tmp_path, tried):
    tried(folders=1)
    spoil, says = MODELS[name]
    folder = sound.copy("base", tmp_path)
    spoil(folder)
    most = 1 if "loops without end" in name else None  # it takes all the time that a template has
    check_refused(look(folder, tmp_path, sound, most), says, LATE.get(name, ()))
    nothing_left(folder, tmp_path)


def pickles(folder: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "x.ckpt",
    ):
        pickle_in(folder, name)


def in_subfolders(folder: Path) -> None:
    pickles(folder)
    (folder / "evil.egg-info").mkdir()
    code_in(folder, "sub/__init__.py")
    code_in(folder, "sitecustomize.py")
    code_in(folder, "transformers.py")
    code_in(folder, "conftest.py")


HARMLESS: dict[str, Spoil] = {
    "pickles beside the weights": pickles,
    "code that nothing names": in_subfolders,
    "auto_map of what transformers has": config(auto_map=AUTO),
    "auto_map of its tokenizer": tokenizer(auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
    "a tokenizer's files elsewhere": tokenizer(
        vocab_file="/etc/passwd",
        tokenizer_file="../../x.json",
        special_tokens_map_file="/etc/shadow",
        name_or_path="/etc",
    ),
    "attention that this machine has not": config(attn_implementation="flash_attention_2"),
    "a name elsewhere": config(_name_or_path="https://example.org/x", _commit_hash="0" * 40),
}


@pytest.mark.parametrize("name", some(HARMLESS))
def test_what_is_harmless_is_not_even_opened(name, sound, tmp_path, tried):
    """Such things stand in many good folders of the hub: they are no reason to refuse, and nothing comes of them."""
    tried(folders=1)
    folder = sound.copy("base", tmp_path)
    HARMLESS[name](folder)
    seen = look(folder, tmp_path, sound)
    assert seen.faults == []
    assert [code for code, _ in seen.ended] == [0, 0, 0, 0, 2, 0], seen.ended
    written = json.loads((tmp_path / "out" / "x" / CONFIG).read_text())
    assert not {"auto_map", "attn_implementation", "_attn_implementation"} & written.keys()


GGUF: dict[str, tuple[Callable[[Path], Any], str]] = {
    "2**63 tensors": (lambda p: gguf(p, [ARCHITECTURE], counts=(2**63, 1)), "entries"),
    "2**63 keys": (lambda p: gguf(p, [ARCHITECTURE], counts=(0, 2**63)), "entries"),
    "a key longer than the file": (lambda p: gguf(p, [gguf_text("x", 2**62)]), "longer than the file"),
    "an array longer than the file": (
        lambda p: gguf(p, [gguf_text("a") + struct.pack("<IIQ", 9, 4, 2**61)]),
        "longer than the file",
    ),
    "a tensor of 2**40 numbers": (
        lambda p: gguf(p, [ARCHITECTURE], [gguf_text("w") + struct.pack("<IQ", 1, 2**40) + bytes(12)]),
        "a tensor of shape",
    ),
    "a tensor of a billion dimensions": (
        lambda p: gguf(p, [ARCHITECTURE], [gguf_text("w") + struct.pack("<I", 10**9) + bytes(64)]), "dimensions",
    ),
    "an unknown kind of value": (lambda p: gguf(p, [gguf_text("a") + struct.pack("<I", 99)]), "unknown kind"),
    "an adapter beside it": (
        lambda p: (gguf(p, [ARCHITECTURE]), rewrite(p.parent / "adapter_config.json", base_model_name_or_path="o/x")),
        "adapter_config.json",
    ),
    "nothing in it": (lambda p: gguf(p, []), ""),
    "a pipe": (pipe, "not a model"),
}  # fmt: skip


@pytest.mark.parametrize("name", some(GGUF))
def test_a_gguf_file_is_refused(name, sound, tmp_path, tried):
    tried(folders=1)
    spoil, says = GGUF[name]
    given = tmp_path / "given" / "x.gguf"
    given.parent.mkdir()
    spoil(given)
    seen = watched(ways_in(given, tmp_path, sound), Ground((given.parent, sound.here), tmp_path))
    check_refused(seen, says, (INSPECT, JUDGED) if name in ("nothing in it",) else ())
    nothing_left(given.parent, tmp_path)


def test_a_tokenizer_of_a_new_model(sound, tmp_path):
    """A folder that is only a tokenizer, of a recipe's new model."""
    import yaml

    for name, changes, says in (
        (
            "code",
            {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Mine"},
            "code of its own",
        ),
        ("class", {"tokenizer_class": "evil.Tokenizer"}, "tokenizer_class"),
        ("remote", {"trust_remote_code": True}, "trust_remote_code"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for one in (TEXT, TOKENIZER):
            shutil.copy(sound.run / "base" / one, folder)
        code_in(folder)
        rewrite(folder / TOKENIZER, **changes)
        model = {"architecture": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        stage = {
            "name": "x",
            "stage": "pretrain",
            "data": str(sound.here / "text.jsonl"),
            "max_steps": 1,
            "batch_size": 2,
        }
        recipe = {"name": "r", "model": {**model, "tokenizer": str(folder)}, "stages": [stage]}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        act = command("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
        check_refused(watched([act], Ground((folder, sound.here), tmp_path, (folder / "evil.py",))), says)
        nothing_left(folder, tmp_path)


def test_the_header_of_a_sound_file_is_as_it_was(sound, tmp_path):
    """The helper that spoils headers spoils nothing by itself."""
    folder = sound.copy("base", tmp_path)
    before = header_of(folder / WEIGHTS)
    with_header(folder / WEIGHTS, before)
    assert header_of(folder / WEIGHTS) == before
    seen = watched([command("generate", folder, "hello", "--max-new-tokens", 1)], Ground((folder,), tmp_path))
    assert seen.ended[0][0] == 0
