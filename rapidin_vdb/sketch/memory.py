"""How much memory there is to spend."""

from pathlib import Path

import torch


def free_bytes(device: str) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has freed it keeps for itself; to the device that looks taken.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return max(0, min(int(line.split()[1]) << 10, _left_in_container()))
    except OSError:
        pass
    return 8 << 30  # not Linux: a cautious guess


def _left_in_container(place: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what this process's control group may still take, files that are only cached not counted as taken."""
    try:
        limit = (place / "memory.max").read_text("ascii").strip()
        if limit == "max":
            return 1 << 62
        cached = [
            int(line.split()[1])
            for line in (place / "memory.stat").read_text("ascii").splitlines()
            if line.startswith("inactive_file ")
        ]
        return int(limit) - int((place / "memory.current").read_text("ascii")) + sum(cached)
    except (OSError, ValueError):
        return 1 << 62  # no such group, or an older kind
