"""What all benchmarks share: the machine they ran on, and clocks."""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def machine() -> dict[str, str]:
    """Return what the figures were taken on."""
    import torch

    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    git = shutil.which("git")  # rented machines may have none
    commit = subprocess.run(asked, capture_output=True, text=True, cwd=HERE).stdout if git else ""
    return {
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


class Clock:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median of the wall seconds that a call takes, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        with Clock() as clock:
            call()
        seconds.append(clock.wall)
    return statistics.median(seconds)
