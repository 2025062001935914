"""What a model is made of, and what each method would train in it: ``trivium inspect MODEL --modules``.

Built on the ``meta`` device from the config alone: no weight is read, and a model of any size takes the same second.
Layers that are alike are shown once.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from trivium.errors import UserError
from trivium.folder import base_of, is_adapter
from trivium.model.load import shape_of
from trivium.peft.base import plan_for, small_weights
from trivium.peft.delta import Delta
from trivium.peft.settings import method_of_preset, settings_of
from trivium.peft.targets import decoder_layers, text_config
from trivium.summary import aligned

# A letter for each method, and the methods; the variants of LoRA train where LoRA does.
SHOWN = {
    "L": "lora", "D": "dora", "V": "vera", "H": "houlsby", "P": "pfeiffer", "R": "parallel", "C": "compacter",
    "I": "ia3", "T": "prompt", "X": "prefix", "B": "bitfit", "N": "layer_norms", "K": "top_layers",
}  # fmt: skip


def modules_of(source: str) -> dict[str, Any]:
    """Every module with weights, its shapes, and the methods that would train there; and what each would train.

    Of an adapter folder it is the base that is shown. Raises ModelError for what is no model.
    """
    folder = Path(source).expanduser()
    model = shape_of(base_of(folder) if folder.is_dir() and is_adapter(folder) else source)
    plans: dict[str, dict[str, Delta]] = {}
    total = sum(p.numel() for p in model.parameters())
    methods: list[dict[str, Any]] = [{"letter": "", "name": "full", "trained": total}]
    for letter, name in SHOWN.items():
        told: dict[str, Any] = {"letter": letter, "name": name}
        try:
            plan = plan_for(model, settings_of(method_of_preset(name)))
            assert plan is not None
            plans[letter] = plan.deltas
            trained = sum(tensor.numel() for tensor in small_weights(plan.deltas).values())
            told |= {"trained": trained, "modules": len(plan.deltas)}
        except UserError as error:
            told["refused"] = error.what
        methods.append(told)
    found = []
    for name, module in model.named_modules():
        own = {key: list(p.shape) for key, p in module.named_parameters(recurse=False)}
        letters = [letter for letter, deltas in plans.items() if name in deltas]
        if own or letters:
            found.append({"name": name, "kind": type(module).__name__, "shapes": own, "methods": letters})
    config = text_config(model)
    return {
        "source": source, "architecture": type(model).__name__, "parameters": total,
        "layers": list(decoder_layers(model)), "width": config.hidden_size, "modules": found, "methods": methods,
    }  # fmt: skip


def shown(found: dict[str, Any]) -> str:
    """The same for a person: the tree with alike layers once, then the methods."""
    head = (
        f"{found['source']}: {found['architecture']}, {found['parameters']:,} parameters, "
        f"{len(found['layers'])} layers of width {found['width']:,}"
    )
    rows = [["module", "shape", "trained by"]]
    for prefix, group in _groups(found):
        indent = "  " if prefix else ""
        if prefix:
            rows.append([prefix, "", ""])
        rows += [[indent + name, _shape(one["shapes"]), " ".join(one["methods"])] for name, one in group]
    methods = [["", "method", "trained", "share", "modules"]]
    methods += [
        [one["letter"], one["name"], f"{one['trained']:,}", f"{100 * one['trained'] / found['parameters']:.3g}%",
         str(one.get("modules", "all"))]
        for one in found["methods"] if "trained" in one
    ]  # fmt: skip
    notes = [f"not {one['name']}: {one['refused']}" for one in found["methods"] if "refused" in one]
    notes += ["at their default settings; qlora, rslora, pissa, olora and loraplus train what lora does"]
    return "\n".join([head, "", aligned(rows, left=3), "", aligned(methods, left=2), "", *notes])


def _groups(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """(heading, modules by their names under it): what lies outside the layers, and runs of layers that are alike."""
    layers = found["layers"]
    stem = layers[0].rpartition(".")[0]

    def layer(one: dict[str, Any]) -> int:
        own = one["name"].removeprefix(f"{stem}.") if one["name"].startswith(f"{stem}.") else ""
        return int(own.split(".")[0]) if own else -1

    blocks = [(number, list(ones)) for number, ones in groupby(found["modules"], layer)]
    made: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = []
    alike: list[tuple[str, Any, Any]] = []
    first = last = -1
    for number, ones in blocks:
        if number < 0:
            made.append(("", [(one["name"], one) for one in ones]))
            continue
        names = [one["name"].removeprefix(f"{stem}.{number}").removeprefix(".") for one in ones]
        kind = [(n, one["shapes"], one["methods"]) for n, one in zip(names, ones, strict=True)]
        if kind == alike and last == number - 1:
            last = number
            made[-1] = (f"{stem}.{first}–{last} ({last - first + 1} times)", made[-1][1])
        else:
            first, last, alike = number, number, kind
            made.append((f"{stem}.{number}", list(zip(names, ones, strict=True))))
    return made


def _shape(shapes: dict[str, list[int]]) -> str:
    """``64 × 64`` of a weight alone; others by name."""
    told = {key: " × ".join(map(str, shape)) for key, shape in shapes.items()}
    if "weight" in told:
        rest = [f"{key} {shape}" for key, shape in told.items() if key not in ("weight", "bias")]
        return ", ".join([told["weight"] + (" + bias" if "bias" in told else ""), *rest])
    return ", ".join(f"{key} {shape}" for key, shape in told.items())
