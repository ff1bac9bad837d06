"""What Ctrl-C is answered with."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from rapidin_vdb.errors import RapidInError


def interruptible(
    function: Callable[..., None], *, endless: bool = False, goes_on: bool = False
) -> Callable[..., None]:
    """Answer Ctrl-C with a message and exit code 130; Typer's own answer is silent.

    What is `endless` is ended so. Of what `goes_on` when it is run again, it is told what is kept.
    """

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except KeyboardInterrupt:
            if endless or not goes_on:
                typer.echo("stopped" if endless else "interrupted", err=True)
            else:
                kept = f"what was committed is kept{_committed(options.get('db'))}"
                typer.echo(f"interrupted: {kept}; run the same command again to go on", err=True)
            raise typer.Exit(130) from None

    return run


def _committed(db: str | None) -> str:
    """Return how many samples a database has, in words; nothing where that cannot be said at once."""
    # Where the interruption came before all of the library was there, it is not begun again.
    library = sys.modules.get("rapidin_vdb.creation")
    if db is None or library is None:
        return ""
    try:
        return f" ({library.open(db).count():,} samples are in the table)"
    except (RapidInError, KeyboardInterrupt):
        return ""
