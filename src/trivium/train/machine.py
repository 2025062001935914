"""What the machine has and uses: device, memory, threads."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

from trivium.errors import RecipeError
from trivium.train.processes import current


def pick_device(asked: str | None) -> str:
    """The device asked for, or the fastest there is; raises RecipeError where it is not there."""
    import torch

    if asked is None:
        if torch.cuda.is_available():
            return current().device("cuda")
        return "mps" if torch.backends.mps.is_available() and current().count == 1 else "cpu"
    kind = asked.split(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise RecipeError(f"device: unknown '{asked}'", f"use one of {', '.join(there)}")
    if not there[kind]:
        have = ", ".join(k for k, v in there.items() if v)
        raise RecipeError(f"device: {asked} is not available here", f"this machine has: {have}")
    return current().device(asked)


def pick_dtype(asked: str | None, device: str) -> str:
    """``auto``: bfloat16 on CUDA where the card has it, float32 elsewhere."""
    import torch

    if asked in (None, "auto"):
        return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return str(asked)


class PeakMemory:
    """The peak of this process (CPU) or this device (CUDA) since it was made, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            gc.collect()  # what an earlier stage has left is not counted as this one's
            give_back()
            with contextlib.suppress(OSError):  # 5 resets the resident peak: man 5 proc, clear_refs
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        if peak := _of_process("VmHWM:"):
            return peak
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """What was freed goes back to the system: between passes of unlike sizes it lies about in pieces."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def held_memory(device: str) -> int:
    """Bytes that this process holds: on the card, or resident in the machine's memory."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_reserved(device)
    give_back()
    return _of_process("VmRSS:")


def _of_process(name: str) -> int:
    """Bytes that the system tells of this process under a name; 0 where it tells nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def free_memory(device: str) -> int:
    """Bytes that can still be taken: the card's free memory, or what the system, or its container, has left."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min([int(line.split()[1]) * 1024, *_left_to_container()])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 8 * 2**30


def _left_to_container() -> list[int]:
    """Bytes that a control group, in which a container runs, leaves its processes; none where there is no limit.

    What it has read of files counts as used, but is given up when it is needed. Source: the kernel's
    `admin-guide/cgroup-v2` and `cgroup-v1/memory`.
    """
    places = (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file "),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    )
    for folder, limit, used, inactive in places:
        with contextlib.suppress(OSError, ValueError):
            most, taken = (int((folder / name).read_text()) for name in (limit, used))  # "max" is no number: no limit
            stat = (folder / "memory.stat").read_text().splitlines()
            files = sum(int(line.split()[1]) for line in stat if line.startswith(inactive))
            return [max(0, most - taken + files)]
    return []
