"""How many CPU threads each worker has, and how much faster several of them can be."""

from collections.abc import Sequence

from rapidin_vdb.machine import cores


def threads_each(workers: int) -> int:
    """Return how many CPU threads each of some workers has."""
    return max(1, cores() // workers)


def speedup(workers: int, devices: Sequence[str]) -> int:
    """Return how many times as fast as one of them, alone, some workers can be at the most.

    Each CPU worker has `threads_each`; more of them than cores, and those of one GPU, take turns.
    """
    return min(workers, cores()) if devices[0] == "cpu" else len(devices)
