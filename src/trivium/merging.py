"""An adapter into its base: a standalone model, and the proof that it is the same one.

    merge(["runs/story/chat"], Path("chat-merged"))                # trivium merge ADAPTER --out DIR
    merge(["a", "b"], Path("both"), Combination("ties", density=0.5))

In float32 from the base that the adapter was trained on (a quantised one unpacked), and back to the dtype in which
that base is saved. Then both answer the same probe prompts: what is written is refused where their log-probabilities
are further apart than that dtype's rounding can make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.errors import DiskError, ModelError, RecipeError
from trivium.files import sha256_json, whole_folder, write_json
from trivium.folder import Opened, base_of, identity_of, is_adapter, open_folder, place, save, save_model
from trivium.model.language_model import LanguageModel
from trivium.model.proof import TOLERANCE
from trivium.model.quantized import unpack
from trivium.peft import base as deltas
from trivium.peft.combine import Factors, combine
from trivium.peft.hub import DEFAULT
from trivium.peft.kinds import FullSettings, LoRASettings, quantization
from trivium.peft.lora import LoRA
from trivium.peft.lora_starts import Started
from trivium.start import link_of

PROBES = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "def add(a, b):\n    return",
    "Give three reasons why people should read more books.",
)
DRAWN = 2  # rows of random tokens, besides
DRAWN_TOKENS = 48


@dataclass(frozen=True)
class Gate:
    """How far the merged model is from base and adapter, on the probes: ``logits`` at most, ``logprobs`` (of the
    adapter's likeliest tokens) on average and at most, and the share of places where both have the same likeliest."""

    logits: float
    logprobs: float
    logprobs_most: float
    same_token: float
    tokens: int
    dtype: str

    def line(self) -> str:
        return (
            f"merged = adapter on {self.tokens} probe tokens: logits within {self.logits:.1e}, log-probabilities "
            f"within {self.logprobs:.1e} on average, {self.same_token:.1%} the same next token ({self.dtype})"
        )


@dataclass(frozen=True)
class Combination:
    """How several LoRAs become one (`peft.combine`)."""

    how: str = "cat"
    weights: tuple[float, ...] | None = None  # left out: 1 for each
    rank: int | None = None
    density: float | None = None
    seed: int = 0


def merge(
    sources: Sequence[str], out: Path, combination: Combination | None = None, adapter: bool = False
) -> Gate | None:
    """Write ``out``: the merged model, or with ``adapter`` the combined LoRA alone (no gate then: None).

    Raises ModelError where a folder is no adapter, the method cannot be merged or the gate does not hold; DiskError
    where ``out`` is in the way.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DiskError(f"{out}: in the way", "choose another --out, or remove it")
    for source in sources:
        if not is_adapter(Path(source).expanduser()):
            raise ModelError(f"{source}: not an adapter folder", "give a folder with an adapter_config.json")
    if len(sources) == 1:
        if combination is not None or adapter:
            raise RecipeError("one adapter alone is not combined with anything", "give several, or only --out")
        opened = open_folder(sources[0], "float32")
    else:
        opened = combined(sources, combination or Combination())
    links = [link_of(source) for source in sources]
    how = asdict(combination) if combination else "merged"
    identity = sha256_json([*(link.identity for link in links), how])
    lineage = [step for link in links for step in link.lineage]
    own = {"name": out.name, "stage": "merge", "method": None, "identity": identity}
    record: dict[str, Any] = {"trivium": 1, "identity": identity, "lineage": [*lineage, own], "base": None}
    gate = None
    if not adapter:
        gate = merge_model(opened)
        record["merge"] = asdict(gate)
    with whole_folder(out) as partial:
        _write(opened, partial, out, record)
    return gate


def _write(opened: Opened, partial: Path, final: Path, record: dict[str, Any]) -> None:
    from trivium.data.templates import chat_template

    if isinstance(opened.settings, FullSettings):
        save_model(opened.model, partial, chat_template(opened.model.tokenizer))
    else:
        assert opened.base is not None
        save(opened.model, opened.settings, str(Path(opened.base).resolve()), partial)
        record["base"] = place(opened.base, identity_of(opened.base), final)
    write_json(partial / "trivium.json", record)


# --- the gate


def merge_model(opened: Opened) -> Gate:
    """Merge a float32 model's adapter and round the sum to the base's dtype.

    Raises ModelError where it cannot be merged, or where the merged model is another one.
    """
    model = opened.model
    if (found := deltas.obstacle(model.hf)) is not None:
        raise found
    rows = probes(model)
    expected = _logits(model, rows)
    unpack(model.hf)
    deltas.merge(model.hf)
    opened.settings, opened.base = FullSettings(), None
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.copy_(parameter.to(model.saved_dtype))
    gate = _apart(expected, _logits(model, rows), model.saved_dtype)
    limit = TOLERANCE[model.saved_dtype]
    if not (gate.logprobs <= limit.mean and gate.logprobs_most <= limit.most):
        raise ModelError(
            f"the merged model is not the adapter's: {gate.line()}, allowed are {limit.mean:.0e}",
            "keep the adapter beside its base, or merge into a base that is saved in float32",
        )
    return gate


def merge_difference(source: str) -> float | None:
    """Largest difference of logits between an adapter and its merged model on the probes; None where nothing can be
    merged, or nothing has to."""
    if not is_adapter(Path(source).expanduser()):
        return None
    opened = open_folder(source, "float32")
    return None if deltas.obstacle(opened.model.hf) is not None else merge_model(opened).logits


def probes(model: LanguageModel) -> list[list[int]]:
    """Token ids: a few sentences, and rows drawn from the vocabulary."""
    rows = [list(model.tokenizer(text, add_special_tokens=True)["input_ids"]) for text in PROBES]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(model.tokenizer), (DRAWN, DRAWN_TOKENS), generator=generator).tolist()
    return [row[: model.context] for row in [*rows, *drawn] if row]


def _logits(model: LanguageModel, rows: list[list[int]]) -> list[Tensor]:
    """``[n, V]`` for each row, float32; of a reward model ``[1, 1]``."""
    with torch.no_grad():
        said = [model.hf(input_ids=torch.tensor([row], device=model.device)).logits for row in rows]
    return [(one if model.gives_rewards else one[0]).float().cpu() for one in said]


def _apart(expected: list[Tensor], found: list[Tensor], dtype: torch.dtype) -> Gate:
    one, other = torch.cat(expected), torch.cat(found)
    likeliest = one.argmax(1, keepdim=True)
    if one.shape[1] == 1:  # rewards
        apart = (one - other).abs()
    else:
        apart = (one.log_softmax(1).gather(1, likeliest) - other.log_softmax(1).gather(1, likeliest)).abs()
    return Gate(
        logits=float((one - other).abs().max()),
        logprobs=float(apart.mean()),
        logprobs_most=float(apart.max()),
        same_token=float((likeliest[:, 0] == other.argmax(1)).float().mean()),
        tokens=len(one),
        dtype=str(dtype).removeprefix("torch."),
    )


# --- several LoRAs


def combined(sources: Sequence[str], combination: Combination) -> Opened:
    """One base with the LoRA that several LoRA folders become. Raises ModelError, RecipeError."""
    from trivium.peft import folder

    opened = open_folder(sources[0], "float32")
    model, base = opened.model.hf, opened.base
    assert base is not None
    names = [DEFAULT, *(f"adapter{n}" for n in range(1, len(sources)))]
    settings = [opened.settings]
    for source, name in zip(sources[1:], names[1:], strict=True):
        other = base_of(Path(source).expanduser())
        if identity_of(other) != identity_of(base):
            raise ModelError(
                f"{source} is an adapter on another base ({other}) than {sources[0]} ({base})",
                "combine adapters of one base",
            )
        settings.append(folder.load(model, Path(source).expanduser(), name).settings)
    found = [_factors(model, name, source) for name, source in zip(names, sources, strict=True)]
    if len({quantization(one) for one in settings}) > 1:
        raise ModelError("some of these adapters were trained on a quantised base, and some not", "combine alike ones")
    weights = combination.weights or (1.0,) * len(sources)
    made = combine(found, weights, combination.how, combination.rank, combination.density, combination.seed)
    for name in names:
        deltas.detach(model, name)
    opened.settings = _hang(model, made, quantization(settings[0]))
    return opened


def _factors(model: torch.nn.Module, name: str, source: str) -> dict[str, Factors]:
    """A LoRA's updates, by module. Raises ModelError for an adapter that is no plain LoRA."""
    found: dict[str, Factors] = {}
    for target, delta in deltas.deltas(model, name).items():
        if isinstance(delta, Started):
            a, b = delta.as_plain()
        elif type(delta) is LoRA:
            a, b = delta.lora_A, delta.lora_B
        else:
            raise ModelError(
                f"{source} is no plain LoRA ({type(delta).__name__} on {target})",
                "only LoRAs on linear modules can be combined",
            )
        found[target] = Factors(a.detach(), b.detach(), delta.scale)
    return found


def _hang(model: torch.nn.Module, made: dict[str, Factors], quantize: str | None) -> LoRASettings:
    """Hang the combined LoRA, of scale 1 everywhere."""
    ranks = {target: len(one.A) for target, one in made.items()}
    r = max(ranks.values())
    others = {target: n for target, n in ranks.items() if n != r}
    settings = LoRASettings(
        r=r, alpha=r, target_modules=tuple(made), quantize=quantize, rank_pattern=others or None,
        alpha_pattern={target: float(n) for target, n in others.items()} or None,
    )  # fmt: skip
    plan = deltas.plan_for(model, settings)
    assert plan is not None
    weights = {f"{t}.lora_{which}": getattr(one, which) for t, one in made.items() for which in "AB"}
    deltas.hang(model, settings, plan, lambda hung: deltas.copy_in(deltas.small_weights(hung), weights))
    return settings
