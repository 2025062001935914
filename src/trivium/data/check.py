"""What is in some files, before anything is spent on them: formats, bad rows, lengths, what would stop a run.

    found = check([Mix(Path("chats.jsonl"))], Asked(tokenizer=tokenizer, template=template, context=2048))
    as_json(found)["rows"], lines(found[0]), found[0].stops

With a tokenizer the rows are prepared as a run would prepare them, so that a run on them begins at once. Without one
they are read and recognised. Each file is of the kind that most of its first rows are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from trivium.data.blocks import BadRow, Row
from trivium.data.chat import ChatTemplate, TrainOn
from trivium.data.examples import Overflow, digest_of, overflow
from trivium.data.formats import TAKEN_BY, Fields, Format, Kind, RowError, format_of, mapped, parse
from trivium.data.ledger import BadPlace, Ledger
from trivium.data.loader import pack
from trivium.data.prepare import Prepared, prepare
from trivium.data.rows import Mix, read_rows
from trivium.errors import DataError
from trivium.forest import lay_out

LOOKED_AT = 100  # rows of a file by which its format is told
SAVING_OF = 2000  # examples on which the saving by shared prefixes is measured,
PASS_TOKENS = 1024  # in passes of so many tokens
BINS = 12  # of the histogram


@dataclass(frozen=True)
class Asked:
    """What the rows are checked for. Without a tokenizer, lengths are not known."""

    tokenizer: Any = None
    template: ChatTemplate | None = None
    context: int = 2**20
    max_length: int | None = None
    on_overflow: Overflow | None = None
    kind: Kind | None = None  # None: told by the rows
    train_on: TrainOn = "assistant"
    fields: Fields = ()


@dataclass
class Checked:
    """What was found in the files of one kind."""

    format: str
    kind: Kind
    ledger: Ledger
    prepared: Prepared | None
    files: list[str] = field(default_factory=list)
    stops: str | None = None


def check(mixes: list[Mix], asked: Asked) -> list[Checked]:
    """All files, those of one kind together. Raises DataError where one is missing."""
    groups: dict[Kind, list[tuple[Mix, str]]] = {}
    for mix in mixes:
        for file in mix.files():
            one = Mix(file, None, asked.fields or mix.fields)
            name, kind = format_of_file(one, asked.kind)
            groups.setdefault(kind, []).append((one, name))
    return [_checked(kind, group, asked) for kind, group in groups.items()]


def format_of_file(mix: Mix, kind: Kind | None) -> tuple[str, Kind]:
    """The format that most of a file's first rows are in, by name and kind; "unknown" counts as conversations."""
    found: Counter[Format] = Counter()
    rows = (row for row in read_rows(mix.source) if isinstance(row, Row))
    for row in islice(rows, LOOKED_AT):
        try:
            one = format_of(mapped(row.value, mix.fields))
        except RowError:
            continue
        if one is not None and kind in (None, one.kind):
            found[one] += 1
    if not found:
        return "unknown", kind or "conversation"
    ranked: tuple[Kind, ...] = ("pair", "rating", "conversation", "text", "prompt")
    best = min(found, key=lambda one: (-found[one], ranked.index(one.kind)))
    return best.name, best.kind


def _checked(kind: Kind, group: list[tuple[Mix, str]], asked: Asked) -> Checked:
    mixes, names = [mix for mix, _ in group], list(dict.fromkeys(name for _, name in group))
    if asked.tokenizer is None:
        ledger, prepared = _recognised(mixes, kind), None
    else:
        prepared = prepare(
            mixes, kind=kind, tokenizer=asked.tokenizer, template=asked.template, train_on=asked.train_on,
            max_length=asked.max_length, context=asked.context, on_overflow=asked.on_overflow, bad_rows=None,
        )  # fmt: skip
        ledger = prepared.ledger
    found = Checked(", ".join(names), kind, ledger, prepared, [str(m.source) for m in mixes])
    try:
        ledger.check(over_long_stops=overflow(kind, asked.max_length, asked.on_overflow) == "error")
    except DataError as error:
        found.stops = str(error)
    return found


def _recognised(mixes: list[Mix], kind: Kind) -> Ledger:
    """Rows read and recognised, no more: all that can be told without a tokenizer."""
    ledger = Ledger(source=", ".join(str(m.source) for m in mixes))
    seen: set[int] = set()
    bad: list[BadPlace] = []
    for mix in mixes:
        for row in read_rows(mix.source):
            reason = row.reason if isinstance(row, BadRow) else None
            if isinstance(row, Row):
                try:
                    parse(mapped(row.value, mix.fields), kind)
                except RowError as error:
                    reason = str(error)
                else:
                    ledger.used += 1
                    digest = digest_of(row.value)
                    ledger.duplicates += digest in seen
                    seen.add(digest)
            if reason is not None:
                bad.append(BadPlace(row.file, row.line, reason, None, ""))
            account = [] if reason is None else [bad[-1][1:]]
            ledger.add({"read": 1, "counts": {}, "bad": account}, row.file)
    ledger.bad = lambda: iter(bad)
    return ledger


# --- in numbers


def as_json(found: list[Checked]) -> dict[str, Any]:
    """Everything that was found, as plain values. ``rows == used + over_long + set_aside``."""
    ledgers = [one.ledger for one in found]

    def total(name: str) -> int:
        return sum(getattr(ledger, name) for ledger in ledgers)

    report: dict[str, Any] = {
        "files": [file for one in found for file in one.files],
        "format": ", ".join(dict.fromkeys(one.format for one in found)),
        "kinds": list(dict.fromkeys(one.kind for one in found)),
        **{name: total(n) for name, n in (("rows", "read"), ("used", "used"), ("over_long", "over_long"),
                                          ("set_aside", "set_aside"), ("duplicates", "duplicates"))},
        "bad_rows": [{"file": p.file, "line": p.line, "reason": p.reason} for p in _bad(ledgers)],
        "stops": [one.stops for one in found if one.stops is not None],
    }  # fmt: skip
    with_tokens = [one for one in found if one.prepared is not None]
    if with_tokens:
        report |= {
            "limit": max(one.ledger.limit for one in with_tokens),
            "tokens": total("tokens"), "trained_tokens": total("trained_tokens"),
            "counts": dict(sum((Counter(one.ledger.counts) for one in with_tokens), Counter())),
            "lengths": percentiles(np.concatenate([_lengths(one) for one in with_tokens])),
        }  # fmt: skip
    return report


def _bad(ledgers: Iterable[Ledger]) -> Iterator[BadPlace]:
    for ledger in ledgers:
        yield from ledger.bad()


def _lengths(found: Checked) -> np.ndarray:
    """Tokens of the longest sequence of each example."""
    assert found.prepared is not None, "lengths are known of prepared rows"
    examples = found.prepared.examples
    return np.asarray(examples.store.longest[examples.numbers])


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    names = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: int(np.percentile(lengths, at, method="nearest")) for name, at in names.items()}


def histogram(lengths: np.ndarray) -> str:
    """A row of bars: how many examples have how many tokens, from none to the longest."""
    if not len(lengths):
        return ""
    counts, _ = np.histogram(lengths, BINS, (0, int(lengths.max())))
    return "".join(" ▁▂▃▄▅▆▇█"[int(np.ceil(8 * n / counts.max()))] for n in counts)


def prefix_saving(prepared: Prepared) -> float:
    """The share of tokens that need not be computed, as sequences side by side begin alike; on a sample."""
    examples = prepared.examples[:SAVING_OF]
    computed = alone = 0
    for group in pack(range(len(examples)), examples.sizes, PASS_TOKENS):
        some = list(examples.at(group))
        computed += len(lay_out(some).tokens)
        alone += sum(len(s.inputs) for e in some for s in e.sequences)
    return 1 - computed / alone if alone else 0.0


def lines(found: Checked) -> list[str]:
    """What was found, for a person."""
    ledger = found.ledger
    count = len(found.files)
    told = [f"{found.format}, for {TAKEN_BY[found.kind]}: {found.files[0] if count == 1 else f'{count} files'}"]
    if found.prepared is None:
        told.append(f"  {ledger.used:,} of {ledger.read:,} rows can be used (--model DIR counts tokens)")
        told += [f"  {line}" for line in ledger.lines()[1:]]
        return told
    told += [f"  {line}" for line in ledger.lines()]
    lengths = _lengths(found)
    if len(lengths):
        named = ", ".join(f"{name} {n:,}" for name, n in percentiles(lengths).items())
        told.append(f"  tokens an example: {named}")
        told.append(f"  0 |{histogram(lengths)}| {int(lengths.max()):,}")
        share = ledger.trained_tokens / max(1, ledger.tokens)
        told.append(f"  an epoch trains {ledger.trained_tokens:,} tokens, {share:.0%} of those read")
        saving = prefix_saving(found.prepared)
        told.append(f"  shared beginnings save {saving:.0%} of the computation (passes of {PASS_TOKENS:,} tokens)")
    return told
