"""Progress on stderr: bars on a terminal; elsewhere, of what takes long, a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from rapidin_vdb.progress import Progress

# Where nobody looks on, work that is soon done says nothing.
_FIRST_SECONDS = 60.0
_NEXT_SECONDS = 300.0


@contextmanager
def progress_bars(*, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Yield a function that draws one bar a stage, with rate and time left.

    Where stderr is no terminal, it writes the same as a line: after a minute, and every five minutes from then on.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(clock)
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    # What is printed meanwhile belongs to stdout, which may be a file.
    with Bars(*columns, console=console, redirect_stdout=False) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None, rate="")
            bars.update(tasks[stage], completed=done, total=total or None, rate=_rate(bars.tasks[tasks[stage]]))

        yield draw


class _Lines:
    """Writes a line now and then, of the stages that went on since the last one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due = clock() + _FIRST_SECONDS
        # It reckons rates, and draws nothing. A batch may take longer than the half minute that bars look back.
        self._bars = Bars(disable=True, get_time=clock, speed_estimate_period=2 * _NEXT_SECONDS)
        self._tasks: dict[str, TaskID] = {}
        self._moved: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note how far a stage is; write a line if it is time."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        self._bars.update(self._tasks[stage], completed=done, total=total or None)
        self._moved.add(stage)
        if self._clock() >= self._due:
            moved = [self._bars.tasks[task] for name, task in self._tasks.items() if name in self._moved]
            typer.echo("; ".join(map(_told, moved)), err=True)
            self._moved.clear()
            self._due = self._clock() + _NEXT_SECONDS


def _told(task: Task) -> str:
    """Return what a bar would show."""
    parts = [f"{task.description} {task.completed:,.0f}" + (f"/{task.total:,.0f}" if task.total else ""), _rate(task)]
    left = task.time_remaining
    parts.append(f"{timedelta(seconds=left)} left" if left else "")
    return ", ".join(filter(None, parts))


def _rate(task: Task) -> str:
    return "" if task.speed is None else f"{task.speed:,.1f}/s"
