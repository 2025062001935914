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
    from trivium.api import Model, compare, load, new, run
    from trivium.evaluate.endpoint import Endpoint, by_endpoint
    from trivium.evaluate.win_rate import by_program

__all__ = ["Endpoint", "Model", "UserError", "by_endpoint", "by_program", "compare", "load", "new", "run"]

__version__ = "0.1.0"


# OpenMP threads that spin while they wait are fast alone and ten times slower as soon as another process wants a core.
# So they spin for some microseconds, which spans the gaps between products, then sleep. Two cores, a tiny model: 0.9 of
# the speed of spinning and 1.7 times that of sleeping at once when alone, half that of sleeping beside a busy process.
# Read by the OpenMP library when torch is imported, so it must be said before; what is set already stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trivium' has no attribute {name!r}")
    from importlib import import_module

    where = {"Endpoint": "evaluate.endpoint", "by_endpoint": "evaluate.endpoint", "by_program": "evaluate.win_rate"}
    return getattr(import_module(f"trivium.{where.get(name, 'api')}"), name)
