"""A plan as lines for a person."""

from __future__ import annotations

from typing import Any

from trivium.terminal import clock, size


def lines(plan: dict[str, Any]) -> list[str]:
    """The plan of all stages, and what they take together."""
    told = [line for stage in plan["stages"] for line in _stage(stage)]
    if "elsewhere" in plan:
        assumed = f"; time at {plan['elsewhere']['share']:.0%} of the rate given, which is assumed"
        told.append(f"reckoned from sizes for bfloat16, not tried{assumed if plan['elsewhere']['rate'] else ''}")
    open_ones = [s for s in plan["stages"] if not s.get("done")]
    fitting = [s for s in open_ones if s["fits"]]
    if len(fitting) > 1 and len(fitting) == len(open_ones):
        seconds = sum(sum(s.get("seconds", {}).values()) for s in fitting)
        peak = max(s["memory"]["peak"] for s in fitting)
        disk = sum(s["disk"]["result"] for s in fitting) + sum(s["disk"]["checkpoints"] for s in fitting)
        took = f", {clock(seconds)}" if seconds else ""
        told += ["", f"in all: {size(peak)} of memory at the peak, up to {size(disk)} on disk{took}"]
    return told


def _stage(s: dict[str, Any]) -> list[str]:
    if s.get("done"):
        return [f"{s['name']}: done before, and not run again"]
    share = s["trained_parameters"] / max(1, s["total_parameters"])
    held, arranged = s["memory"], s["pass"]
    layers = f", {arranged['recomputed_layers']} layers recomputed" if arranged["recomputed_layers"] else ""
    told = [
        f"{s['name']}: {s['stage']}, {s['method']}",
        f"  parameters  {s['trained_parameters']:,} of {s['total_parameters']:,} trained ({share:.2%})",
        f"  work        {s['steps']:,} steps over {s['epochs']:.2f} epochs of {s['rows']['used']:,} rows: "
        f"{s['tokens']:,} tokens, up to {arranged['tokens']:,} a pass{layers}",
    ]
    verb = "of" if s["fits"] else "DOES NOT FIT INTO"
    told.append(f"  memory      {size(held['peak'])} {verb} {size(held['available'])} on {s['device']}: {_parts(held)}")
    if not s["fits"]:
        told += _ways(s["would_fit"])
        return told
    disk, seconds = s["disk"], s.get("seconds", {})
    told.append(
        f"  disk        {size(disk['result'])} for the result, up to {size(disk['checkpoints'])} for checkpoints"
    )
    if not seconds:
        return told
    others = [f"{clock(v)} {k}" for k, v in seconds.items() if k not in ("training", "setup") and v >= 0.5]
    told.append(f"  time        {clock(seconds['training'])} training{''.join(f', {o}' for o in others)}")
    return told


def _parts(held: dict[str, float]) -> str:
    named = {k: v for k, v in held.items() if k not in ("peak", "available", "other") and v}
    return ", ".join([*(f"{k} {size(v)}" for k, v in named.items()), f"libraries and the rest {size(held['other'])}"])


def _ways(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return ["  would fit   nothing that is known here: a smaller model or max_length, or another device"]
    return [
        f"  {'would fit' if n == 0 else '':<11} {way['change']}: {size(way['bytes'])}, {way['price']}"
        for n, way in enumerate(found)
    ]
