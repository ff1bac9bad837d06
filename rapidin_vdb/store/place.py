"""Where a database lies, and the way there."""

from datetime import timedelta
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
