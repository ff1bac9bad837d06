"""Where a database lies, and the way there."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb

from rapidin_vdb.errors import TableError, without_secrets


def local_place(uri: str) -> str:
    """Return the folder that a path or a `file://` URI names.

    Raises:
        TableError: it is on an object store.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if scheme == "file":
        return rest
    raise TableError(f"{without_secrets(uri)}: databases on {scheme}:// are not supported yet; give a folder")


def connect(uri: str) -> Any:
    """Return a connection to the tables in a folder."""
    # An interval of zero: every look at a table is a look at its newest commit.
    return lancedb.connect(uri, read_consistency_interval=timedelta(0))


def size_of(place: str) -> int:
    """Return how many bytes the files below a folder have; those that somebody takes away meanwhile have none."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            path = Path(folder, name)
            try:
                total += 0 if path.is_symlink() else path.stat().st_size
            except FileNotFoundError:
                continue
    return total
