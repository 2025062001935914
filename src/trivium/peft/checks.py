"""Checks of single settings, each with the words for what is wrong. Raises RecipeError. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trivium.errors import RecipeError, listed, nearest

ALL_LINEAR = "all-linear"
LARGEST = 1_000_000

TargetModules = str | tuple[str, ...]


def put(settings: Any, key: str, value: Any) -> None:
    """Set a field of frozen settings while they are built."""
    object.__setattr__(settings, key, value)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def above_0(name: str, value: Any, otherwise: str = "") -> None:
    # Far beyond what makes sense on both sides, so that products of such numbers stay numbers.
    if not is_number(value) or not 1 / LARGEST <= value <= LARGEST:
        raise RecipeError(f"{name} is {value!r}", f"{name} is a number above 0{'; ' * bool(otherwise)}{otherwise}")


def whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RecipeError(f"{name} is {value!r}", f"{name} is a whole number from {least} on, such as 16")


def size(name: str, value: object) -> None:
    # The upper end is far above any width: a folder's config may claim anything, and sizes must stay countable.
    whole(name, value, 1, 1_000_000)


def fraction(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value < 1:
        raise RecipeError(f"{name} is {value!r}", f"{name} is a number from 0 up to, not including, 1")


def switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{name} is {value!r}", f"{name} is true or false")


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in (allowed := tuple(allowed)):
        raise RecipeError(f"{name} is {value!r}{nearest(str(value), allowed)}", f"{name} is one of {listed(allowed)}")


def patterns(name: str, value: object) -> TargetModules:
    """``"all-linear"`` as it is; one name or a list of names as a tuple."""
    return ALL_LINEAR if value == ALL_LINEAR else names(name, value, f"'{ALL_LINEAR}' or ")


def names(name: str, value: object, besides: str = "") -> tuple[str, ...]:
    """One name or a list of names as a tuple."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(n, str) and n for n in found):
        raise RecipeError(f"{name} is {value!r}", f"write {besides}a list of names, such as [q_proj, v_proj]")
    return tuple(found)


def by_pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value or not all(isinstance(k, str) and k for k in value):
        raise RecipeError(f"{name} is {value!r}", f"write {name}: {{q_proj: 4}}, a number for each name or pattern")
    for pattern, number in value.items():
        check(f"{name}.{pattern}", number)
    return dict(value)


def contradict(one: str, other: str, why: str) -> None:
    raise RecipeError(f"{one} and {other} do not go together: {why}", f"leave out {one} or {other}")
