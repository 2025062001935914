"""What commands are given, looked at before anything is imported that takes seconds."""

from __future__ import annotations

from typing import TypeVar

from trivium.model import named

T = TypeVar("T", str, "str | None", "list[str]")


def there(value: T) -> T:
    """The callback of an argument or option that names models. Raises ModelError for one that is nowhere."""
    for source in [value] if isinstance(value, str) else value or ():
        named.there(source)
    return value
