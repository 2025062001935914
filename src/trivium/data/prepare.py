"""Data prepared once: rows of files become examples on disk, addressed by all that can change them.

    prepared = prepare(Path("chats.jsonl"), kind="conversation", tokenizer=tokenizer,
                       template=chat_template(tokenizer), max_length=None, context=2048)
    prepared.examples[0], prepared.held_out, prepared.ledger.lines()

A data set is cut into blocks, each block becomes a part (`workers`), parts lie in the cache under the hash of the
files' bytes, the settings, the tokenizer and the template. What is there and whole is not made again, so that an
interrupted preparation goes on where it was; delete the cache whenever you like. Rows in memory stay in memory.

Cost: all cores; memory for a few blocks and `store.COLUMNS` of every example; disk about as much as the text.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trivium.data.cache import cache_folder, let_go, read_today
from trivium.data.chat import ChatTemplate, TrainOn
from trivium.data.encoder import Encoder
from trivium.data.examples import Maker, Overflow, Pairs, Spec, held_out_below, overflow
from trivium.data.formats import Fields, Kind
from trivium.data.ledger import BadPlace, Ledger
from trivium.data.rows import Listed, Mix, Source, blocks_of, files_of, sha256_of
from trivium.data.store import Examples, Store
from trivium.data.workers import Here, Job, Part, Workers, cores, part_of
from trivium.errors import DataError
from trivium.files import sha256_json, write_bytes
from trivium.terminal import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # of what lies in the cache, and of how blocks are cut
LITTLE = 3_000_000  # bytes of files for which no processes are started


@dataclass(frozen=True)
class Prepared:
    """A data set ready for training. ``sources``: how many of the examples come from each source, in order, and its
    weight in the mix."""

    examples: Examples
    held_out: Examples
    ledger: Ledger
    sources: tuple[tuple[int, float | None], ...] = ()


@dataclass(frozen=True)
class _Unit:
    """A file, or rows in memory: what blocks are cut from."""

    source: Path | Listed
    name: str
    fields: Fields
    mix: int  # the number of the source that it belongs to


def prepare(
    source: Source | Mix | str | Sequence[Source | Mix | str],
    *,
    kind: Kind,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate | None = None,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    context: int,
    on_overflow: Overflow | None = None,
    pairs: Pairs = "best_worst",
    ends: bool = False,
    duplicates: Literal["keep", "drop"] = "keep",
    holdout: float = 0.0,
    bad_rows: float | None = 0.01,
) -> Prepared:
    """Read, recognise, render and tokenise all rows of ``source``: paths, or rows in memory.

    ``on_overflow`` says what becomes of rows longer than ``max_length`` (or the model's ``context``); left out, it is
    as `overflow` says. ``ends``: what is read of a sequence is its end, for a reward. ``holdout`` is the part of
    the rows kept out of training, decided by each row's own content: adding rows moves none from one side to the other,
    and identical rows are on the same side. Raises DataError where a file is missing, nothing useful is left, or more
    than ``bad_rows`` (a share) are unusable; never where that is None.
    """
    assert kind == "text" or template is not None, "conversations and pairs need a chat template"
    limit = min(max_length or context, context)
    assert limit >= 2, "a sequence needs two tokens: one to predict from and one to predict"
    how = overflow(kind, max_length, on_overflow)
    spec = Spec(kind, limit, train_on, "drop" if how == "error" else how, pairs, ends)
    encoder = template.encoder if template is not None else Encoder.of(tokenizer)
    mixes = [_mix(s) for s in ([source] if isinstance(source, (str, Path, Listed, Mix)) else source)]
    units = _units(mixes)
    store, accounts = _stored(units, Maker(spec, encoder, template))
    ledger = Ledger(source=", ".join(str(m.source) for m in mixes), limit=limit)
    for account in accounts():
        ledger.add(account, store.files[account["file"]])
    ledger.bad = lambda: (BadPlace(store.files[a["file"]], *place) for a in accounts() for place in a["bad"])
    out = np.ones(len(store), bool) if holdout >= 1 else store.digest < np.uint64(held_out_below(holdout))
    used, held_out = _divided(store, ledger, out, duplicates)
    owner = np.array([u.mix for u in units], int)[store.file[used]]
    sources = tuple((int((owner == n).sum()), mix.weight) for n, mix in enumerate(mixes))
    prepared = Prepared(store.examples(used), store.examples(held_out), ledger, sources)
    if bad_rows is not None:
        ledger.check(bad_rows, over_long_stops=how == "error")
    return prepared


def _mix(source: Source | Mix | str) -> Mix:
    return source if isinstance(source, Mix) else Mix(Path(source) if isinstance(source, str) else source)


def _divided(store: Store, ledger: Ledger, out: np.ndarray, duplicates: str) -> tuple[np.ndarray, np.ndarray]:
    """The store's examples to train on, and those held ``out``; rows are entered in the ledger."""
    rows = np.flatnonzero(store.first)
    row_of = np.cumsum(store.first) - 1
    known = np.ones(len(rows), bool)
    known[np.unique(store.digest[rows], return_index=True)[1]] = False  # True: the same row stood before
    ledger.duplicates = int(known.sum())
    kept = ~known[row_of] if duplicates == "drop" else np.ones(len(store), bool)
    ledger.dropped = int((~kept[rows]).sum())
    used, held_out = np.flatnonzero(kept & ~out), np.flatnonzero(kept & out)
    ledger.used, ledger.held_out = int(store.first[used].sum()), int(store.first[held_out].sum())
    ledger.tokens, ledger.trained_tokens = int(store.total[used].sum()), int(store.trained[used].sum())
    ledger.longest = max(ledger.longest, _longest_row(store, row_of))
    return used, held_out


def _longest_row(store: Store, row_of: np.ndarray) -> int:
    """Tokens of the longest row. A split text's pieces overlap by one."""
    if not len(store):
        return 0
    several = np.bincount(row_of)
    whole = np.bincount(row_of, weights=store.total).astype(np.int64) - (several - 1)
    longest = store.longest[store.first]
    return int(np.where(several > 1, np.maximum(whole, longest), longest).max())


# --- the parts


Accounts = Callable[[], Iterator[dict[str, Any]]]


def _stored(units: list[_Unit], maker: Maker) -> tuple[Store, Accounts]:
    """The examples of all rows, prepared or found prepared, and the accounts of the parts one by one."""
    names = [u.name for u in units]
    if any(isinstance(u.source, Listed) for u in units):
        jobs = _jobs(units, lambda _: None)
        parts = [part_of(maker, job) for job in jobs]
        return Store([data for _, data in parts], names, str(id(parts))), lambda: (account for account, _ in parts)
    key = _key(units, maker)
    folder = cache_folder() / key[:32]
    manifest = folder / "manifest.json"
    count = _whole(folder)
    if count is None:
        count = _make_parts(units, maker, folder)
        write_bytes(manifest, json.dumps({"format": FORMAT, "key": key, "parts": count}).encode())
        let_go(folder.parent)
    read_today(folder)
    files = [_part_file(folder, n) for n in range(count)]
    return Store(files, names, key), lambda: (_account(file) or {} for file in files)


def _units(mixes: list[Mix]) -> list[_Unit]:
    found = []
    for number, mix in enumerate(mixes):
        sources = [mix.source] if isinstance(mix.source, Listed) else files_of(mix.source)
        found += [_Unit(s, str(s), mix.fields, number) for s in sources]
    return found


def _key(units: list[_Unit], maker: Maker) -> str:
    """All that can change what is prepared; not where the files lie, nor what they are called."""
    template = maker.template
    described = None
    if template is not None:
        described = template.dump()
        if not template.jinja.uses_date:
            described["date"] = None
        elif described["date"] is None:
            described["date"] = time.strftime("%Y-%m-%d")
    files = [(sha256_of([u.source]), u.source.suffixes, u.fields) for u in units if isinstance(u.source, Path)]
    return sha256_json([FORMAT, files, asdict(maker.spec), maker.encoder.dump(), described])


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.arrow"


def _account(file: Path) -> dict[str, Any] | None:
    """The account of a part that is whole."""
    try:
        account: dict[str, Any] = json.loads(file.with_suffix(".json").read_bytes())
        return account if account["bytes"] == file.stat().st_size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _undamaged(file: Path) -> bool:
    account = _account(file)
    if account is None:
        return False
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return bool(crc == account["crc32"])


def _whole(folder: Path) -> int | None:
    """How many parts there are, where all are there and undamaged; else None, and the damaged ones are gone."""
    try:
        count = int(json.loads((folder / "manifest.json").read_bytes())["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        count = None
    files = sorted(folder.glob("*.arrow"))
    good = [file for file in files if _undamaged(file)]
    for file in set(files) - set(good):
        file.unlink(missing_ok=True)
    return count if count is not None and good == [_part_file(folder, n) for n in range(count)] else None


def _make_parts(units: list[_Unit], maker: Maker, folder: Path) -> int:
    """Make those parts that are not there yet; returns how many there are."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror})", "name a folder in TRIVIUM_CACHE") from None
    sizes = [u.source.stat().st_size for u in units if isinstance(u.source, Path)]
    work = Workers(maker, cores()) if sum(sizes) > LITTLE and cores() > 1 else Here(maker)
    under_way: deque[tuple[int, Future[Part]]] = deque()

    def write_one() -> None:
        number, future = under_way.popleft()
        account, data = future.result()
        file = _part_file(folder, number)
        write_bytes(file, data, durable=False)
        write_bytes(file.with_suffix(".json"), json.dumps(account).encode("utf-8"), durable=False)

    number = -1
    try:
        with Progress("preparing", sum(sizes)) as progress:
            for number, job in enumerate(_jobs(units, progress.to)):
                if _account(_part_file(folder, number)) is not None:  # of an interrupted preparation
                    continue
                under_way.append((number, work.submit(job)))
                if len(under_way) > 2 * cores():
                    write_one()
            while under_way:
                write_one()
    finally:
        work.close()
    return number + 1


def _jobs(units: list[_Unit], told: Callable[[int], None]) -> Iterator[Job]:
    """All blocks in order; ``told`` how many bytes of the files have been read."""
    before = 0
    for number, unit in enumerate(units):
        if isinstance(unit.source, Listed):
            yield from (Job(block, number, unit.name, unit.fields) for block in unit.source.blocks())
            continue
        for block in blocks_of(unit.source, partial(_further, told, before)):
            yield Job(block, number, unit.name, unit.fields)
        before += unit.source.stat().st_size


def _further(told: Callable[[int], None], before: int, at: int) -> None:
    told(before + at)
