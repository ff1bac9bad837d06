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
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 8 << 30  # not Linux: a cautious guess
