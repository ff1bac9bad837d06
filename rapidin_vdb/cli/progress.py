"""Progress bars on stderr; nothing where stderr is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from rapidin_vdb.progress import Progress, silent


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield a function that draws one bar a stage, with rate and time left."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
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
            speed = bars.tasks[tasks[stage]].speed
            bars.update(
                tasks[stage], completed=done, total=total or None, rate="" if speed is None else f"{speed:,.1f}/s"
            )

        yield draw
