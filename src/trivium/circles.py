"""Python's search for circles of objects, put off while libraries are imported.

    put_off()        # the command line, first of all
    as_usual()       # when they are imported, and nothing else is there yet

The collector looks through what there is whenever some hundreds of objects were made. `torch` and `transformers` make
350,000, none of which ever goes: searching them again and again takes 0.5 s of the 2.8 s of their import, and each full
search after it 0.14 s. Whoever uses trivium as a library keeps the collector as it is.
"""

from __future__ import annotations

import gc

SELDOM = (50_000, 20, 100)  # objects that were made, and searches of younger ones, before a search

_usual: list[tuple[int, int, int]] = []


def put_off() -> None:
    """From now on the collector looks seldom."""
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(*SELDOM)


def as_usual() -> None:
    """What is there by now is never looked through again, and the collector works as it does by itself.

    To be called before a model is made: one that is in circles would never go. Nothing happens where nothing was put
    off, or no more.
    """
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())
