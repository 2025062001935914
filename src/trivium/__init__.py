"""trivium: pretraining, supervised fine-tuning and preference tuning in one declared run.

    trivium.run("recipe.yaml")                  # all of it, as `trivium run` does
    model = trivium.load("folder-or-hub-id")    # or step by step: attach, train, generate, evaluate, save

What is exported here is in `trivium.api`, which is imported when it is first asked for: torch takes a second.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trivium.errors import UserError

if TYPE_CHECKING:
    from trivium.api import Model, load, new, run

__all__ = ["Model", "UserError", "load", "new", "run"]

__version__ = "0.1.0"


def _others_run() -> bool:
    """Whether anything else wants a core right now (Linux tells; elsewhere: no)."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:  # noqa: PTH123 - pathlib costs more than the look
            return int(file.read().split()[3].split("/")[0]) > 1
    except (OSError, ValueError, IndexError):
        return False


# OpenMP threads that spin while they wait are faster alone (measured on two cores, tiny models: 5,900 against 3,600
# tokens/s) and ten times slower as soon as another process wants a core (1,900 against 20,900). Read by
# the OpenMP library when torch is imported, so it must be said before; what is set already stays.
if _others_run():
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trivium' has no attribute {name!r}")
    from trivium import api

    return getattr(api, name)
