"""The results as a Markdown table, and its place in the README."""

from __future__ import annotations

from typing import Any

from shared import Failed

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
HEAD = ("job", "tool", "seconds", "of the limit", "peak memory", "loss, first → last", "against the best peer")


def markdown(results: list[dict[str, Any]]) -> str:
    """A table of jobs, and under it what was measured on what."""
    if not results:
        return "no results\n"
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for told in results:
        lines += rows_of(told)
    return "\n".join([*lines, "", *notes(results)]) + "\n"


def rows_of(told: dict[str, Any]) -> list[str]:
    """A row for each of ours, each peer's fastest and leanest setting, and every tool that did not run."""
    ran = [t for t in told["tools"] if "error" not in t]
    shown = [t for t in ran if t["ours"]] + chosen(told, ran)
    best = min((t[told["shown"]]["median"] for t in ran if not t["ours"]), default=None)
    least = min((t["peak_bytes"]["median"] for t in ran if not t["ours"]), default=None)
    lines = []
    for number, tool in enumerate(shown):
        seconds, peak = tool[told["shown"]], tool["peak_bytes"]
        same = tool.get("same_work", True)
        share = f"{told['limit']['seconds'] / seconds['median']:.0%}" if limited(told) and same else "-"
        loss = f"{tool['losses'][0]:.4f} → {tool['losses'][-1]:.4f}"
        loss += " (other order)" if tool.get("other_order") else ""
        if same and not tool["agrees"]:
            loss += f" (differs by {tool['loss_difference']:.1%})"
        against = "-"
        if tool["ours"] and best is not None and least is not None:
            against = (
                f"{best / seconds['median']:.2f}× faster, {peak['median'] / least:.2f}× the memory (aim: {told['aim']})"
            )
        first = told["job"] if number == 0 else ""
        cells = (first, name_of(tool), spread(seconds, 1, 1), share, spread(peak, 1e9, 2) + " GB", loss, against)
        lines.append("| " + " | ".join(cells) + " |")
    failed = [t for t in told["tools"] if "error" in t]
    lines += [f"| | {name_of(t)} | {t['error'].replace('|', '/')[:120]} | | | | |" for t in failed]
    if limited(told):
        limit = told["limit"]
        lines.append(f"| | matrix products alone | {limit['seconds']:.1f} | 100% | | {limit['gflop']:,.0f} GFLOP at "
                     f"{limit['gflops']:,.0f} a second | |")  # fmt: skip
    return lines


def limited(told: dict[str, Any]) -> bool:
    return bool(told["limit"]) and told["shown"] == "seconds"


def chosen(told: dict[str, Any], ran: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each peer's fastest and leanest."""
    found: list[dict[str, Any]] = []
    for peer in dict.fromkeys(t["tool"] for t in ran if not t["ours"]):
        own = [t for t in ran if t["tool"] == peer]
        for best in (
            min(own, key=lambda t: t[told["shown"]]["median"]),
            min(own, key=lambda t: t["peak_bytes"]["median"]),
        ):
            found += [best] if best not in found else []
    return found


def name_of(tool: dict[str, Any]) -> str:
    return f"{tool['tool']}, {tool['setting']}" if tool["setting"] else tool["tool"]


def spread(values: dict[str, float], unit: float, digits: int) -> str:
    """The median, and the range where there is one."""
    least, middle, most = (f"{values[k] / unit:.{digits}f}" for k in ("least", "median", "most"))
    return middle if least == most else f"{middle} ({least}–{most})"


def notes(results: list[dict[str, Any]]) -> list[str]:
    """What was measured: machine, model, versions."""
    last = results[-1]
    versions: dict[str, str] = {}
    for told in results:
        for tool in told["tools"]:
            for name, version in tool.get("versions", {}).items():
                key = name if versions.get(name, version) == version else f"{name} of {tool['tool']}"
                versions[key] = version
    models = ", ".join(dict.fromkeys(told["model"] for told in results))
    jobs = "; ".join(f"{t['job']}: {t['steps']} steps of {t['rows_in_step']}, {t['tokens']:,} tokens" for t in results)
    dates = ", ".join(dict.fromkeys(told["date"] for told in results))
    return [f"{last['processor']}, {last['threads']} threads, float32; {dates}; model: {models}. {jobs}.",
            "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + "."]  # fmt: skip


def put_into(readme: str, table: str) -> str:
    """The README with the table between its marks. Raises Failed where it has none."""
    start, end = readme.find(BEGIN), readme.find(END)
    if start < 0 or end < start:
        raise Failed(f"README.md has no place for the table: write {BEGIN} and {END} on lines of their own")
    return readme[: start + len(BEGIN)] + "\n\n" + table.strip() + "\n\n" + readme[end:]
