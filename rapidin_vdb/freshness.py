"""Indexes beside a table: an answer always comes from one that holds exactly the table's newest version."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import Manifest, ShardedIndex, build_index, list_manifests, load_index, save_index
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.recipe import IndexRecipe, read_recipe
from rapidin_vdb.results import IndexInfo
from rapidin_vdb.store import TABLE, Snapshot

logger = logging.getLogger(__name__)


class IndexKeeper:
    """Builds, finds and keeps the indexes of one database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._resident: tuple[int, ShardedIndex] | None = None

    def build(self, snapshot: Snapshot, recipe: IndexRecipe, *, progress: Progress = silent) -> IndexInfo:
        """Build an index of a version of the table, write it to disk, and say what it holds."""
        built = _build(snapshot, recipe, progress=progress)
        manifest = save_index(
            built, self._folder, table=TABLE, table_version=snapshot.version, table_digest=snapshot.digest
        )
        self._resident = (snapshot.version, built)
        return _info(manifest, snapshot)

    def fresh(self, snapshot: Snapshot, *, progress: Progress = silent) -> ShardedIndex:
        """Return an index of exactly this version of the table: at hand, on disk, or made now."""
        if self._resident is not None and self._resident[0] == snapshot.version:
            return self._resident[1]
        index = self._load(snapshot)
        if index is None:
            manifests = list_manifests(self._folder)
            recipe = read_recipe("cpu")
            if manifests:
                logger.info("no built index holds version %d: searching the table itself", snapshot.version)
                recipe = manifests[0].index_recipe
            index = _build(snapshot, recipe, progress=progress)
        self._resident = (snapshot.version, index)
        return index

    def list(self, snapshot: Snapshot) -> tuple[IndexInfo, ...]:
        """Return what is built, and whether it holds this version of the table."""
        return tuple(_info(manifest, snapshot) for manifest in list_manifests(self._folder))

    def _load(self, snapshot: Snapshot) -> ShardedIndex | None:
        for manifest in list_manifests(self._folder):
            if _holds(manifest, snapshot):
                try:
                    return load_index(self._folder, manifest)
                except SpecError as error:
                    logger.warning("%s", error)
        return None


def _build(snapshot: Snapshot, recipe: IndexRecipe, *, progress: Progress) -> ShardedIndex:
    count = snapshot.count()

    def batches() -> Iterator[tuple[list[str], np.ndarray]]:
        done = 0
        progress("index", done, count)
        for ids, vectors in snapshot.vectors():
            yield ids, vectors
            done += len(ids)
            progress("index", done, count)

    return build_index(recipe, batches(), width=snapshot.fingerprint.sketch.width, count=count)


def _holds(manifest: Manifest, snapshot: Snapshot) -> bool:
    return (manifest.table, manifest.table_digest, manifest.width) == (
        TABLE,
        snapshot.digest,
        snapshot.fingerprint.sketch.width,
    )


def _info(manifest: Manifest, snapshot: Snapshot) -> IndexInfo:
    return IndexInfo(
        name=manifest.name,
        recipe=manifest.recipe,
        fresh=_holds(manifest, snapshot),
        samples=manifest.samples,
    )
