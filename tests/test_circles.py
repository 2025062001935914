"""Circles of objects are looked for seldom while libraries are imported, and as usual from the first model on."""

from __future__ import annotations

import gc
import subprocess
import sys

from trivium import circles


def test_only_what_was_put_off_is_put_back():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    circles.as_usual()
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen), "a library's user is not concerned"
    try:
        circles.put_off()
        circles.put_off()
        assert gc.get_threshold() == circles.SELDOM
        circles.as_usual()
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() > frozen
        again = gc.get_freeze_count()
        circles.as_usual()
        assert gc.get_freeze_count() == again, "once"
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_no_model_is_frozen():
    """What is frozen in circles never goes: an earlier stage's model would be held to the end of the run."""
    code = """
import gc
from trivium.circles import put_off
put_off()
from trivium.model.new import new_model
from transformers import LlamaConfig
sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = new_model(LlamaConfig(**sizes), 0)
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
assert any(model is each for each in gc.get_objects()), "those that are frozen are not among them"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
