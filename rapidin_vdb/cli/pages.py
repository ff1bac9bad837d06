"""Pages are written to files whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from rapidin_vdb.errors import SpecError, shown
from rapidin_vdb.records import Level
from rapidin_vdb.results import Ranking


def check_matrix(matrix: bool, *, as_json: bool, html: Path | None) -> None:
    """Refuse a matrix that nothing would show, before it is computed.

    Raises:
        SpecError: neither JSON nor a page is asked for.
    """
    if matrix and not as_json and html is None:
        raise SpecError("--matrix is shown by --json and --html FILE only; add one of them, or leave it out")


def check_writable(path: Path, level: Level) -> None:
    """Refuse a page that could not be written, before anything is computed for it.

    Raises:
        SpecError: the folder is not there or cannot be written, or the page would show single tokens.
    """
    if level == "token":
        raise SpecError("--html is about samples; leave it out, or leave out --level token")
    folder = path.parent
    if (path.exists() and not path.is_file()) or not folder.is_dir():
        found = "is not a plain file" if path.exists() else f"cannot be: there is no folder {folder}"
        raise SpecError(f"--html {path} {found}; give the name of a file in a folder that is there")
    if not os.access(folder, os.W_OK):
        raise SpecError(f"--html {path}: the folder {folder} cannot be written")


def write_page(path: Path, rankings: Sequence[Ranking], *, title: str) -> None:
    """Write the page of some rankings, and say so.

    Raises:
        SpecError: it cannot be written.
    """
    from rapidin_vdb.page import render_page

    place = path.resolve()  # what a link names is replaced, not the link
    new = place.with_name(f".{place.name}.new")
    try:
        new.write_text(render_page(rankings, title=title), "utf-8")
        new.replace(place)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise SpecError(f"--html {path}: cannot be written: {error}") from error
    typer.echo(f"wrote {shown(str(path))}; open it in a browser", err=True)
