"""How many CPU threads each worker has, and how much faster several of them can be."""

import os
from collections.abc import Sequence
from pathlib import Path


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPU cores this process may use: those that it is bound to, or its container's share of them."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = map(int, quota.read_text("ascii").split())
    except (OSError, ValueError):
        return bound  # no such group, an older kind, or "max"
    return max(1, min(bound, limit // period))


def threads_each(workers: int) -> int:
    """Return how many CPU threads each of some workers has."""
    return max(1, cores() // workers)


def speedup(workers: int, devices: Sequence[str]) -> int:
    """Return how many times as fast as one of them, alone, some workers can be at the most.

    Each CPU worker has `threads_each`; more of them than cores, and those of one GPU, take turns.
    """
    return min(workers, cores()) if devices[0] == "cpu" else len(devices)
