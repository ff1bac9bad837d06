"""Where indexes of databases in object stores are kept: a folder of this machine, up to a limit."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rapidin_vdb.errors import SpecError

_DEFAULT_GIB = 50.0
_NAMED = re.compile("-[0-9a-f]{16}$")


def cache_root() -> Path:
    """Return the folder of all that is cached: RAPIDIN_VDB_CACHE, or `rapidin-vdb` in the user's cache folder."""
    given = os.environ.get("RAPIDIN_VDB_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rapidin-vdb"


def cache_folder(uri: str) -> Path:
    """Return the folder for one database's indexes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", uri.rpartition("/")[2])[:40]
    return cache_root() / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


def cached_indexes() -> Iterator[Path]:
    """Yield the folders of all indexes that are cached; no others that may lie in the same folder, as a database."""
    for kind in ("indexes", "token_indexes"):
        for folder in cache_root().glob(f"*/{kind}"):
            try:
                found = [*folder.iterdir()] if _NAMED.search(folder.parent.name) else []
            except OSError:
                continue  # no folder, not ours, or somebody else removes it
            yield from found


def cache_limit() -> int:
    """Return how many bytes the cache may take: RAPIDIN_VDB_CACHE_GIB, or 50 GiB.

    Raises:
        SpecError: it is no number above 0.
    """
    given = os.environ.get("RAPIDIN_VDB_CACHE_GIB")
    try:
        gib = float(given) if given else _DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not gib > 0:
        raise SpecError(f"RAPIDIN_VDB_CACHE_GIB is {given}; wanted a number above 0")
    return int(gib * 2**30)
