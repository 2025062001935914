"""Carries a recipe out: the order of stages, what need not be run again, and each folder's lineage.

A stage's identity is a hash of its parent, its data and the settings that can change the result. A finished folder
with the same identity is kept; everything after a changed stage runs again. A folder is whole or absent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.errors import DataError, ModelError, RecipeError, listed, nearest
from trivium.files import clear_errors, make_folder, sha256_json, whole_folder, write_json
from trivium.recipe import Recipe, Stage
from trivium.stages import STAGES, identity_settings, resolve
from trivium.train.log import clock, say, size

SUMMARY = "summary.json"
BASE = "model"  # where a base is written that no path names: new, dequantised, or with overrides


@dataclass(frozen=True)
class Link:
    """One place of the chain: a finished stage, or the model it all starts from."""

    source: str  # folder, file or hub id
    identity: str
    lineage: list[dict[str, Any]]


def run_recipe(recipe: Recipe, out: Path, until: str | None = None) -> dict[str, Any]:
    """Run what has to be run; writes ``summary.json`` and returns it."""
    stages = _up_to(recipe, until)
    for stage in stages:  # first what needs no library that takes seconds to import
        _check_data(stage)
    settings, notes = _resolved(recipe, stages)
    _check_sizes(recipe)
    make_folder(out)
    links: dict[str, Link] = {}
    summary: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed, "stages": []}
    start: Link | None = None
    for stage in stages:
        full = settings[stage.name]
        say(f"{stage.name}: {stage.stage} from {stage.from_ or 'the model'}")
        for note in notes[stage.name]:
            say(f"  {note}")
        if stage.from_ is None and start is None:
            start = _start(recipe, full, out)
        came_from = links[stage.from_] if stage.from_ else start
        assert came_from is not None
        record = _stage(recipe, full, came_from, out, list(settings.values()))
        links[stage.name] = Link(str(out / stage.name), record["identity"], record["lineage"])
        summary["stages"].append(_summary_of(record))
        write_json(out / SUMMARY, summary)
    return summary


# --- what can be seen to be wrong before anything is trained


def _up_to(recipe: Recipe, until: str | None) -> list[Stage]:
    """The stages to run, in order."""
    names = [s.name for s in recipe.stages]
    if until is not None and until not in names:
        raise RecipeError(f"--until {until}: no such stage{nearest(until, names)}", f"stages: {', '.join(names)}")
    return recipe.stages[: names.index(until) + 1] if until is not None else recipe.stages


def _resolved(recipe: Recipe, stages: list[Stage]) -> tuple[dict[str, Stage], dict[str, list[str]]]:
    """Every stage with all its settings, and the lines that tell where they came from."""
    settings: dict[str, Stage] = {}
    notes: dict[str, list[str]] = {}
    for stage in stages:
        parent = settings[stage.from_].model_dump() if stage.from_ else _given_method(recipe)
        try:
            settings[stage.name], notes[stage.name] = resolve(stage, recipe, parent, stage.from_ or "the model")
        except RecipeError as error:
            where = "" if error.what.startswith("stages.") else f"stages.{stage.name}."
            raise RecipeError(f"{where}{error.what}", error.remedy) from None
    return settings, notes


def _check_data(stage: Stage) -> None:
    """The files of a stage are there and hold something; raises DataError."""
    from trivium.data.hub import local
    from trivium.data.rows import files_of

    paths = [stage.data] if isinstance(stage.data, str) else stage.data
    held_out = [[stage.eval_data]] if isinstance(stage.eval_data, str) else []
    for group in [paths, *held_out]:
        files = [file for path in group for file in files_of(local(path))]
        if not any(file.stat().st_size for file in files):
            empty = f"{files[0]} is empty" if len(files) == 1 else f"all files of {', '.join(group)} are empty"
            raise DataError(f"no rows: {empty}", "give a file with at least one row")


def _check_sizes(recipe: Recipe) -> None:
    """The sizes of a new model fit together, before a tokenizer is trained for it; raises RecipeError."""
    if isinstance(recipe.model, dict) and "architecture" in recipe.model:
        from trivium.model.load import quiet
        from trivium.model.new import check_sizes

        with quiet():
            check_sizes({k: v for k, v in recipe.model.items() if k != "tokenizer"})


def _check_fit(model: Any, recipe: Recipe, stages: list[Stage]) -> None:
    """What later stages ask of this model is there, so that it is not found out hours later; raises RecipeError."""
    from trivium.peft.base import plan_for
    from trivium.peft.settings import settings_for

    for stage in stages:
        method = dict(stage.method or {"name": "full"})
        try:
            plan_for(model.hf, settings_for(method.pop("name"), method))
        except RecipeError as error:
            raise RecipeError(f"stages.{stage.name}.method: {error.what}", error.remedy) from None
    context = model.context
    for stage in recipe.stages[: len(stages)]:  # as written: a default gives way to the model's context
        if stage.max_length and stage.max_length > context:
            raise RecipeError(
                f"stages.{stage.name}.max_length: {stage.max_length} is more than the model's context of {context}",
                f"use at most {context}, or build the model with a larger max_position_embeddings",
            )


# --- one stage


def _stage(recipe: Recipe, stage: Stage, parent: Link, out: Path, stages: list[Stage]) -> dict[str, Any]:
    """Run one stage, or find it done; ``stages`` are all of the run, checked against its model before it is trained."""
    from trivium.folder import record_of, relative

    data = _data_hashes(stage)
    identity = sha256_json({"parent": parent.identity, "data": data, "settings": identity_settings(stage)})
    final = out / stage.name
    found = record_of(final) if final.is_dir() else None
    if found is not None and found["identity"] == identity and all(key in found for key in SHOWN):
        say(f"  done before ({identity[:12]}), not run again")
        return found
    if final.exists() and found is None:
        raise ModelError(f"{final}: in the way, and not a folder of trivium", "move it away, or choose another --out")
    started = time.perf_counter()
    with whole_folder(final) as partial:
        run, base = _opened(recipe, stage, parent, out, partial)
        _check_fit(run.model, recipe, stages)
        opening = time.perf_counter() - started
        from trivium.stage_runner import run_stage

        report = run_stage(run)
        report["setup_seconds"] += opening
        own = {"name": stage.name, "stage": stage.stage, "method": (stage.method or {})["name"], "identity": identity}
        record = {
            "trivium": 1,
            **own,
            "parent": {
                "path": relative(parent.source, final) if Path(parent.source).exists() else parent.source,
                "source": parent.source,
                "identity": parent.identity,
            },
            "base": base(),
            "data": {"paths": stage.data, **data},
            "settings": stage.model_dump(by_alias=True, exclude_none=True),
            **report,
            "lineage": [*parent.lineage, own],
        }
        write_json(partial / "trivium.json", record)
    say(f"  saved {final} ({size(record['bytes_on_disk'])}, {clock(time.perf_counter() - started)})")
    return record


def _opened(recipe: Recipe, stage: Stage, parent: Link, out: Path, partial: Path) -> tuple[Any, Any]:
    """The stage under way, and a function that tells where an adapter's base lies once it is known."""
    import torch

    from trivium.folder import identity_of, open_folder, relative
    from trivium.peft import base as deltas
    from trivium.peft.settings import FullSettings, settings_for
    from trivium.stage_runner import StageRun
    from trivium.train.machine import pick_device, pick_dtype

    device = pick_device(stage.device)
    new = parent.source == "new"
    dtype = pick_dtype(stage.dtype, device)
    method = stage.method or {"name": "full"}
    wanted = settings_for(method["name"], {k: v for k, v in method.items() if k != "name"})
    # trained weights are float32, so a model to be trained in full is read in it, whatever it computes in
    held = "float32" if isinstance(wanted, FullSettings) else dtype
    changes = _overrides(recipe, parent)
    opened = _new(recipe, out, held, device) if new else open_folder(parent.source, held, device, changes)
    opened.model.dtype = getattr(torch, dtype)
    if _is_start(recipe, parent) and recipe.model.get("add_tokens"):  # type: ignore[union-attr]
        _add_tokens(opened.model, stage, wanted)
    place = opened.base or parent.source
    if deltas.deltas(opened.model.hf) and not deltas.continues(opened.model.hf, wanted):
        say("  another method than its parent's: the parent's adapter is merged into its base first")
        deltas.merge(opened.model.hf)
        opened.settings, opened.base = FullSettings(), None
        place = "merged"
    written: dict[str, str] = {}

    def adapter_base() -> str:
        """Where the frozen base lies; written beside the stages where no folder holds it as it is used."""
        if "source" not in written:
            beside = _needs_writing(place, recipe, parent)
            folder = out / (f"{stage.name}-base" if place == "merged" else BASE)
            written["source"] = str(_written(opened.model, folder).resolve()) if beside else place
        return written["source"]

    def base() -> dict[str, Any] | None:
        if "source" not in written:
            return None
        source, final = written["source"], out / stage.name
        local = Path(source).exists()
        return {"path": relative(source, final) if local else source, "source": source, "identity": identity_of(source)}

    return StageRun(stage, opened, partial, adapter_base), base


def _needs_writing(place: str, recipe: Recipe, parent: Link) -> bool:
    return place in ("new", "merged") or place.endswith(".gguf") or bool(_overrides(recipe, parent))


def _written(model: Any, folder: Path) -> Path:
    """Write a base as a whole model, once for the run; what is there already is overwritten, whole."""
    from trivium.data.templates import chat_template
    from trivium.stage_runner import save_model

    with whole_folder(folder) as partial, clear_errors(folder):
        save_model(model, partial, chat_template(model.tokenizer))
    say(f"  the frozen base is written to {folder}")
    return folder


# --- what it all starts from


def _start(recipe: Recipe, stage: Stage, out: Path) -> Link:
    """The model of the recipe; a new one is only described here, and made by the first stage."""
    from trivium.folder import identity_of, record_of

    model = recipe.model
    if isinstance(model, dict) and "architecture" in model:
        if stage.stage != "pretrain" and "tokenizer" not in model:
            remedy = "add a pretrain stage first, or give model.tokenizer: a folder with one"
            raise RecipeError(
                f"stages.{stage.name}: a new model has no tokenizer to begin a {stage.stage} stage with", remedy
            )
        _tokenizer(recipe, stage, out)
        identity = sha256_json({"model": {k: v for k, v in model.items() if k != "tokenizer"}, "seed": recipe.seed,
                                "tokenizer": identity_of(str(out / "tokenizer"))})  # fmt: skip
        return Link("new", identity, [{"name": "new", "stage": "random weights", "method": None, "identity": identity}])
    source = model if isinstance(model, str) else str(model["path"])
    found = record_of(Path(source)) if Path(source).is_dir() else None
    identity = identity_of(source)
    lineage = found["lineage"] if found else [{"name": source, "stage": "given", "method": None, "identity": identity}]
    changes = {k: v for k, v in model.items() if k != "path"} if isinstance(model, dict) else {}
    return Link(source, sha256_json([identity, changes]) if changes else identity, lineage)


def _given_method(recipe: Recipe) -> dict[str, Any] | None:
    """The method of the adapter folder that the recipe starts from, if it is one."""
    from trivium.folder import method_of

    source = recipe.model if isinstance(recipe.model, str) else recipe.model.get("path")
    method = method_of(Path(source)) if isinstance(source, str) else None
    return {"method": method} if method else None


def _overrides(recipe: Recipe, parent: Link) -> dict[str, Any]:
    """What the recipe changes in the config of the model it starts from."""
    if not _is_start(recipe, parent):
        return {}
    assert isinstance(recipe.model, dict)
    return {k: v for k, v in recipe.model.items() if k not in ("path", "add_tokens")}


def _is_start(recipe: Recipe, parent: Link) -> bool:
    """Whether ``parent`` is the given model that the recipe describes by a mapping."""
    return isinstance(recipe.model, dict) and parent.source == recipe.model.get("path")


def _add_tokens(model: Any, stage: Stage, settings: Any) -> None:
    """ChatML's two tokens for a base that has no chat template; their embedding rows are trained, so only in full."""
    from trivium.model.tokens import add_chat_tokens
    from trivium.peft.settings import FullSettings

    if not isinstance(settings, FullSettings):
        raise RecipeError(
            f"model.add_tokens: new embedding rows must be trained, and stages.{stage.name} trains an adapter",
            "use method: full in the first stage, or leave add_tokens out: plain-text role markers need no new tokens",
        )
    added = add_chat_tokens(model, int(stage.seed or 0))
    say(
        f"  {added} tokens added to the vocabulary"
        if added
        else "  add_tokens: the tokenizer already has what it needs"
    )


def _tokenizer(recipe: Recipe, stage: Stage, out: Path) -> None:
    """The tokenizer of a new model, in ``out/tokenizer``: the one given, or trained on the first stage's text."""
    from trivium.data.hub import local
    from trivium.folder import load_tokenizer, record_of

    assert isinstance(recipe.model, dict)
    final, given = out / "tokenizer", recipe.model.get("tokenizer")
    size_asked = recipe.model.get("vocab_size", 4096)
    if not isinstance(size_asked, int) or isinstance(size_asked, bool):
        raise RecipeError(f"model.vocab_size: {size_asked!r} is not a number of tokens", "e.g. vocab_size: 2048")
    made_from = {"given": given} if given else {"data": _data_hashes(stage)["sha256"], "vocab_size": size_asked}
    identity = sha256_json(made_from)
    found = record_of(final) if final.is_dir() else None
    if found is not None and found["identity"] == identity:
        return
    if given:
        tokenizer = load_tokenizer(Path(given))
    else:
        from trivium.data.tokenizer import train_tokenizer

        started = time.perf_counter()
        paths = [stage.data] if isinstance(stage.data, str) else stage.data
        tokenizer = train_tokenizer(_texts([local(p) for p in paths]), size_asked)
        say(f"  tokenizer: {len(tokenizer):,} tokens, trained in {clock(time.perf_counter() - started)}")
    with whole_folder(final) as partial, clear_errors(final):
        tokenizer.save_pretrained(partial)
        made = {"trivium": 1, "identity": identity, "made_from": made_from, "lineage": []}
        write_json(partial / "trivium.json", made)


def _texts(paths: list[Path]) -> Any:
    from trivium.data.rows import BadRow, read_rows

    for path in paths:
        for row in read_rows(path):
            if not isinstance(row, BadRow) and isinstance(row.value.get("text"), str):
                yield row.value["text"]


def _new(recipe: Recipe, out: Path, dtype: str, device: str) -> Any:
    import torch

    from trivium.folder import Opened, load_tokenizer
    from trivium.model.load import quiet, wrap
    from trivium.model.new import new_config, new_model
    from trivium.peft.settings import FullSettings

    assert isinstance(recipe.model, dict)
    tokenizer = load_tokenizer(out / "tokenizer")
    sizes = {k: v for k, v in recipe.model.items() if k != "tokenizer"}
    with quiet():
        config = new_config(sizes, tokenizer)
        hf = new_model(config, recipe.seed)
    model = wrap(hf.to(device).eval(), tokenizer, dtype, torch.float32)
    say(f"  new {sizes['architecture']}: {model.parameters():,} parameters, vocabulary {len(tokenizer):,}")
    return Opened(model, FullSettings(), None)


def _data_hashes(stage: Stage) -> dict[str, Any]:
    """SHA-256 of the files a stage reads; raises DataError where one is missing."""
    from trivium.data.hub import local
    from trivium.data.rows import files_of, sha256_of

    paths = [stage.data] if isinstance(stage.data, str) else stage.data
    try:
        hashes: dict[str, Any] = {"sha256": sha256_of([f for p in paths for f in files_of(local(p))])}
        if isinstance(stage.eval_data, str):
            hashes["eval_sha256"] = sha256_of(files_of(local(stage.eval_data)))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}", "check the file and its rights") from None
    return hashes


# --- what is told at the end

SHOWN = (
    "name", "stage", "method", "trained_parameters", "total_parameters", "bytes_on_disk", "seconds", "setup_seconds",
    "reference_seconds", "eval_seconds", "save_seconds", "tokens", "trained_tokens", "tokens_per_second",
    "peak_memory_bytes", "metrics",
)  # fmt: skip


def _summary_of(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in SHOWN}


def table(summary: dict[str, Any]) -> str:
    """The end-of-run table, as plain text that fits a terminal of 100 columns."""
    head = ("stage", "method", "trained", "seconds", "tokens/s", "memory", "on disk", "held-out loss", "accuracy")
    rows = [head]
    for s in summary["stages"]:
        m = s["metrics"]

        def change(name: str, m: dict[str, float] = m) -> str:
            if f"after_{name}" not in m:
                return "-"
            return f"{m[f'before_{name}']:.3f} -> {m[f'after_{name}']:.3f}"

        rows.append(
            (s["name"], s["method"], f"{s['trained_parameters']:,}", f"{s['seconds']:.0f}",
             f"{s['tokens_per_second']:,.0f}", size(s["peak_memory_bytes"]), size(s["bytes_on_disk"]),
             change("loss"), change("accuracy"))
        )  # fmt: skip
    widths = [max(len(r[c]) for r in rows) for c in range(len(head))]
    left = (0, 1)
    lines = [
        "  ".join(v.ljust(w) if c in left else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def stage_names() -> str:
    return listed(STAGES)
