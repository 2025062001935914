"""What is done to a sound file so that it is one no longer: to its bytes, to the value that it holds, to its lines.

    mutated = bytes_of(rng, data, other)            flip, cut, insert, double, swap, splice
    value, text = value_of(rng, value), as_json(..)  another type, huge numbers, NaN, depth, near names, keys twice

All draw from the ``rng`` that they are given and from nothing else: the same seed, the same mutation.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

PIECES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xf0\x9f\x98", b"\x1b[31m", b"\r", b"\n", b"\n\n", b"\t", b"{", b"}", b"[",
    b"]", b'"', b"'", b",", b":", b"\\", b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"-", b"null", b"{}", b"[]", b"{{",
    b"{%", b"<|end|>", b"<|assistant|>", b"\xe2\x80\xa8", b"\xef\xb7\x90", b"\x1f\x8b", b"../", b"[" * 2000,
        b"9" * 5000,
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """Text that stands in a JSON file as it is."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """An object with a key that it has twice."""


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, Raw("NaN"),
    Raw("Infinity"), Raw("-1e999"), Raw("1" + "0" * 5000), Raw("[" * 60 + "]" * 60), Raw("[" * 3000 + "]" * 3000),
    Raw('{"a":' * 3000 + "1" + "}" * 3000), "", " ", "\n", "\x00", "\x1b[31m", "a" * 100_000, "é\u202e\u2028😀",
    Raw('"\\ud800"'),
    "0", "1e3", "nan", "null", "true", "auto", "none", "..", "../../x", "no/such", "-", "{{ 7 * 7 }}", "%s {} {0}",
    "[", "a:b",
    [], {}, [[]], [None], [1, "a", None], {"": None}, {"a": {"b": []}}, ["a"] * 3, [0] * 1000,
    {str(n): n for n in range(300)},
)  # fmt: skip


def bytes_of(rng: Random, data: bytes, other: bytes) -> bytes:
    """``data`` with one to three things done to it; ``other`` is a file of the same kind to splice it with."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_BYTES)(rng, data, other)
    return data


def _place(rng: Random, data: bytes) -> int:
    """Anywhere, and at times near the beginning, where headers stand, or the end."""
    end = len(data)
    return rng.choice((rng.randint(0, end), rng.randint(0, min(end, 16)), rng.randint(max(0, end - 16), end)))


def _span(rng: Random, data: bytes) -> tuple[int, int]:
    start = _place(rng, data)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 512, len(data))))


def _flip(rng: Random, data: bytes, _: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _n in range(rng.choice((1, 1, 3, 30))):
        changed[min(_place(rng, data), len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: Random, data: bytes, _: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _end(rng: Random, data: bytes, _: bytes) -> bytes:
    return data[: _place(rng, data)]


def _insert(rng: Random, data: bytes, _: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice((rng.choice(PIECES), rng.randbytes(rng.choice((1, 4, 40))))) + data[at:]


def _double(rng: Random, data: bytes, _: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 5)) + data[end:]


def _swap(rng: Random, data: bytes, _: bytes) -> bytes:
    a, b, c, d = sorted(_place(rng, data) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _splice(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(rng, data)] + other[_place(rng, other) :]


_BYTES = (_flip, _cut, _end, _insert, _double, _swap, _splice)


# --- values


def value_of(rng: Random, value: Any, odd: tuple[Any, ...] = ODD) -> Any:
    """A copy of a JSON value with one to three things done to it, at places drawn at random."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(holder))
        rng.choice(_VALUES)(rng, *rng.choice(places), places, odd)
    return holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of all that is in ``value``."""
    entries = enumerate(value) if type(value) is list else value.items() if isinstance(value, dict) else ()
    for key, child in list(entries):
        yield value, key
        if type(child) in (list, dict) and len(child) <= 1000:
            yield from _places(child)


def _replace(rng: Random, at: Any, key: Any, _: Any, odd: tuple[Any, ...]) -> None:
    at[key] = copy.deepcopy(rng.choice(odd))


def _alter(rng: Random, at: Any, key: Any, _: Any, odd: tuple[Any, ...]) -> None:
    """Something near what stands there: another number, a string cut or lengthened."""
    value = at[key]
    if isinstance(value, bool) or value is None:
        at[key] = rng.choice((0, 1, "yes", not value))
    elif isinstance(value, (int, float)):
        at[key] = rng.choice(
            (-value, value + 1, value - 1, value * 1000, value / 7, str(value), [value], value * 10**12)
        )
    elif isinstance(value, str):
        cut = rng.randint(0, len(value))
        ways = (value[:cut], value[cut:], value * 2, value.upper(), f" {value} ", f"{value[:cut]}\u00e9{value[cut:]}",
            [value],
                f"{value[:cut]}\n{value[cut:]}", f"{value[:cut]}\x00", {value: value}, misspelt(rng,
                value))  # fmt: skip
        at[key] = rng.choice(ways)
    elif isinstance(value, Raw):
        at[key] = [value]
    else:
        at[key] = rng.choice(([value], {"a": value}, str(len(value)), list(value)[:1]))


def _delete(rng: Random, at: Any, key: Any, *_: Any) -> None:
    if len(at) > 1:
        del at[key]


def _rename(rng: Random, at: Any, key: Any, *_: Any) -> None:
    """A key under a near name, with what it holds."""
    if isinstance(at, dict):
        at[misspelt(rng, str(key))] = at.pop(key)


def _twice(rng: Random, at: Any, key: Any, _: Any, odd: tuple[Any, ...]) -> None:
    """A key that is there twice, or an element of a list again."""
    if type(at) is list:
        at[key:key] = [copy.deepcopy(at[key])] * rng.choice((1, 1, 30))
    elif type(at[key]) is dict and at[key]:
        pairs = list(at[key].items())
        at[key] = Pairs([*pairs, (rng.choice(pairs)[0], copy.deepcopy(rng.choice(odd)))])


def _exchange(rng: Random, at: Any, key: Any, places: Any, odd: Any) -> None:
    other, there = rng.choice(places)
    at[key] = copy.deepcopy(other[there])


def _add(rng: Random, at: Any, key: Any, _: Any, odd: tuple[Any, ...]) -> None:
    into = at[key] if isinstance(at[key], (dict, list)) else at
    if isinstance(into, dict):
        into[rng.choice(("", "a", "__class__", "auto_map", "type", "é", "\x00"))] = copy.deepcopy(rng.choice(odd))
    elif type(into) is list:
        into.append(copy.deepcopy(rng.choice(odd)))


_VALUES = (_replace, _replace, _replace, _alter, _alter, _delete, _rename, _twice, _exchange, _add)


def misspelt(rng: Random, name: str) -> str:
    """A name near another."""
    if not name:
        return "x"
    at = rng.randrange(len(name))
    ways = (name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name.upper(), f"{name} ", f"{name}s",
            name[:at] + rng.choice("aeio_-.") + name[at + 1 :], name.replace("_", "-"))  # fmt: skip
    return rng.choice(ways)


def as_json(value: Any, indent: bool = False) -> str:
    """A mutated value as JSON, or what is meant to look like it."""
    comma, colon = (",\n", ": ") if indent else (",", ":")
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, (dict, Pairs)):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + comma.join(f"{json.dumps(str(k))}{colon}{as_json(v)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + comma.join(as_json(v) for v in value) + "]"
    return json.dumps(value)


def json_of(rng: Random, data: bytes, odd: tuple[Any, ...] = ODD) -> bytes:
    """The bytes of a JSON file whose value is mutated."""
    return as_json(value_of(rng, json.loads(data), odd), indent=rng.random() < 0.3).encode()
