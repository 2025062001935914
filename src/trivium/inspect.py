"""What a folder is, read from its files without loading a weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trivium.errors import ModelError, beside
from trivium.files import folder_bytes, read_json
from trivium.folder import base_of, is_adapter, record_of, rewards_in
from trivium.model.headers import header
from trivium.model.load import locate
from trivium.model.untrusted import check_files
from trivium.terminal import size


def described(source: str) -> dict[str, Any]:
    """Kind, architecture, parameters, bytes, dtype, base, lineage. Raises ModelError for what is no model folder."""
    folder = Path(source).expanduser()
    if not folder.exists():
        raise ModelError(f"{source}: no such folder", f"give a model or adapter folder{beside(folder)}")
    if folder.is_file():
        locate(source)
        return {"path": str(folder), "kind": "GGUF file", "bytes": folder.stat().st_size}
    record = record_of(folder) or {}
    found: dict[str, Any] = {"path": str(folder)}
    if is_adapter(folder):
        check_files(folder)
        found |= {"kind": "adapter", "base": base_of(folder)}
        weights = ["adapter_model.safetensors"]
    else:
        locate(source)
        found |= {"kind": "model", "architecture": read_json(folder / "config.json").get("model_type")}
        weights = sorted(p.name for p in folder.glob("*.safetensors"))
    if rewards_in(folder):
        found["kind"] = "reward model" if found["kind"] == "model" else "reward model's adapter"
    tensors = [header(folder / name) for name in weights]
    dtypes = sorted({t["dtype"] for h in tensors for t in h.values()})
    found["parameters"] = sum(math.prod(t["shape"]) for h in tensors for t in h.values())
    found |= {"bytes": folder_bytes(folder, ".safetensors"), "dtype": ", ".join(dtypes)}
    keys = (
        "name",
        "stage",
        "method",
        "identity",
        "trained_parameters",
        "total_parameters",
        "metrics",
        "rows",
        "lineage",
    )
    return found | {k: record[k] for k in keys if k in record}


def shown(found: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{found['path']}: {found['kind']}"]
    if "architecture" in found:
        lines[0] += f" ({found['architecture']})"
    if "parameters" in found:
        lines.append(f"  parameters  {found['parameters']:,} ({found['dtype']}), {size(found['bytes'])}")
    else:
        lines.append(f"  bytes       {size(found['bytes'])}")
    if "base" in found:
        lines.append(f"  base        {found['base']}")
    if "stage" in found and "method" in found:
        lines.append(f"  made by     {found['stage']}, {found['method']}, stage '{found['name']}'")
    for when in ("before", "after"):
        metrics = {k.removeprefix(f"{when}_"): v for k, v in found.get("metrics", {}).items() if k.startswith(when)}
        if metrics:
            lines.append(f"  {when:<10}  " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    for depth, link in enumerate(found.get("lineage", [])):
        method = f", {link['method']}" if link.get("method") else ""
        made = f"{'  ' * depth}{link['name']} ({link.get('stage')}{method})  {link['identity'][:12]}"
        lines.append(f"  {'lineage' if not depth else '':<10}  {made}")
    return "\n".join(lines)
