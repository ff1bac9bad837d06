"""What this process may use of the machine: its cores and its memory, or its container's share of them."""

import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def cores(group: Path = _GROUP) -> int:
    """Return how many CPU cores this process may use: those that it is bound to, or its control group's share."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = map(int, (group / "cpu.max").read_text("ascii").split())
    except (OSError, ValueError):
        return bound  # no such group, an older kind, or "max"
    return max(1, min(bound, limit // period))


def free_bytes(device: str, group: Path = _GROUP) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        # What torch has freed it keeps for itself; to the device that looks taken.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return max(0, min(int(line.split()[1]) << 10, _left_in(group)))
    except OSError:
        pass
    return 8 << 30  # not Linux: a cautious guess


def _left_in(group: Path) -> int:
    """Return the bytes that a control group may still take, files that are only cached not counted as taken."""
    try:
        limit = (group / "memory.max").read_text("ascii").strip()
        if limit == "max":
            return 1 << 62
        cached = [
            int(line.split()[1])
            for line in (group / "memory.stat").read_text("ascii").splitlines()
            if line.startswith("inactive_file ")
        ]
        return int(limit) - int((group / "memory.current").read_text("ascii")) + sum(cached)
    except (OSError, ValueError):
        return 1 << 62  # no such group, or an older kind
