"""Where indexes of databases in object stores are kept: a folder of this machine, up to a limit."""

import hashlib
import os
import re
import shutil
from pathlib import Path

from rapidin_vdb.errors import SpecError

_DEFAULT_GIB = 50.0


def cache_root() -> Path:
    """Return the folder of all that is cached: RAPIDIN_VDB_CACHE, or `rapidin-vdb` in the user's cache folder."""
    given = os.environ.get("RAPIDIN_VDB_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rapidin-vdb"


def cache_folder(uri: str) -> Path:
    """Return the folder for one database's indexes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", uri.rpartition("/")[2])[:40]
    return cache_root() / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


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


def touch(index: Path) -> None:
    """Note that an index was used now."""
    try:
        os.utime(index)
    except OSError:
        pass  # gone, or not ours: then it is not the least recently used for long


def trim_cache(keep: Path) -> None:
    """Remove the indexes that were used longest ago, but not `keep`, until all fit the limit.

    A process that searches one of them goes on: its files are open.
    """
    limit, root = cache_limit(), cache_root()
    known: list[tuple[float, int, Path]] = []
    for index in (path for kind in ("indexes", "token_indexes") for path in root.glob(f"*/{kind}/*") if path.is_dir()):
        try:
            known.append((index.stat().st_mtime, sum(file.stat().st_size for file in index.iterdir()), index))
        except OSError:
            continue  # somebody else removes it
    total = sum(size for _, size, _ in known)
    for _, size, index in sorted(known):
        if total <= limit:
            return
        if index != keep:
            shutil.rmtree(index, ignore_errors=True)
            total -= size
