"""How much a pass may hold within a budget of memory: fewer tokens first, then layers that are recomputed.

    plan = fit(budget, cost, longest=812, asked=1024)        # Plan(tokens=512, layers=11, bytes=...)

Both only arrange the work: the result is the same. Which of the two is cheaper is known from their costs: a pass
reads all weights and has its own overhead, which is as much as some tens of tokens' work (`docs/performance.md`); a
layer that is recomputed runs forward once more, a third of what it costs in all.

All is computed from sizes, nothing from what the machine has at the moment, so that a run that goes on chooses as it
did before. Units: bytes, tokens, layers.
"""

from __future__ import annotations

from dataclasses import dataclass

# What a process has loaded on the CPU (Python, PyTorch, tokenizers), what the products' library keeps, a checkpoint.
RUNTIME = 590 * 10**6
PIECES = 1.25  # memory of passes of unlike sizes lies in pieces, which the allocator cannot all use
OVERHEAD_TOKENS = 50  # by passes of 512 tokens beside those of 1,024
PASSES = (4096, 2048, 1536, 1024, 768, 512, 384, 256, 128)  # tokens, of which the smallest that is needed is tried last
SUFFIXES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}


@dataclass(frozen=True)
class Cost:
    """What a training holds, in bytes: whatever is passed through it, and per token of a pass."""

    weights: float
    gradients: float
    moments: float
    readout: float  # chunks of logits
    runtime: float  # what the process has loaded
    kept: float  # bytes per token that autograd keeps in all layers
    input: float  # bytes per token of one layer's input, which is what a recomputed layer keeps
    working: float  # bytes per token of one layer's backward pass, gone after it
    layers: int
    step_tokens: int = 2**62  # of the largest step

    def activations(self, tokens: int, recomputed: int) -> float:
        """What a pass of so many tokens holds, with so many layers recomputed."""
        of_one = self.kept / self.layers
        kept = of_one * (self.layers - recomputed) + self.input * recomputed + (of_one if recomputed else 0)
        return PIECES * tokens * (kept + self.working)

    def peak(self, tokens: int, recomputed: int) -> float:
        """The most that is held at once."""
        passing = self.activations(min(tokens, self.step_tokens), recomputed)
        # gradients of a step's first passes wait while the next is made; in a step of one they come as it goes
        both = self.gradients + passing if tokens < self.step_tokens else max(self.gradients, passing)
        return self.weights + self.moments + self.readout + self.runtime + both


@dataclass(frozen=True)
class Plan:
    """Tokens of a pass, how many layers are recomputed, and the peak that this should have."""

    tokens: int
    layers: int
    bytes: float


def fit(budget: float, cost: Cost, longest: int, asked: int) -> Plan | None:
    """The cheapest way within ``budget``, with passes of at most ``asked`` tokens; None where there is none.

    A row is never cut: a pass holds the ``longest`` at least.
    """
    best: tuple[float, Plan] | None = None
    for tokens in _sizes(cost, longest, asked):
        for recomputed in range(cost.layers + 1):
            peak = cost.peak(tokens, recomputed)
            if peak <= budget:
                time = 1 + OVERHEAD_TOKENS / tokens + recomputed / cost.layers / 3
                if best is None or time < best[0]:
                    best = time, Plan(tokens, recomputed, peak)
                break
    return best[1] if best else None


def least(cost: Cost, longest: int, asked: int) -> float:
    """The smallest budget that `fit` finds a way in."""
    return min(cost.peak(tokens, n) for tokens in _sizes(cost, longest, asked) for n in (0, cost.layers))


def _sizes(cost: Cost, longest: int, asked: int) -> list[int]:
    """Tokens of a pass that are tried, most first; a whole step in one pass is among them where that is allowed."""
    tried = (asked, *PASSES, longest, cost.step_tokens)
    return sorted({max(n, longest) for n in tried if n <= max(asked, longest)}, reverse=True)


def in_bytes(text: str) -> int:
    """``1.4GB`` as bytes. Raises ValueError for what is no amount of memory."""
    number = text.strip().lower().rstrip("bikmg")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        found = float(number) * SUFFIXES[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no amount of memory: write it as 2GB or 900MB") from None
    if not 0 < found < float("inf"):
        raise ValueError(f"{text!r} is no amount of memory: write it as 2GB or 900MB")
    return int(found)


def amount(there: float) -> str:
    """So many bytes, or a little less, as a recipe writes them."""
    return f"{int(there / 1e8) / 10:g}GB" if there >= 1e9 else f"{int(there / 1e7) * 10}MB"
