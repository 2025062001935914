"""The same in a notebook: what `trivium run` does, step by step, with rows and models in memory.

    model = trivium.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # or a folder, a .gguf file
    model.attach("lora", r=16)
    model.train(rows, "sft", max_steps=30, learning_rate=2e-4)   # proofs, ledger and log as in a run
    model.train(pairs, "preference")                             # its parent is the model as it was before
    print(model.generate("What is the capital of France?"))
    model.save("my-adapter")                                     # what peft and `trivium chat` load

Whatever a user can mend is a `UserError` with its remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.api_adapters import WithAdapters
from trivium.api_judged import Judged
from trivium.api_rows import Prompt, Rows, listed_rows, messages_of, one_stage, source_of
from trivium.chain import place_of_base, run_recipe, written_base
from trivium.checks import check_fit
from trivium.comparing.call import compare as compare
from trivium.data.templates import chat_template
from trivium.errors import DiskError, RecipeError
from trivium.evaluate.held_out import evaluate
from trivium.evaluate.judge import Judge
from trivium.evaluate.score import best
from trivium.files import sha256_json, whole_folder, write_json
from trivium.folder import Opened, attach, identity_of, open_folder, place, record_of, save
from trivium.model.proof import prove
from trivium.model.quantized import unpack
from trivium.objectives import objective
from trivium.peft import base as deltas
from trivium.peft.kinds import FullSettings, Settings, quantization
from trivium.peft.settings import method_name, settings_of
from trivium.recipe import DataSource, Stage
from trivium.recipe_file import any_recipe
from trivium.stage_data import InMemory, packed, stage_examples
from trivium.stage_proof import probe
from trivium.stage_runner import run_stage
from trivium.stage_work import StageRun
from trivium.stages import resolve
from trivium.start import Link, data_hashes, fresh_model, link_of, tokenizer_from
from trivium.summary import link_record, stage_identity, stage_record
from trivium.talk import Talker
from trivium.train.machine import pick_device, pick_dtype


def run(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    until: str | None = None,
    judge: Judge | None = None,
    fresh: bool = False,
    accept_changed_data: bool = False,
) -> dict[str, Any]:
    """Carry out a recipe, a YAML file or the same as a mapping; returns what ``summary.json`` holds.

    ``overrides`` are ``key=value`` as `trivium run --set` takes them; ``judge`` looks at answers while it trains
    (`trivium.evaluate.judge`). What was interrupted goes on; ``fresh`` starts over and keeps the old folder aside,
    ``accept_changed_data`` goes on with other rows. Raises a UserError with what is wrong and what to do.
    """
    read = any_recipe(recipe, overrides)
    folder = Path(out) if out is not None else Path("runs") / read.name
    return run_recipe(read, folder, until, judge, fresh, accept_changed_data)


def load(source: str | Path, *, device: str | None = None, dtype: str = "auto") -> Model:
    """A model folder, adapter folder, ``.gguf`` file or hub id. Raises ModelError.

    ``device``: cpu, cuda, mps; left out, the fastest there is. ``dtype`` is computation and frozen weights.
    """
    where = pick_device(device)
    computation = pick_dtype(dtype, where)
    opened = open_folder(str(source), computation, where)
    base = opened.base if opened.base is not None else place_of_base(str(source))
    return Model(opened, link_of(str(source)), base)


def new(
    rows: Rows, *, architecture: str = "llama", vocab_size: int = 4096, seed: int = 0, device: str | None = None,
    **sizes: Any,
) -> Model:  # fmt: skip
    """A model of random weights, its tokenizer trained on the rows' ``text``; ``sizes`` as in a recipe's ``model``."""
    tokenizer = tokenizer_from([source_of(rows)], vocab_size)
    model = fresh_model({"architecture": architecture, "vocab_size": vocab_size, **sizes}, tokenizer, seed,
                      pick_dtype("auto", pick_device(device)), pick_device(device))  # fmt: skip
    identity = sha256_json([architecture, sizes, seed, tokenizer.backend_tokenizer.to_str()])
    lineage = [{"name": "new", "stage": "random weights", "method": None, "identity": identity}]
    return Model(Opened(model, FullSettings(), None), Link("new", identity, lineage), None)


class Model(WithAdapters, Judged):
    """A language model in hand. Made by `load` and `new`."""

    def __init__(self, opened: Opened, link: Link, base: str | None) -> None:
        self._opened, self._link = opened, link
        self._base = base  # where the frozen base lies as it is used; None: nowhere but in memory
        self._made: dict[str, Any] | None = None  # of the last stage, for its record
        self._bare = link if opened.base is None else link_of(opened.base)  # what is left when its adapter is detached

    def __repr__(self) -> str:
        model = self._opened.model
        return f"Model({type(model.hf).__name__}, {model.parameters():,} parameters, method {self.method['name']})"

    @property
    def hf(self) -> Any:
        """The `transformers` model itself."""
        return self._opened.model.hf

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, as `transformers` knows it."""
        return self._opened.model.tokenizer

    @property
    def method(self) -> dict[str, Any]:
        """What is trained: ``{"name": "full"}``, or the adapter that hangs in the model and its settings."""
        settings = self._opened.settings
        return {"name": method_name(settings), **{k: v for k, v in vars(settings).items() if v is not None}}

    @property
    def parameters(self) -> int:
        """Parameters in all, tied ones counted once, an adapter's included."""
        return self._opened.model.parameters()

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """Every step this model has gone through, the first at the start."""
        return list(self._link.lineage)

    def attach(self, method: str = "lora", *, seed: int = 0, **settings: Any) -> Model:
        """Freeze the model and hang an adapter in it, which changes nothing until it is trained.

        Raises RecipeError for a method or setting that is not there, or where an adapter hangs already.
        """
        if deltas.deltas(self.hf):
            raise RecipeError(f"the model has an adapter already ({self.method['name']})", "call merge() first")
        wanted = settings_of({"name": method, **settings})
        if isinstance(wanted, FullSettings):
            raise RecipeError("full is no adapter", "train without attach()")
        self._check_base(wanted)
        attach(self._opened.model, wanted, seed)
        self._opened.settings, self._bare = wanted, self._link
        return self

    # --- to train, to ask, to keep

    def train(
        self, rows: Rows, stage: str = "sft", *, eval_rows: Rows | None = None, judge: Judge | None = None,
        **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Train on rows, in memory or in files, as a recipe's stage of these settings would.

        Returns the stage's record: costs, metrics before and after, rows, proof, and the ``curve`` of every step. The
        model as it was before is the parent that preference tuning compares with. Raises a UserError.
        """
        for key in ("save_every", "save_minutes", "keep_checkpoints", "result"):
            if key in settings:
                raise RecipeError(
                    f"{key}: a model in memory has no checkpoints", "use trivium.run for a run in a folder"
                )
        if others := [name for name in self.adapters if name != "default"]:
            raise RecipeError(f"the model has other adapters ({', '.join(others)})", "detach them, or load it anew")
        if deltas.deltas(self.hf):
            self.use("default")
        in_files = isinstance(rows, (str, Path))
        given: dict[str, Any] = {"data": str(rows) if in_files else "rows"}
        if eval_rows is not None:
            if isinstance(eval_rows, (str, Path)) != in_files:
                raise RecipeError("rows and eval_rows: one in files, one in memory", "give both as files, or as rows")
            given["eval_data"] = str(eval_rows) if in_files else 0
        full = self._stage(stage, {**given, **settings})
        self._become(full)
        memory = None
        if not in_files:
            memory = InMemory(listed_rows(rows), None if eval_rows is None else listed_rows(eval_rows, "eval_rows"))
        data = {"sha256": sha256_json([memory.rows.rows, eval_rows])} if memory else data_hashes(full)
        report = run_stage(StageRun(full, self._opened, data=memory, judge=judge))
        identity = stage_identity(self._link, data, full)
        self._made = {"stage": full, "parent": self._link, "identity": identity,
                      "data": {"paths": full.paths, **data}, "report": report}  # fmt: skip
        self._link = Link("memory", identity, [*self._link.lineage, link_record(full, identity)])
        self._base = self._base if deltas.deltas(self.hf) else None
        return report

    def _check_base(self, settings: Settings) -> None:
        """A base to be quantised must lie in a folder as it is: adapters are saved beside it. Raises RecipeError."""
        if quantization(settings) is not None and self._base is None:
            raise RecipeError(
                f"quantize: {quantization(settings)}: this model lies in no folder as it is, and its weights are about "
                "to be rounded", "save() it, and attach to what load() gives of that folder",
            )  # fmt: skip

    def _stage(self, kind: str, values: dict[str, Any]) -> Stage:
        """The stage with every setting filled in. Raises RecipeError."""
        recipe = one_stage(kind, values)
        stage, model = recipe.stages[0], self._opened.model
        self._check_reads(stage)
        other = stage.method is not None and not deltas.continues(self.hf, settings_of(stage.method))
        if other and deltas.deltas(self.hf):
            have = self.method["name"]
            raise RecipeError(f"method: the model has another adapter ({have})", "call merge() first")
        device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        for key, has in (("device", device), ("dtype", dtype)):
            if getattr(stage, key) not in (None, "auto", has):
                raise RecipeError(f"{key}: the model was loaded with {has}", f"give {key} to load()")
        given = {"device": device, "dtype": dtype}
        parent = {**given, "method": self.method} if deltas.deltas(self.hf) else given
        full, _ = resolve(stage, recipe, parent, "the model")
        if not deltas.deltas(self.hf):
            self._check_base(settings_of(full.method))
        check_fit(model, recipe, [full])
        return full

    def generate(
        self, prompt: Prompt | Sequence[Prompt], max_new_tokens: int = 256, *, temperature: float = 0.0, seed: int = 0,
        samples: int = 1,
        raw: bool = False,
        best_by: Model | None = None,
    ) -> Any:  # fmt: skip
        """The answer to a prompt, a text or a list of messages; for a list of prompts, a list of answers.

        ``samples`` answers to each prompt, drawn with a temperature above 0, make each a list of answers.
        With ``best_by``, a reward model, only the one it gives most (best of n).
        ``raw`` continues a text as it stands, without the chat template. Temperature 0 is always the likeliest token.
        """
        if best_by is not None and (raw or samples < 2 or not temperature):
            raise RecipeError("best_by chooses among several answers", "give samples=8, temperature=0.8, and no raw")
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
        talker = Talker.of(self._opened.model)
        prompts: list[Any] = [prompt] if one else list(prompt)
        ids = [
            talker.raw_prompt(p) if raw and isinstance(p, str) else talker.prompt(messages_of(p)) for p in prompts
        ]  # fmt: skip
        found: list[Any] = talker.answers_to(ids, max_new_tokens, temperature, seed, samples)
        if samples > 1:
            found = [found[at : at + samples] for at in range(0, len(found), samples)]
        if best_by is not None:
            found = best(best_by._opened.model, [messages_of(p) for p in prompts], found)
        return found[0] if one else found

    def evaluate(self, rows: Rows, stage: str = "sft", **settings: Any) -> dict[str, float]:
        """``loss`` per trained token and ``bits_per_byte`` on rows of a pretraining or SFT stage. Trains nothing."""
        full = self._stage(stage, {"data": "rows", **settings, "eval_data": 0})
        if full.loss != "next_token":
            raise RecipeError(f"evaluate: {stage} rows are compared with a parent", "use pretrain or sft")
        model = self._opened.model
        given = InMemory(listed_rows(rows)) if not isinstance(rows, (str, Path)) else None
        if given is None:
            full = full.model_copy(update={"data": [DataSource(path=str(rows), weight=None, fields=None)]})
        data, _ = stage_examples(full, model, chat_template(self.tokenizer), given)
        with model.laid_out(prove(model, probe(data.examples)).layout):
            forests = packed(data.examples, int(full.micro_batch_tokens or 1), model.device)
            return evaluate(objective(full.model_dump()), model.logprob, lambda _: None, forests)

    def merge(self) -> Model:
        """Fold the adapter into the base; raises ModelError where the method cannot be (a non-linear adapter)."""
        if others := [name for name in self.adapters if name != "default"]:
            raise RecipeError(f"the model has other adapters ({', '.join(others)})", "detach them first")
        if not self.adapters:
            raise RecipeError("the model has no adapter to merge", "attach one, or load an adapter folder")
        unpack(self.hf)
        deltas.merge(self.hf)
        identity = sha256_json([self._link.identity, "merged"])
        own = {"name": "merged", "stage": "merge", "method": None, "identity": identity}
        self._opened.settings, self._base, self._made = FullSettings(), None, None
        self._link = Link("memory", identity, [*self._link.lineage, own])
        return self

    def save(self, folder: str | Path) -> Path:
        """Write what `transformers` (a whole model) or `peft` (LoRA) loads, with its lineage; returns the folder.

        An adapter whose base lies in no folder gets it beside itself, in ``FOLDER-base``. What is there already is
        replaced if it was saved by trivium. Raises DiskError, ModelError.
        """
        final = Path(folder).expanduser().absolute()
        if final.exists() and not (final.is_dir() and (record_of(final) or not any(final.iterdir()))):
            raise DiskError(f"{final}: in the way, and not a folder of trivium", "choose another folder")
        if others := [name for name in self.adapters if name != "default"]:
            raise RecipeError(f"the model has other adapters ({', '.join(others)})", "detach them before saving")
        model, hung = self._opened.model, deltas.deltas(self.hf)
        if hung and self._base is None:
            self._base = str(written_base(model, final.with_name(f"{final.name}-base")))
        with whole_folder(final) as partial:
            save(model, self._opened.settings, self._base, partial)
            write_json(partial / "trivium.json", self._record(final))
        if not hung:
            self._base = str(final)
        return final

    def _record(self, final: Path) -> dict[str, Any]:
        base = None
        if deltas.deltas(self.hf):
            base = place(str(self._base), identity_of(str(self._base)), final)
        if self._made is not None:
            report = {k: v for k, v in self._made["report"].items() if k != "curve"}
            return stage_record(**{**self._made, "report": report}, final=final, base=base)
        return {"trivium": 1, "identity": self._link.identity, "lineage": self._link.lineage, "base": base,
                "settings": {"method": self.method}}  # fmt: skip
