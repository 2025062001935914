"""Preference pairs out of a model's own samples, judged by program.

Pairs from elsewhere teach a model what it would never say. Its own answers, several to a prompt, show what it does
say, and where one of them keeps the request and another does not, that is the pair to learn from (Stiennon et al.
2020, section 3.1, with a checker in place of people).
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from trivium.demo import world
from trivium.demo.checker import check

SAMPLES = 4  # answers to each prompt, at temperature 1
QUESTIONS, STORIES = 700, 200  # prompts: more on what is hard; without stories, these would be forgotten
MOST_TOKENS = 160


def own_pairs(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Rows ``{"prompt", "chosen", "rejected"}``: the first sample that keeps its request, and the first that does not.

    Where none keeps it, the world's own answer is the chosen one; where all do, there is nothing to learn.
    """
    from trivium.talk import Talker

    rows = list(_prompts(seed))
    talker = Talker.open(str(folder), "cpu")
    answers = talker.answers([row["messages"][:-1] for row in rows], MOST_TOKENS, 1.0, seed, SAMPLES)
    found = []
    for number, row in enumerate(rows):
        samples = answers[number * SAMPLES : (number + 1) * SAMPLES]
        kept = [all(check(row["request"], answer).values()) for answer in samples]
        if not all(kept):
            chosen = samples[kept.index(True)] if any(kept) else row["messages"][-1]["content"]
            rejected = samples[kept.index(False)]
            found.append({"prompt": row["messages"][:-1], "chosen": chosen, "rejected": rejected})
    return found


def _prompts(seed: int) -> Any:
    """Requests that neither fine-tuning nor the held-out rows have."""
    fresh = 2**40 + seed  # a stream of its own
    for task, count in (("question", QUESTIONS), ("story", STORIES)):
        asked = (row for row in world.requests(20 * count, fresh) if row["request"]["task"] == task)
        yield from islice(asked, count)
