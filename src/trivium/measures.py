"""What the models of a run are measured by after each stage, beyond their own training: ``measures.json``.

Every model, the given one included, takes the same `Exam`; so the report can lay their answers side by side and show
what a stage made the model forget. A model that was measured so before is not measured again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.errors import ModelError
from trivium.files import read_json, sha256_json, write_json
from trivium.recipe import Recipe, Stage
from trivium.sources import held_out_from, held_out_share, trained_on
from trivium.stages import STAGES, rows_of
from trivium.start import Link, overrides
from trivium.terminal import clock, say

if TYPE_CHECKING:
    from trivium.data.rows import Mix
    from trivium.evaluate.exam import Exam
    from trivium.evaluate.judge import Judge

MEASURES = "measures.json"
ANSWERS = ("pair", "rating")  # rows of stages whose models are compared with their parents
START = "model"  # the name of the given model among the stages; no stage may have it


class Measures:
    """The measures of a run's models, by stage; ``judge`` is a program of one's own that looks at answers."""

    def __init__(self, out: Path, recipe: Recipe, stages: list[Stage], judge: Judge | None = None) -> None:
        self.file, self.judge, self.out, self.recipe = out / MEASURES, judge, out, recipe
        self.exam = exam_of(recipe, stages)
        asked = {"prompts": self.exam.shown(), "texts": len(self.exam.texts)}
        self.key = sha256_json([self.exam.prompts, self.exam.texts])
        known = _read(self.file)
        self.found: dict[str, Any] = {"key": self.key, **asked, "models": {}}
        self.known = known.get("models", {}) if known.get("key") == self.key else {}

    def of_start(self, recipe: Recipe, start: Link, stage: Stage) -> None:
        """Measure the given model that the run starts from; a new one knows nothing yet, a reward model no words."""
        from trivium.folder import rewards_in

        if start.source != "new" and not (Path(start.source).is_dir() and rewards_in(Path(start.source))):
            say(f"{START}: {start.source}")
            self._take(START, start.identity, start.source, stage, overrides(recipe, start))

    def of_stage(self, stage: Stage, folder: Path, identity: str, parent: Link) -> None:
        """Measure what a stage has saved; one that learns from answers to one prompt, against its parent too."""
        if STAGES[stage.stage].reads == "reward":
            return  # it has no words
        self._take(stage.name, identity, str(folder), stage, {})
        asked = self.recipe.prompts != [] or self.recipe.judge is not None
        if rows_of(stage) in ANSWERS and parent.source != "new" and self.recipe.judge_prompts and asked:
            self._against(stage, folder, identity, parent)

    def _against(self, stage: Stage, folder: Path, identity: str, parent: Link) -> None:
        """What preference tuning did to a model's answers, unless that was found out before."""
        from trivium.evaluate.exam import prompts_from
        from trivium.judging import judge, preference_of

        asked = self.recipe.judge
        sources, share = _held_out(stage)
        prompts = prompts_from(sources, rows_of(stage), share, self.recipe.judge_prompts)
        by = [asked.model_dump() if asked is not None else None, self._judged_by()]
        key = sha256_json([identity, parent.identity, prompts, by])
        found = self.known.get(stage.name, {}).get("against")
        if not isinstance(found, dict) or found.get("key") != key:
            started = time.perf_counter()
            prefers = preference_of(asked, self.out, stage.device) if asked is not None else None
            changes = overrides(self.recipe, parent)
            try:
                compared = judge(str(folder), parent.source, prompts, prefers, device=stage.device, dtype=stage.dtype,
                                 changes=changes)  # fmt: skip
            except ModelError as error:
                if asked is None or asked.endpoint is None:
                    raise
                say(f"  note: {stage.name} is not judged: {error.what}; the same command asks again")
                return
            if compared is None:
                say(f"  note: no held-out prompt leaves room for an answer, so {stage.name} is not compared")
                return
            found = {"key": key, **compared.as_dict(), "line": compared.line()}
            say(f"  against its parent: {compared.line()} ({clock(time.perf_counter() - started)})")
            found = json.loads(json.dumps(found))  # as it will be read again
        known = self.found["models"].setdefault(stage.name, {})
        if known.get("against") != found:
            known["against"] = found
            write_json(self.file, self.found)

    def _judged_by(self) -> str | None:
        """The identity of the reward model that judges."""
        from trivium.folder import identity_of
        from trivium.judging import place_of

        asked = self.recipe.judge
        return identity_of(place_of(asked.reward, self.out)) if asked is not None and asked.reward else None

    def around(self, stage: Stage) -> dict[str, Any]:
        """For the summary: bits per byte of the run's text before and after a stage, and the verdicts."""
        before, after = (self.found["models"].get(n, {}) for n in (stage.from_ or START, stage.name))
        bits = {"before": before.get("bits_per_byte"), "after": after.get("bits_per_byte")}
        found: dict[str, Any] = {"text_bits_per_byte": bits} if bits["after"] is not None else {}
        if "against" in after:
            kept = ("unchanged", "tokens", "kl", "won", "line")
            found["against"] = {k: v for k, v in after["against"].items() if k in kept}
        return found | ({"judged": after["judged"]} if "judged" in after else {})

    def _take(self, name: str, identity: str, source: str, stage: Stage, changes: dict[str, Any]) -> None:
        """Measure one model, unless that was done before."""
        if not (self.exam.prompts or self.exam.texts or self.judge):
            return
        found = self.known.get(name)
        judge = None if self.judge is None else getattr(self.judge, "key", object())
        if found is None or found.get("identity") != identity or found.get("judge") != judge:
            found = self._measured(identity, source, stage, changes)
        if "against" in (kept := self.known.get(name, {})):
            found = {**found, "against": kept["against"]}
        self.found["models"][name] = found
        if found != self.known.get(name):
            write_json(self.file, self.found)

    def _measured(self, identity: str, source: str, stage: Stage, changes: dict[str, Any]) -> dict[str, Any]:
        from trivium.evaluate.judge import judged
        from trivium.talk import Talker

        started = time.perf_counter()
        talker = Talker.open(source, stage.device, stage.dtype, changes)
        found: dict[str, Any] = {"identity": identity, **self.exam.take(talker)}
        if self.judge is not None:
            found |= {"judged": judged(self.judge(talker, None)), "judge": getattr(self.judge, "key", "")}
        found["seconds"] = time.perf_counter() - started
        told = [f"{found['bits_per_byte']:.4f} bits per byte of the run's text"] if found["bits_per_byte"] else []
        asked = len(self.exam.prompts)
        told += [f"{asked} prompt{'s' * (asked > 1)} answered"] if asked else []
        say(f"  measured: {', '.join([*told, clock(found['seconds'])])}")
        return found


def _held_out(stage: Stage) -> tuple[list[Mix], float | None]:
    """Where a stage's held-out rows lie, and their share of these rows; where it has none, all of its rows."""
    own = held_out_from(stage)
    return (own, None) if own is not None else (trained_on(stage), held_out_share(stage) or None)


def _read(file: Path) -> dict[str, Any]:
    """What an earlier run wrote; nothing, where that cannot be read: it is measured again."""
    try:
        found = read_json(file) if file.is_file() else {}
    except ModelError:
        return {}
    models = found.get("models") if isinstance(found, dict) else None
    return found if isinstance(models, dict) and all(isinstance(m, dict) for m in models.values()) else {}


def exam_of(recipe: Recipe, stages: list[Stage]) -> Exam:
    """The recipe's own prompts and text, or else held-out rows of its first SFT and its first pretraining stage."""
    from trivium.data.hub import local
    from trivium.evaluate.exam import Exam, prompts_from, texts_from

    prompts: tuple[Any, ...] = ()
    if recipe.prompts is not None:
        prompts = tuple(({"role": "user", "content": p},) for p in recipe.prompts)
    else:
        ranked = sorted(stages, key=lambda s: ("conversation", "pair", "rating", "text").index(rows_of(s)))
        sources, share = _held_out(ranked[0])
        kind = rows_of(ranked[0])
        prompts = prompts_from(sources, kind, share) or prompts_from(sources, kind, None)
    texts: tuple[str, ...] = ()
    reads = [s for s in stages if rows_of(s) == "text"]
    if recipe.eval_text is not None:
        texts = texts_from([local(recipe.eval_text)], None)
    elif reads:
        texts = texts_from(*_held_out(reads[0]))
    return Exam(prompts, texts)
