"""What commands are given, looked at before anything is imported that takes seconds."""

from __future__ import annotations

from typing import TypeVar

from trivium.files import model_there

T = TypeVar("T")


def there(value: T) -> T:
    """The callback of an argument or option that names models. Raises ModelError for one that is nowhere."""
    for source in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ():
        model_there(source)
    return value
