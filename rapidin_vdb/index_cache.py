"""Indexes of databases in object stores: kept on this machine, up to a limit; those used longest ago go first."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import Manifest, clear_index
from rapidin_vdb.recipe import IndexRecipe
from rapidin_vdb.store import TableVersion, cache_limit, cached_indexes

logger = logging.getLogger(__name__)

# What an index keeps of a row besides its vector: two numbers, and an id, which is seldom longer.
_KEY_BYTES = 100


def fits(recipe: IndexRecipe, *, width: int, rows: int) -> bool:
    """Say whether an index alone is no larger than the cache may get."""
    return _size(recipe, width, rows) <= cache_limit()


def check_room(recipe: IndexRecipe, *, width: int, rows: int) -> None:
    """Refuse an index that alone would be larger than the cache may get.

    Raises:
        SpecError: it would be.
    """
    if not fits(recipe, width=width, rows=rows):
        raise SpecError(
            f"an index {recipe.name} of {rows:,} rows takes some {_gib(_size(recipe, width, rows))}, but all cached "
            f"indexes together may take {_gib(cache_limit())}: set RAPIDIN_VDB_CACHE_GIB to more, or go without, and "
            "queries read the table itself"
        )


def may_be_kept(recipe: IndexRecipe, snapshot: TableVersion, kept: Sequence[Manifest]) -> bool:
    """Say whether an index of a version may be added to those that are kept: of this recipe alone, and none is newer.

    One of a newer version stays that of whoever asks for that; but not one of a table that was there before.
    """
    newer = [known for known in kept if known.table_version > snapshot.version]
    return all(known.index_recipe == recipe for known in kept) and not any(
        snapshot.digest_of(known.table_version) == known.table_digest for known in newer
    )


def _size(recipe: IndexRecipe, width: int, rows: int) -> int:
    return (2 * (width + recipe.coarse_width) + _KEY_BYTES) * rows


def note_use(index: Path) -> None:
    """Note that an index was used now, and remove those that were used longest ago, until all fit the limit.

    One that alone does not fit goes itself, and no other for its sake. Whoever searches an index that goes is not
    disturbed: its files are open. One that somebody is writing stays.
    """
    try:
        os.utime(index)
    except OSError:
        pass  # gone, or not ours: then it is not the least recently used for long
    limit, known = cache_limit(), []
    for path in cached_indexes():
        try:
            known.append((path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path))
        except OSError:
            continue  # no folder, or somebody else removes it
    total = sum(size for _, size, _ in known)

    def turn(entry: tuple[float, int, Path]) -> tuple[int, float]:
        used, size, path = entry
        return (0 if path != index else 1 if size <= limit else -1), used

    for _, size, path in sorted(known, key=turn):
        if total <= limit or (path == index and size <= limit):
            return
        if path == index:
            logger.warning(
                "the index %s takes %s, but all cached indexes together may take %s: it is not kept; set "
                "RAPIDIN_VDB_CACHE_GIB to more", path.name, _gib(size), _gib(limit),
            )  # fmt: skip
        try:
            clear_index(path.parent, path.name, wait=False)
            total -= size
        except OSError:
            continue  # somebody is writing it


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB"
