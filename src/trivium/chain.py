"""Carries a recipe out: the order of stages, what need not be run again, and each folder's lineage.

A stage's identity is a hash of its parent, its data and the settings that can change the result. A finished folder
with the same identity is kept; everything after a changed stage runs again. A folder is whole or absent.
"""

from __future__ import annotations

import datetime
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.checks import (
    check_data,
    check_extras,
    check_fit,
    check_judge,
    check_several,
    check_sizes,
    check_texts,
)
from trivium.errors import CheckpointError, ModelError, RecipeError, nearest
from trivium.files import MANIFEST, clear_errors, damage, make_folder, recover, sha256_json, whole_folder, write_json
from trivium.lock import LOCK, only_run
from trivium.measures import Measures
from trivium.planning.kept import planned_of
from trivium.recipe import Recipe, Stage
from trivium.report.write import REPORT, write_report
from trivium.stages import RESULT, STAGES, identity_settings, resolve
from trivium.start import (
    Link,
    add_tokens,
    data_hashes,
    file_hashes,
    given_method,
    is_start,
    new_start,
    overrides,
    start_of,
)
from trivium.summary import SHOWN, SUMMARY, stage_identity, stage_record, summary_of
from trivium.terminal import clock, say, shown, size
from trivium.train.processes import Processes, current
from trivium.train.track import check_tracker, open_tracker
from trivium.under_way import TRAINING, UnderWay, under_way

if TYPE_CHECKING:
    from trivium.evaluate.judge import Judge

BASE = "model"  # where a base is written that no path names: new, dequantised, or with overrides


def run_recipe(
    recipe: Recipe, out: Path, until: str | None = None, judge: Judge | None = None, fresh: bool = False,
    accept_changed_data: bool = False, profile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run what has to be run; writes ``summary.json`` and ``report.html``, and returns the summary.

    ``judge`` looks at answers along the way, and at the end of each stage (`evaluate.judge`). A stage that was
    interrupted goes on where it was, also with other rows where ``accept_changed_data`` says so. ``fresh`` starts over
    and keeps the old folder aside. ``profile`` tells where the time of a few steps of each stage goes
    (`stage_profile`). Raises BusyError where another run is at work in ``out``.
    """
    ordered, notes = checked(recipe, until)
    if not (others := current()).first:
        return _help(recipe, ordered, out, others)
    check_several(others, profile)
    out = make_folder(out).resolve()  # adapters name their base: PEFT looks for it from wherever it is started
    if fresh:
        with only_run(out):
            if (aside := set_aside(out)) is not None:
                say(f"--fresh: what was there is kept in {shown(aside)}")
        make_folder(out)
    with only_run(out) as left:
        if left:
            say(f"note: {left}")
        summary = _in_order(recipe, ordered, notes, out, judge, accept_changed_data, profile)
    others.led(dict)  # they have waited for all to be written
    return summary


def _in_order(
    recipe: Recipe, ordered: list[Stage], notes: dict[str, list[str]], out: Path, judge: Judge | None, accept: bool,
    profile: bool,
) -> dict[str, Any]:  # fmt: skip
    """All stages, one after the other; returns the summary."""
    for name in (BASE, "tokenizer", *(n for s in ordered for n in (s.name, f"{s.name}-base"))):
        recover(out / name)  # what an attempt that died left; nothing else in this folder is ours to sweep
    measures = Measures(out, recipe, ordered, judge)
    links: dict[str, Link] = {}
    summary: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed, "stages": []}
    start: Link | None = None
    for full in ordered:
        say(f"{full.name}: {full.stage} from {full.from_ or 'the model'}")
        for note in notes[full.name]:
            say(f"  {note}")
        if full.from_ is None and start is None:
            start = start_of(recipe, full, out)
        came_from = links[full.from_] if full.from_ else start
        assert came_from is not None
        record = _stage(recipe, full, came_from, out, ordered, judge, accept, profile)
        links[full.name] = Link(str(out / full.name), record["identity"], record["lineage"])
        if len(links) == 1:  # only now, as a mistake in the data should not have to wait for it
            measures.of_start(recipe, came_from, full)
        measures.of_stage(full, out / full.name, record["identity"], came_from)
        planned = planned_of(out, record["identity"])
        summary["stages"].append(summary_of(record) | {"from": full.from_} | measures.around(full) | planned)
        write_json(out / SUMMARY, summary)
        write_report([out], out / REPORT)
    say(f"report: {shown(out / REPORT)}")
    return summary


def checked(recipe: Recipe, until: str | None) -> tuple[list[Stage], dict[str, list[str]]]:
    """The stages to run with all their settings, in order, and lines that tell where these came from; after all that
    can be checked before a model is opened."""
    stages = _up_to(recipe, until)
    for stage in stages:  # first what needs no library that takes seconds to import
        check_data(stage)
    check_texts(recipe)
    check_judge(recipe)
    check_tracker(recipe.track)
    settings, notes = _resolved(recipe, stages)
    check_extras([*settings.values()])
    check_sizes(recipe)
    return [settings[stage.name] for stage in stages], notes


def _help(recipe: Recipe, stages: list[Stage], out: Path, others: Processes) -> dict[str, Any]:
    """Train with the first of several processes what that one says, stage by stage; nothing is written here."""
    for stage in stages:
        told = others.led(dict)
        if told is None:
            continue  # done before
        _check_same(told, stage, others)
        from trivium.stage_runner import run_stage

        run, _ = open_stage(recipe, stage, Link(told["source"], told["identity"], []), out.resolve(), out)
        run.folder = run.adapter_base = None
        run.under_way = UnderWay(Path(told["folder"]), told["about"], told["date"])
        run_stage(_dated(run))
    _check_same(others.led(dict), None, others)
    return {}


def _check_same(told: dict[str, Any], stage: Stage | None, others: Processes) -> None:
    """The first process is at the same stage; raises RecipeError where it was given another recipe."""
    mine = sha256_json([stage.name, identity_settings(stage)]) if stage is not None else None
    if told.get("stage") != mine:
        what = f"process {others.rank} was given another recipe or other options than process 0"
        raise RecipeError(what, "give all of them the same ones")


def _dated(run: Any) -> Any:
    """With the date that the chat template was told when the training began."""
    if run.under_way.date is not None and run.stage.date is None:
        run.stage = run.stage.model_copy(update={"date": datetime.date.fromisoformat(run.under_way.date)})
    return run


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
        parent = settings[stage.from_].model_dump() if stage.from_ else given_method(recipe)
        try:
            settings[stage.name], notes[stage.name] = resolve(stage, recipe, parent, stage.from_ or "the model")
        except RecipeError as error:
            where = "" if error.what.startswith("stages.") else f"stages.{stage.name}."
            raise RecipeError(f"{where}{error.what}", error.remedy) from None
    return settings, notes


def _stage(
    recipe: Recipe, stage: Stage, parent: Link, out: Path, stages: list[Stage], judge: Judge | None, accept: bool,
    profile: bool,
) -> dict[str, Any]:  # fmt: skip
    """Run one stage, or find it done; ``stages`` are all of the run, checked against its model before it is trained."""
    from trivium.folder import record_of

    data = data_hashes(stage)
    identity = stage_identity(parent, data, stage)
    final = out / stage.name
    settings = {k: v for k, v in identity_settings(stage).items() if k not in RESULT}
    training = sha256_json([parent.identity, data, settings])
    about = {"training": training, "parent": parent.identity, "settings": settings, "data": file_hashes(stage)}
    found = record_of(final) if final.is_dir() else None
    if found is not None and found["identity"] == identity and all(key in found for key in SHOWN):
        check_whole(final, quick=True)
        say(f"  done before ({identity[:12]}), not run again" + (", so there is nothing to profile" if profile else ""))
        UnderWay.of(out, stage.name, about).done(stage, found)
        current().led(lambda: None)
        return found
    if final.exists() and found is None:
        raise ModelError(f"{final}: in the way, and not a folder of trivium", "move it away, or choose another --out")
    going = under_way(out, stage.name, about, accept)
    if stage.from_:
        check_whole(Path(parent.source))
    started = time.perf_counter()
    told = {"source": parent.source, "identity": parent.identity, "folder": str(going.folder), "about": about,
            "date": going.date, "stage": sha256_json([stage.name, identity_settings(stage)])}  # fmt: skip
    current().led(lambda: told)
    with whole_folder(final) as partial:
        run, base = open_stage(recipe, stage, parent, out, partial)
        check_fit(run.model, recipe, stages)
        opening = time.perf_counter() - started
        from trivium.stage_runner import run_stage

        run.judge, run.under_way = judge, going
        run.profile = out / f"profile-{stage.name}.json" if profile else None
        run.tracker = lambda: open_tracker(recipe.track, recipe.name, stage.name, out, stage.model_dump(by_alias=True))
        report = run_stage(_dated(run))
        report["setup_seconds"] += opening
        data = {"paths": stage.paths, **data}
        record = stage_record(stage, parent, final, identity, base(), data, report)
        write_json(partial / "trivium.json", record)
    say(f"  saved {shown(final)} ({size(record['bytes_on_disk'])}, {clock(time.perf_counter() - started)})")
    going.done(stage, record)
    return record


def check_whole(folder: Path, quick: bool = False) -> None:
    """Raises CheckpointError where a finished stage's folder is not as it was written."""
    if not (folder / MANIFEST).is_file():
        return  # not made here, or before there were manifests
    if (reason := damage(folder, quick=quick)) is not None:
        raise CheckpointError(reason, f"restore it from a copy, or delete {shown(folder)}, and its stage is run again")


def set_aside(out: Path) -> Path | None:
    """Give a run's folder another name, which is returned; None where it is empty. Raises ModelError where it is no
    run's."""
    there = [p for p in out.iterdir() if p.name != LOCK]
    if not there:
        return None
    ours = [p for p in there if p.name == SUMMARY or p.name.endswith(TRAINING) or (p / "trivium.json").is_file()]
    if not ours:
        raise ModelError(f"{out}: not a run of trivium, so it is not moved", "choose another --out")
    number = next(n for n in count(1) if not out.with_name(f"{out.name}.{n}").exists())
    aside = out.with_name(f"{out.name}.{number}")
    with clear_errors(out):
        (out / LOCK).unlink()
        out.rename(aside)
    return aside


def open_stage(recipe: Recipe, stage: Stage, parent: Link, out: Path, partial: Path) -> tuple[Any, Any]:
    """The stage under way, and a function that tells where an adapter's base lies once it is known."""
    import torch

    from trivium.folder import identity_of, open_folder, place
    from trivium.model.quantized import quantized, unpack
    from trivium.model.reward import as_reward_model
    from trivium.peft import base as deltas
    from trivium.peft.kinds import FullSettings, quantization
    from trivium.peft.settings import settings_of
    from trivium.stage_runner import StageRun
    from trivium.train.machine import pick_device, pick_dtype

    device = pick_device(stage.device)
    new = parent.source == "new"
    dtype = pick_dtype(stage.dtype, device)
    wanted = settings_of(stage.method)
    # trained weights are float32, so a model to be trained in full is read in it, whatever it computes in
    held = "float32" if isinstance(wanted, FullSettings) else dtype
    changes = overrides(recipe, parent)
    opened = new_start(recipe, out, held, device) if new else open_folder(parent.source, held, device, changes)
    opened.model.dtype = getattr(torch, dtype)
    if is_start(recipe, parent) and recipe.model.get("add_tokens"):  # type: ignore[union-attr]
        add_tokens(opened.model, stage, wanted)
    lies = opened.base or parent.source
    rewards = STAGES[stage.stage].reads == "reward"
    if opened.model.gives_rewards and not rewards:
        what = f"{parent.source} is a reward model: it gives numbers, and has no words left to train"
        raise ModelError(what, f"start stages.{stage.name} from the model that it was made of")
    goes_on = deltas.continues(opened.model.hf, wanted) and quantized(opened.model.hf) == quantization(wanted)
    goes_on = goes_on and opened.model.gives_rewards == rewards
    if deltas.deltas(opened.model.hf) and not goes_on:
        say("  another method than its parent's: the parent's adapter is merged into its base first")
        unpack(opened.model.hf)
        deltas.merge(opened.model.hf)
        opened.settings, opened.base = FullSettings(), None
        lies = "merged"
    written: dict[str, str] = {}
    itself = opened.model  # a base is written as the language model that it is
    if rewards:
        opened.model = as_reward_model(opened.model, int(stage.seed or 0))

    def adapter_base() -> str:
        """Where the frozen base lies; written beside the stages where no folder holds it as it is used."""
        if "source" not in written:
            beside = _needs_writing(lies, recipe, parent)
            folder = out / (f"{stage.name}-base" if lies == "merged" else BASE)
            written["source"] = str(written_base(itself, folder).resolve()) if beside else lies
        return written["source"]

    def base() -> dict[str, Any] | None:
        if "source" not in written:
            return None
        return place(written["source"], identity_of(written["source"]), out / stage.name)

    return StageRun(stage, opened, partial, adapter_base, weights=parent.identity, others=current()), base


def _needs_writing(place: str, recipe: Recipe, parent: Link) -> bool:
    return place_of_base(place) is None or bool(overrides(recipe, parent))


def place_of_base(source: str) -> str | None:
    """Where a frozen base lies as it is used, given where it came from; None: no folder holds it."""
    return None if source in ("new", "merged") or source.endswith(".gguf") else source


def written_base(model: Any, folder: Path) -> Path:
    """Write a base as a whole model, once for the run; what is there already is overwritten, whole."""
    from trivium.data.templates import chat_template
    from trivium.folder import save_model

    with whole_folder(folder) as partial:
        save_model(model, partial, chat_template(model.tokenizer))
    say(f"  the frozen base is written to {shown(folder)}")
    return folder
