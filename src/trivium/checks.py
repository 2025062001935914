"""What can be seen to be wrong with a recipe before anything is trained: files, sizes, methods, lengths."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trivium.errors import DataError, ModelError, RecipeError, UserError
from trivium.recipe import Recipe, Stage
from trivium.stages import STAGES
from trivium.train.processes import Processes


def check_data(stage: Stage) -> None:
    """The files of a stage are there and hold something; raises DataError."""
    from trivium.sources import held_out_from, trained_on

    for group in (trained_on(stage), held_out_from(stage)):
        files = [file for mix in group or [] for file in mix.files()]
        if group is not None and not any(file.stat().st_size for file in files):
            empty = (
                f"{files[0]} is empty" if len(files) == 1 else f"all files of {', '.join(map(str, files))} are empty"
            )
            raise DataError(f"no rows: {empty}", "give a file with at least one row")


def check_texts(recipe: Recipe) -> None:
    """The text that all models are measured on is there; raises DataError."""
    if recipe.eval_text is None:
        return
    from trivium.data.hub import local
    from trivium.data.rows import texts_of

    if not any(text.strip() for text in texts_of([local(recipe.eval_text)])):
        what = f"eval_text: no row of {recipe.eval_text} has a text"
        raise DataError(what, 'give rows like {"text": "..."}, or a .txt file')


def check_judge(recipe: Recipe) -> None:
    """Whoever is to judge preference stages is there; raises ModelError."""
    judge = recipe.judge
    if judge is None or judge.reward in {stage.name for stage in recipe.stages}:
        return
    if judge.endpoint is not None:
        from trivium.evaluate.endpoint import Endpoint

        Endpoint(judge.endpoint, str(judge.model))
        return
    from trivium.folder import rewards_in
    from trivium.model.load import locate

    source = str(judge.reward)
    if not Path(source).is_dir():
        locate(source)
    elif not rewards_in(Path(source)):
        stages = ", ".join(s.name for s in recipe.stages if STAGES[s.stage].reads == "reward") or "none"
        what = f"judge.reward: {source} is no reward model, and no stage of this recipe"
        raise ModelError(what, f"give a reward model's folder, or a reward stage (there are: {stages})")


def check_sizes(recipe: Recipe) -> None:
    """The sizes of a new model fit together, before a tokenizer is trained for it; raises RecipeError."""
    if isinstance(recipe.model, dict) and "architecture" in recipe.model:
        from trivium.model import new
        from trivium.model.load import quiet

        with quiet():
            new.check_sizes({k: v for k, v in recipe.model.items() if k != "tokenizer"})


def check_extras(stages: list[Stage]) -> None:
    """What an optional package is needed for has it; raises ModelError."""
    from trivium.peft.kinds import quantization
    from trivium.peft.settings import settings_of

    if any(quantization(settings_of(stage.method)) for stage in stages) and find_spec("bitsandbytes") is None:
        raise ModelError("a quantised base needs bitsandbytes", 'pip install "trivium[qlora]"')


def check_fit(model: Any, recipe: Recipe, stages: list[Stage]) -> None:
    """What later stages ask of this model is there, so that it is not found out hours later; raises RecipeError."""
    from trivium.model.reward import check_rewards
    from trivium.peft.base import plan_for
    from trivium.peft.kinds import virtual_tokens
    from trivium.peft.settings import settings_of

    if any(STAGES[stage.stage].reads == "reward" for stage in stages):
        check_rewards(model)
    plans = {}
    for stage in stages:
        try:
            plans[stage.name] = plan_for(model.hf, settings_of(stage.method))
        except UserError as error:
            raise RecipeError(f"stages.{stage.name}.method: {error.what}", error.remedy) from None
        plan = plans[stage.name]
        starts = [delta.starts_as_base for delta in plan.deltas.values()] if plan is not None else []
        if stage.reference_sync_steps and not all(starts):
            what = (
                f"stages.{stage.name}.reference_sync_steps: {(stage.method or {})['name']} does not start as its parent"
            )
            raise RecipeError(what, "leave it out, or use another method")
    _check_merges(model, stages, plans)
    for stage in recipe.stages[: len(stages)]:  # as written: a default gives way to the model's context
        taken = virtual_tokens(settings_of(stage.method))
        context = model.context - (0 if model.virtual else taken)
        if context < 2:
            what = f"stages.{stage.name}.method: {taken} virtual tokens leave nothing of the model's context"
            raise RecipeError(f"{what} of {model.context}", "use fewer")
        if stage.max_length and stage.max_length > context:
            less = f" less {taken} virtual tokens" if taken else ""
            raise RecipeError(
                f"stages.{stage.name}.max_length: {stage.max_length} is more than the model's context{less}: {context}",
                f"use at most {context}, or build the model with a larger max_position_embeddings",
            )


def _check_merges(model: Any, stages: list[Stage], plans: dict[str, Any]) -> None:
    """Where a stage has another method than its parent's, the parent's adapter can be merged; raises RecipeError."""
    from trivium.peft.base import alike
    from trivium.peft.kinds import quantization
    from trivium.peft.settings import settings_of

    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        before, own = by_name.get(stage.from_ or ""), plans[stage.name]
        parent = plans[before.name] if before is not None else None
        if before is None or parent is None:
            continue
        same_base = quantization(settings_of(before.method)) == quantization(settings_of(stage.method))
        same_base = same_base and STAGES[before.stage].reads == STAGES[stage.stage].reads
        if own is not None and same_base and alike(parent.deltas, own.deltas):
            continue  # it goes on with its parent's adapter
        for name, delta in parent.deltas.items():
            if (found := delta.obstacle(model.hf.get_submodule(name))) is not None:
                what = f"stages.{stage.name}.method: {before.name}'s adapter would have to be merged first"
                raise RecipeError(f"{what}: {found.what}", f"keep the method of {before.name}, or start elsewhere")


def check_several(others: Processes, profile: bool) -> None:
    """What is asked for can be done by several processes; raises RecipeError."""
    if others.count > 1 and profile:
        what = f"--profile tells of one process, and there are {others.count}"
        raise RecipeError(what, "start it without torchrun for a profile")
