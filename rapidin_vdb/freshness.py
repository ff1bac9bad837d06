"""Indexes beside a table: an answer always comes from one that holds exactly the version that was asked for."""

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from rapidin_vdb.coarse_notes import with_what_coarse_finds
from rapidin_vdb.errors import SpecError, UnreadableIndexError
from rapidin_vdb.index import (
    Held,
    Manifest,
    ShardedIndex,
    check_index,
    clear_index,
    extend_index,
    index_folders,
    list_manifests,
    load_index,
    manifest_of,
    measured_recall,
    readable_manifest,
    with_recall,
    write_index,
)
from rapidin_vdb.index_cache import check_room, fits, may_be_kept, note_use
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.recipe import IndexRecipe, default_recipe
from rapidin_vdb.results import IndexInfo
from rapidin_vdb.store import TableVersion, undisturbed
from rapidin_vdb.table_index import (
    Residents,
    batches_of,
    check_coarse,
    counted,
    difference,
    held_by,
    holds,
    info_of,
    of_table,
)

logger = logging.getLogger(__name__)

# An index in so many parts is written anew by the next `index`; queries go on adding some, each a file more to open.
_MOST_PARTS, _MOST_PARTS_AT_ALL = 64, 512


class IndexKeeper:
    """Builds, finds, updates and keeps the indexes of one database."""

    def __init__(self, folder: Path, *, cached: bool = False) -> None:
        self.folder = folder
        """Where they are, each in a folder of its own."""
        self._cached = cached  # the table is far away: an index of it is kept here, where it fits
        self._residents = Residents()
        self._kept_out: Held | None = None  # the version of which no index could be written to the cache
        self._lock = Lock()

    def build(self, snapshot: TableVersion, recipe: IndexRecipe, *, progress: Progress = silent) -> IndexInfo:
        """Bring an index of a recipe to a version of the table, on disk, and say what it holds.

        Where one was built before, only the difference is applied, unless that is most of the table.

        Raises:
            SpecError: the recipe cannot be honoured for this table, or the index would be larger than the cache may be.
            PurgedError: a purge removed the version meanwhile; nothing of it is left in the index.
        """
        with self._lock:
            built, _ = self._built(snapshot, recipe, progress)
        self._used(recipe.name)
        return info_of(built, snapshot)

    def _built(self, snapshot: TableVersion, recipe: IndexRecipe, progress: Progress) -> tuple[Manifest, ShardedIndex]:
        check_coarse(recipe, snapshot)
        if self._cached:
            check_room(recipe, width=snapshot.width, rows=snapshot.rows())
        try:
            written = self._written(snapshot, recipe, progress)
            self._residents.let_go()  # first: two copies of its rows might not fit
            index = self._loaded_after(written, snapshot)
            if recipe.coarse_width and index.samples:
                written = with_recall(self.folder, written, measured_recall(index))
        except OSError as error:
            text = f"the index {recipe.name} cannot be written to {self.folder}: {error}; the tables need none"
            raise SpecError(text) from error
        self._residents.keep(snapshot, index, self._chosen(None))
        return written, index

    def _written(self, snapshot: TableVersion, recipe: IndexRecipe, progress: Progress) -> Manifest:
        """Bring an index of a recipe to a version of the table on disk."""
        manifest = manifest_of(self.folder, recipe.name)
        if manifest is not None and manifest.index_recipe == recipe:
            extended = self._sound(manifest, snapshot, progress=progress)
            if extended is not None:
                return extended
        count = snapshot.rows()
        batches = counted(batches_of(snapshot), count, progress)
        return write_index(  # unless it is done: by somebody else, who was waited for
            self.folder, recipe, held_by(snapshot), batches, count=count, check=snapshot.check_kept,
            done=lambda found: found != manifest and found.index_recipe == recipe and holds(found, snapshot),
        )  # fmt: skip

    def check(self, name: str | None) -> None:
        """Refuse the name of an index that is not built (`SpecError`)."""
        self._chosen(name)

    def fresh(self, snapshot: TableVersion, *, name: str | None = None, progress: Progress = silent) -> ShardedIndex:
        """Return an index of exactly this version of the table: at hand, on disk, updated, or made now.

        `name` asks for the built index of that name; otherwise an exact one goes before a coarse one.

        Raises:
            SpecError: there is no built index of that name.
        """
        with self._lock:
            manifests = self._chosen(name)
            index = self._residents.at_hand(snapshot, manifests, name)
            if index is None:
                self._residents.make_room(snapshot, manifests)
                index = self._from_disk(snapshot, manifests, progress)
                if index is None and self._cached:
                    index = self._fetched(snapshot, manifests, progress)
            if index is None:
                if manifests:
                    logger.info("no built index can serve version %d: reading the table itself", snapshot.version)
                index = of_table(snapshot, progress)
            index = with_what_coarse_finds(self.folder, index)
            self._residents.keep(snapshot, index, self._chosen(name))  # as they are now: an update made a new one
        self._used(index.recipe.name)
        return index

    def rebuild(self, newest: Callable[[], TableVersion], damaged: Manifest, *, progress: Progress = silent) -> bool:
        """Build a damaged index anew; say whether it was still there, for somebody else may have done so already.

        Raises:
            RapidInError: it cannot be built.
            OSError: it cannot be removed; it may be there in part, which no query takes for an index.
        """
        removed, _ = self.remove(damaged.name, only=lambda found: found == damaged)
        if removed:
            self._build_newest(newest, damaged.index_recipe, progress=progress)
        return removed

    def rebuild_all(self, newest: Callable[[], TableVersion]) -> None:
        """Build every index anew, and take away what is none; whoever is building one is waited for.

        All are taken away first: what cannot be built leaves nothing of what was there.

        Raises:
            SpecError: one cannot be removed, or not be built.
        """
        try:
            manifests = [self.remove(name)[1] for name in index_folders(self.folder)]
        except OSError as error:
            raise SpecError(
                f"the indexes in {self.folder} cannot be removed, and may hold what is gone: {error}; see to it, and "
                "run the purge again"
            ) from error
        for manifest in manifests:
            if manifest is not None:
                self._build_newest(newest, manifest.index_recipe)

    @undisturbed
    def _build_newest(
        self, newest: Callable[[], TableVersion], recipe: IndexRecipe, *, progress: Progress = silent
    ) -> None:
        self.build(newest(), recipe, progress=progress)

    def remove(
        self, name: str, *, wait: bool = True, only: Callable[[Manifest | None], bool] = lambda found: True
    ) -> tuple[bool, Manifest | None]:
        """Take an index away, or what a folder holds that is none; arguments and answer are those of `clear_index`."""
        with self._lock:
            removed = clear_index(self.folder, name, wait=wait, only=only)
            self._residents.let_go()
        return removed

    def built(self, snapshot: TableVersion) -> tuple[IndexInfo, ...]:
        """Return what is built, and whether it holds this version of the table."""
        return tuple(info_of(manifest, snapshot) for manifest in list_manifests(self.folder))

    def _fetched(self, snapshot: TableVersion, kept: list[Manifest], progress: Progress) -> ShardedIndex | None:
        """Build an index of a table that is far away, if it fits the cache, so that it is read once only.

        Not in the place of a newer version's, nor beside one that was chosen. What cannot be built is tried once for a
        version: each time, all of the table would come from far away.
        """
        held, recipe = held_by(snapshot), default_recipe()
        if held == self._kept_out or not may_be_kept(recipe, snapshot, kept):
            return None
        try:
            return self._built(snapshot, recipe, progress)[1]
        except SpecError as error:
            logger.warning("%s", error)
            self._kept_out = held
            return None

    def _used(self, name: str) -> None:
        if self._cached:
            note_use(self.folder / name)

    def _chosen(self, name: str | None) -> list[Manifest]:
        manifests = list_manifests(self.folder)
        if name is not None and name not in [manifest.name for manifest in manifests]:
            built = ", ".join(manifest.name for manifest in manifests) or "none"
            raise SpecError(f"no index {name} is built (built: {built}); build it with: rapidin-vdb index")
        chosen = [manifest for manifest in manifests if name is None or manifest.name == name]
        return sorted(chosen, key=lambda manifest: (manifest.recipe["coarse_width"] > 0, manifest.name))

    def _loaded_after(self, manifest: Manifest, snapshot: TableVersion) -> ShardedIndex:
        """Load an index that was just written, or what somebody else has put in its place since."""
        try:
            return load_index(self.folder, manifest)
        except SpecError:
            if (there := readable_manifest(self.folder, manifest.name)) is None:
                snapshot.check_kept()  # a purge takes indexes away, and puts others in their place later
            return load_index(self.folder, there or manifest)

    def _from_disk(self, snapshot: TableVersion, manifests: list[Manifest], progress: Progress) -> ShardedIndex | None:
        # One that holds this version first; and what is asked for exactly is not answered by a coarse one.
        exact = [known for known in manifests if not known.recipe["coarse_width"]]
        for known in sorted(exact or manifests, key=lambda known: not holds(known, snapshot)):
            manifest = known
            for _ in range(2):
                try:
                    index = self._loaded(manifest, snapshot, progress)
                except SpecError as error:
                    # Damaged, or replaced by somebody else while it was read.
                    again = readable_manifest(self.folder, manifest.name)
                    if again is None or again == manifest:
                        logger.warning("%s", error)
                        break
                    manifest = again
                    continue
                if index is not None:
                    return index
                break
        return None

    def _loaded(self, manifest: Manifest, snapshot: TableVersion, progress: Progress) -> ShardedIndex | None:
        """Return a built index, brought to this version on disk, or in memory where it has to stay as it is there."""
        if snapshot.version >= manifest.table_version:
            try:
                found = self._extended(manifest, snapshot, progress=progress, wait=False)
                return None if found is None else load_index(self.folder, found)
            except OSError as error:
                logger.warning("the index %s cannot be brought up to date on disk: %s", manifest.name, error)
        change = difference(self.folder, manifest, snapshot)
        if change is None:
            return None
        index = load_index(self.folder, manifest)
        keys, missing = change
        return index.updated(keys, batches_of(snapshot, missing)) if index.grows or not len(missing) else None

    def _sound(self, manifest: Manifest, snapshot: TableVersion, *, progress: Progress) -> Manifest | None:
        """Return an index brought to this version on disk; None where it is damaged, or has to be made anew."""
        if len(manifest.parts) >= _MOST_PARTS:
            return None
        try:
            extended = self._extended(manifest, snapshot, progress=progress)
            if extended is not None:
                check_index(self.folder, extended)
            return extended
        except UnreadableIndexError:
            raise  # it may be sound
        except SpecError as error:
            again = readable_manifest(self.folder, manifest.name)
            # Whoever held the lock may have brought it to this version, or on the way to it.
            if again is not None and again != manifest and again.index_recipe == manifest.index_recipe:
                return self._sound(again, snapshot, progress=progress)
            logger.warning("%s", error)
            return None

    def _extended(
        self, manifest: Manifest, snapshot: TableVersion, *, progress: Progress, wait: bool = True
    ) -> Manifest | None:
        """Return an index brought to this version on disk; None where it has to be made anew.

        Raises:
            SpecError: it is damaged.
            OSError: the folder cannot be written, or, where it is not to `wait`, somebody else is writing.
        """
        if holds(manifest, snapshot):
            return manifest
        change = difference(self.folder, manifest, snapshot)
        if change is None:
            return None
        keys, missing = change
        if not wait and len(manifest.parts) >= _MOST_PARTS_AT_ALL:
            raise OSError(f"it lies in {len(manifest.parts)} parts; put them together with: rapidin-vdb index")
        if self._cached and not fits(manifest.index_recipe, width=snapshot.width, rows=manifest.rows + len(missing)):
            if wait:
                return None
            raise OSError("it would be larger than the cache may get (RAPIDIN_VDB_CACHE_GIB)")
        batches = counted(batches_of(snapshot, missing), len(missing), progress)
        return extend_index(
            self.folder, manifest, held_by(snapshot), keys, batches, count=len(missing), wait=wait,
            check=snapshot.check_kept,
        )  # fmt: skip
