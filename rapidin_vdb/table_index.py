"""Rows of a table on their way into an index; the table itself as one, where none is built; and those in memory."""

import gc
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    load_keys,
    make_shard,
)
from rapidin_vdb.machine import free_bytes
from rapidin_vdb.progress import Progress
from rapidin_vdb.recipe import IndexRecipe, default_recipe
from rapidin_vdb.results import IndexInfo
from rapidin_vdb.store import SAMPLES, TableVersion

logger = logging.getLogger(__name__)

# An index is written anew when more than this share of its rows went or came.
_MOST_CHANGED = 0.3


@dataclass(frozen=True, eq=False)
class Resident:
    """An index in memory."""

    held: Held
    """Which version of which table it holds."""
    index: ShardedIndex
    """The index."""
    chosen_from: list[Manifest]
    """The built indexes that were to choose from when it was read, in the order in which they are taken."""

    def at_hand(self, snapshot: TableVersion, manifests: list[Manifest], name: str | None) -> ShardedIndex | None:
        """Return it, brought to a version of the table; None where another one is to be used, or it cannot be.

        `manifests` are the built indexes to choose from now, and `name` is the one that was asked for.
        """
        try:
            return self._brought_to(snapshot, manifests, name)
        except SpecError as error:
            logger.warning("%s", error)
            return None

    def _brought_to(self, snapshot: TableVersion, manifests: list[Manifest], name: str | None) -> ShardedIndex | None:
        held, index = self.held, self.index
        # Somebody who has built it anew may have found that what was read here is damaged; and has put it together.
        current = next((manifest for manifest in manifests if manifest.name == index.recipe.name), None)
        if current is not None and not index.parts <= {part.name for part in current.parts}:
            return None
        # Whoever names none gets a coarse one where nothing but coarse ones is built, and only then.
        exact = not manifests or not manifests[0].recipe["coarse_width"]
        if name is None and index.recipe.coarse_width and exact:
            return None
        if held == held_by(snapshot) and self.chosen_from == manifests:
            return index
        if name is not None and index.recipe.name != name:
            return None
        if manifests and index.recipe != manifests[0].index_recipe:
            return None
        if held == held_by(snapshot):
            return index
        if not index.grows or snapshot.digest_of(held.version) != held.digest:
            return None
        keys, missing = index.keys.difference(*snapshot.row_keys())
        # What is mapped stays on disk; and memory has an end.
        mapped = index.recipe.residence != "resident" or bool(index.recipe.coarse_width)
        if much_changed(index.keys, keys, missing) or (mapped and len(missing)):
            return None
        if 2 * snapshot.width * len(missing) > free_bytes("cpu") // 2:
            return None
        return index.updated(keys, batches_of(snapshot, missing))


class Residents:
    """What one database has in memory; not for several threads at once."""

    def __init__(self) -> None:
        self.newest: Resident | None = None
        """Of the newest version that was asked for, or the only one."""
        self.older: Resident | None = None
        """Of a version before that: who asks for one does not push out what all others are answered from."""

    def at_hand(self, snapshot: TableVersion, manifests: list[Manifest], name: str | None) -> ShardedIndex | None:
        """Return an index of a version of the table, as `Resident.at_hand`; None where it has to be read."""
        if not self._is_older(snapshot):
            return self.newest.at_hand(snapshot, manifests, name) if self.newest else None
        found = self.older.at_hand(snapshot, manifests, name) if self.older else None
        if found is None and not _has_room_beside(snapshot, manifests):
            # Of the newest, which it takes the place of: what it was made of may not be used any more.
            newest = self.newest
            self.let_go()
            found = newest.at_hand(snapshot, manifests, name) if newest else None
        return found

    def make_room(self, snapshot: TableVersion, manifests: list[Manifest]) -> None:
        """Let go of what an index of this version takes the place of, before it is read: both might not fit.

        Whoever searches it still has a hold of it.
        """
        if self._is_older(snapshot):
            self.older = None  # there is room, or there would be no newest any more
        else:
            self.let_go()

    def keep(self, snapshot: TableVersion, index: ShardedIndex, chosen_from: list[Manifest]) -> None:
        """Keep an index of a version, in the place of what was kept of such versions."""
        resident = Resident(held_by(snapshot), index, chosen_from)
        if self._is_older(snapshot):
            self.older = resident
        else:
            self.newest = resident

    def let_go(self) -> None:
        """Let go of all, also of what a cycle of references keeps.

        LanceDB ends a read by an exception that refers to itself. From Python 3.12 on its traceback has a hold of all
        who called, and of what they had at hand: of an index as large as the table.
        """
        indexes = [weakref.ref(resident.index) for resident in (self.newest, self.older) if resident is not None]
        self.newest = self.older = None
        if any(index() is not None for index in indexes):
            gc.collect()

    def _is_older(self, snapshot: TableVersion) -> bool:
        return self.newest is not None and snapshot.version < self.newest.held.version


def of_table(snapshot: TableVersion, progress: Progress) -> ShardedIndex:
    """Return an index of the table itself: its rows in memory, or streamed from it where they do not fit."""
    recipe, width, count = default_recipe(), snapshot.width, snapshot.rows()
    if 2 * width * count < free_bytes("cpu") // 2:
        return empty_index(recipe, width=width).updated(
            empty_index(recipe, width=width).keys, counted(batches_of(snapshot), count, progress)
        )
    logger.info("the table is larger than the memory that is free: streaming it; an index is faster")
    return _streamed(snapshot, recipe)


def _has_room_beside(snapshot: TableVersion, manifests: list[Manifest]) -> bool:
    """Say whether an index of a version may stay in memory beside another: there, and nowhere near its end."""
    devices = {device for manifest in manifests for device in manifest.index_recipe.devices}
    return devices <= {"cpu"} and 2 * snapshot.width * snapshot.rows() < free_bytes("cpu") // 4


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
