"""Rows of a table on their way into an index; and the table itself as one, where none is built."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import (
    Batch,
    Held,
    Keys,
    Manifest,
    ShardedIndex,
    TableSource,
    Texts,
    empty_index,
    list_manifests,
    load_keys,
    make_shard,
)
from rapidin_vdb.progress import Progress
from rapidin_vdb.recipe import IndexRecipe, default_recipe
from rapidin_vdb.results import IndexInfo
from rapidin_vdb.sketch.memory import free_bytes
from rapidin_vdb.store import SAMPLES, TableVersion

logger = logging.getLogger(__name__)

# An index is written anew when more than this share of its rows went or came.
_MOST_CHANGED = 0.3


def of_table(snapshot: TableVersion, progress: Progress) -> ShardedIndex:
    """Return an index of the table itself: its rows in memory, or streamed from it where they do not fit."""
    recipe, width, count = default_recipe(), snapshot.width, snapshot.rows()
    if 2 * width * count < free_bytes("cpu") // 2:
        return empty_index(recipe, width=width).updated(
            empty_index(recipe, width=width).keys, counted(batches_of(snapshot), count, progress)
        )
    logger.info("the table is larger than the memory that is free: streaming it; an index is faster")
    return _streamed(snapshot, recipe)


def _streamed(snapshot: TableVersion, recipe: IndexRecipe) -> ShardedIndex:
    """Return an index that reads the table itself."""
    sample_ids, row_ids, versions = snapshot.keys_in_order()
    width = snapshot.width
    source = TableSource(
        row_ids,
        lambda: ((batch.row_ids, batch.vectors) for batch in snapshot.vectors()),
        lambda wanted: ((batch.row_ids, batch.vectors) for batch in snapshot.vectors(wanted)),
        width,
    )
    recipe = replace(recipe, shards_per_device=1)
    return ShardedIndex(
        recipe=recipe,
        width=width,
        keys=Keys(Texts.of(sample_ids), row_ids, versions, np.ones(len(sample_ids), bool)),
        shards=(make_shard("cpu", source, recipe, width=width),),
        numbers=(np.arange(len(sample_ids)),),
        largest_norm=None,
    )


def check_coarse(recipe: IndexRecipe, snapshot: TableVersion) -> None:
    """Refuse a recipe that cannot be honoured for a table.

    Raises:
        SpecError: its coarse vectors would not be narrower than the table's.
    """
    if recipe.coarse_width >= snapshot.width:
        raise SpecError(
            f"index recipe {recipe.name}: coarse_width is {recipe.coarse_width}, but the database's RapidGrads "
            f"are only {snapshot.width} wide; give a smaller one, or take a recipe without"
        )


def batches_of(snapshot: TableVersion, row_ids: np.ndarray | None = None) -> Iterator[Batch]:
    """Yield the rows of a version, or some of them, as an index takes them."""
    if row_ids is not None and not len(row_ids):
        return
    for found in snapshot.vectors(row_ids):
        alive = np.ones(len(found.keys), bool)
        yield Batch(Keys(Texts.of(found.keys), found.row_ids, found.versions, alive), found.vectors.view(np.uint16))


def counted(batches: Iterator[Batch], total: int, progress: Progress) -> Iterator[Batch]:
    """Tell how far it is."""
    done = 0
    progress("index", done, total)
    for batch in batches:
        yield batch
        done += len(batch.rows)
        progress("index", done, total)


def held_by(snapshot: TableVersion) -> Held:
    """Return what tells a version of a table from all others.

    Raises:
        PurgedError: it is gone.
    """
    return Held(
        table=snapshot.name,
        version=snapshot.version,
        digest=snapshot.digest,
        width=snapshot.width,
    )


def holds(manifest: Manifest, snapshot: TableVersion) -> bool:
    """Say whether a built index holds exactly this version."""
    held = held_by(snapshot)
    return (manifest.table, manifest.table_digest, manifest.width) == (held.table, held.digest, held.width)


def info_of(manifest: Manifest, snapshot: TableVersion) -> IndexInfo:
    """Return what there is to say of a built index, seen from a version of the table."""
    return IndexInfo(
        name=manifest.name,
        recipe=manifest.recipe,
        fresh=holds(manifest, snapshot),
        samples=manifest.samples,
        table_version=manifest.table_version,
        recall=manifest.recall,
        level="sample" if snapshot.name == SAMPLES else "token",
    )


def difference(folder: Path, manifest: Manifest, snapshot: TableVersion) -> tuple[Keys, np.ndarray] | None:
    """Return what is alive of a built index in a version of the table, and what the version has beyond it.

    None where they cannot be compared, or differ in most: then the index has to be made anew.
    """
    if (manifest.table, manifest.width) != (snapshot.name, snapshot.width):
        return None
    if snapshot.digest_of(manifest.table_version) != manifest.table_digest:
        return None  # of a copy that went its own way, or of a version that is no longer kept
    before = load_keys(folder, manifest)
    keys, missing = before.difference(*snapshot.row_keys())
    return None if much_changed(before, keys, missing) else (keys, missing)


def much_changed(before: Keys, after: Keys, missing: np.ndarray) -> bool:
    """Say whether making an index anew costs less than what an update leaves behind."""
    return int((~after.alive).sum()) + len(missing) > _MOST_CHANGED * max(len(before), 1)


def say_what_coarse_finds(folder: Path, index: ShardedIndex) -> None:
    """Warn that an index is not exact, with what was measured of it."""
    found = [known.recall for known in list_manifests(folder) if known.name == index.recipe.name]
    if found and found[0] is not None:
        logger.warning(
            "the index %s is not exact: it found %.1f %% of the best %d samples when it was built",
            index.recipe.name, 100 * found[0]["recall"], found[0]["at"],
        )  # fmt: skip
