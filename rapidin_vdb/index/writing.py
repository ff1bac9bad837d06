"""Indexes are written part by part; a manifest, which comes last, puts them in force."""

import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock

from rapidin_vdb.errors import SpecError, UnreadableIndexError
from rapidin_vdb.index.coarse import folded
from rapidin_vdb.index.index import Batch
from rapidin_vdb.index.keys import Keys, joined
from rapidin_vdb.index.manifest import (
    LOCK,
    MANIFEST,
    Held,
    Manifest,
    Part,
    array_header,
    checksum_of,
    contents,
    manifest_of,
    readable_manifest,
)
from rapidin_vdb.index.source import norm_of
from rapidin_vdb.locks import holding
from rapidin_vdb.recipe import IndexRecipe

# What an index's folder holds besides manifest and lock: files of parts, of what is gone, and half-written manifests.
_OURS = re.compile(r"[0-9a-f]{32}(?:\.[a-z]+)?\.npy|gone-[0-9a-f]{8}-[0-9a-f]{32}\.npy|\.[0-9a-f]{32}\.json")


def _nothing() -> None:
    """Find nothing wrong."""


def write_index(
    folder: Path, recipe: IndexRecipe, held: Held, batches: Iterable[Batch], *, count: int,
    check: Callable[[], None] = _nothing, done: Callable[[Manifest], bool] = lambda found: False,
) -> Manifest:  # fmt: skip
    """Write an index of `count` rows below `folder`, in the place of one of the same name; never half of it.

    `check` is asked once all is written, and before it is put in force: what it raises takes away what was written.
    `done` is asked of the one that is there once nobody else writes it: where that will do, it stays.
    """
    place = folder / recipe.name
    place.mkdir(parents=True, exist_ok=True)
    with _lock(place):
        found = readable_manifest(folder, recipe.name)
        if found is not None and done(found):
            return found
        shards = len(recipe.shard_devices)
        # Runs of equal length, the first ones longer by a row where it does not come out even.
        sizes = [count // shards + (number < count % shards) for number in range(shards)]
        parts, largest = _write_parts(place, recipe, batches, list(enumerate(sizes)), held.width, check)
        manifest = Manifest(
            name=recipe.name,
            recipe=recipe.to_dict(),
            table=held.table,
            table_version=held.version,
            table_digest=held.digest,
            width=held.width,
            samples=count,
            shards=shards,
            parts=parts,
            gone=None,
            largest_norm=largest,
        )
        _commit(place, manifest)
    return manifest


def extend_index(
    folder: Path, manifest: Manifest, held: Held, keys: Keys, batches: Iterable[Batch], *, count: int,
    wait: bool = True, check: Callable[[], None] = _nothing,
) -> Manifest:  # fmt: skip
    """Bring an index to another version of the table: `keys` say which rows are alive, `batches` bring `count` more.

    `check` is as for `write_index`.

    Raises:
        SpecError: somebody else has changed the index since the manifest was read.
        OSError: it cannot be written; or, where it is not to `wait`, somebody else is writing it.
    """
    place = folder / manifest.name
    with _lock(place, wait=wait):
        if readable_manifest(folder, manifest.name) != manifest:
            raise SpecError(f"the index {manifest.name} was changed by somebody else meanwhile")
        sizes = [0] * manifest.shards
        for part in manifest.parts:
            sizes[part.shard] += part.count
        smallest = min(range(manifest.shards), key=lambda shard: sizes[shard])
        dealt = [(smallest, count)] if count else []
        parts, largest = _write_parts(place, manifest.index_recipe, batches, dealt, held.width, check)
        gone = None
        if not keys.alive.all():
            # Its checksum is in its name.
            new = f"{uuid4().hex}.npy"
            gone = f"gone-{_save(place / new, np.flatnonzero(~keys.alive)):08x}-{new}"
            (place / new).rename(place / gone)
            _sync(place / gone)
        manifest = replace(
            manifest,
            table_version=held.version,
            table_digest=held.digest,
            samples=keys.count + count,
            parts=manifest.parts + parts,
            gone=gone,
            largest_norm=max(manifest.largest_norm, largest),
        )
        _commit(place, manifest)
    return manifest


def with_recall(folder: Path, manifest: Manifest, recall: dict[str, Any]) -> Manifest:
    """Write what a coarse search finds into the manifest, unless somebody else has changed the index meanwhile."""
    with _lock(folder / manifest.name):
        if readable_manifest(folder, manifest.name) != manifest:
            return replace(manifest, recall=recall)
        manifest = replace(manifest, recall=recall)
        _commit(folder / manifest.name, manifest)
    return manifest


def clear_index(
    folder: Path, name: str, *, wait: bool = True, only: Callable[[Manifest | None], bool] = lambda found: True
) -> tuple[bool, Manifest | None]:
    """Take away all that is in an index's folder, once nobody is writing it.

    Returns whether there was anything, and the manifest, None where none can be read. `only` looks at that, and says
    whether to go on. The lock itself stays, for those who wait for it.

    Raises:
        OSError: it cannot be written; or, where it is not to `wait`, somebody else is writing it.
    """
    place = folder / name
    if place.is_symlink():
        place.unlink()
        return True, None
    with _lock(place, wait=wait):
        found = readable_manifest(folder, name)
        if not only(found):
            return False, found
        # The manifest first: nobody takes an index for whole whose files are going.
        rest = sorted(contents(place), key=lambda path: path.name != MANIFEST)
        for path in rest:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return bool(rest), found


@contextmanager
def _lock(place: Path, *, wait: bool = True) -> Iterator[None]:
    lock = FileLock(place / LOCK)
    with (
        holding(lock, f"the index {place.name} in {place.parent}") if wait else lock.acquire(timeout=0),
        _all_or_nothing(place),
    ):
        yield


@contextmanager
def _all_or_nothing(place: Path) -> Iterator[None]:
    """Take away the files that come into an index's folder, where something goes wrong before they are in force.

    On a full disk each try would leave some, and leave less room for the next one. Nobody else writes there: the lock
    is held.
    """
    before = {path.name for path in place.iterdir()}
    try:
        yield
    except BaseException:
        # What went wrong is told, not that it cannot be cleared away as well.
        with suppress(OSError, UnreadableIndexError):
            manifest = manifest_of(place.parent, place.name)
            _take_away([path for path in place.iterdir() if path.name not in before], manifest)
        raise


def _write_parts(
    place: Path, recipe: IndexRecipe, batches: Iterable[Batch], dealt: list[tuple[int, int]], width: int,
    check: Callable[[], None],
) -> tuple[tuple[Part, ...], float]:  # fmt: skip
    """Write rows as parts of the given shards and sizes, in order."""
    largest, parts = 0.0, []
    arriving = iter(batches)
    waiting: Batch | None = None
    for shard, size in (entry for entry in dealt if entry[1]):
        name, done, came = uuid4().hex, 0, []
        with ExitStack() as stack:
            files = {"rows.npy": stack.enter_context(_array_file(place / f"{name}.rows.npy", size, width))}
            if recipe.coarse_width:
                path = place / f"{name}.coarse.npy"
                files["coarse.npy"] = stack.enter_context(_array_file(path, size, recipe.coarse_width))
            while done < size:
                batch, waiting = _cut(waiting or next(arriving), size - done)
                files["rows.npy"].write(np.ascontiguousarray(batch.rows).data.cast("B"))
                if recipe.coarse_width:
                    narrow = np.ascontiguousarray(folded(batch.rows, recipe.coarse_width))
                    files["coarse.npy"].write(narrow.data.cast("B"))
                largest = max(largest, norm_of(batch.rows))
                came.append(batch.keys)
                done += len(batch.rows)
        keys = joined(came)
        sums = {kind: file.crc for kind, file in files.items()}
        sums["keys.npy"] = _save(place / f"{name}.keys.npy", np.stack([keys.row_ids, keys.versions]))
        for kind, array in zip(("ends.npy", "ids.npy"), keys.sample_ids.packed(), strict=True):
            sums[kind] = _save(place / f"{name}.{kind}", array)
        for path in place.glob(f"{name}.*"):
            _sync(path)
        parts.append(Part(name=name, count=size, shard=shard, checksums=sums))
    # The lock is held: whoever has just made what was read wrong will come for this index once it is free.
    check()
    return tuple(parts), largest


class _SummedFile:
    """A file that is written once, and its checksum."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.crc = 0

    def __enter__(self) -> "_SummedFile":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self._file.write(data)


def _save(path: Path, array: np.ndarray) -> int:
    """Write an array, and return the checksum of its file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with _SummedFile(path) as file:
        file.write(header.getvalue())
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return file.crc


def _sync(path: Path) -> None:
    """Let nothing be named by a manifest that a loss of power could still take away."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _array_file(path: Path, count: int, width: int) -> Iterator[_SummedFile]:
    with _SummedFile(path) as file:
        file.write(array_header(count, width))
        yield file


def _cut(batch: Batch, count: int) -> tuple[Batch, Batch | None]:
    if len(batch.rows) <= count:
        return batch, None
    keys = batch.keys
    first, second = (
        Batch(Keys(keys.sample_ids[part], keys.row_ids[part], keys.versions[part], keys.alive[part]), batch.rows[part])
        for part in (slice(count), slice(count, None))
    )
    return first, second


def _commit(place: Path, manifest: Manifest) -> None:
    """Put a manifest in force, then take away what no manifest names."""
    new = place / f".{uuid4().hex}.json"
    values = json.loads(json.dumps(asdict(manifest)))
    new.write_text(json.dumps(values | {"checksum": checksum_of(values)}, indent=1), "utf-8")
    _sync(new)
    new.replace(place / MANIFEST)
    _take_away(place.iterdir(), manifest)


def _take_away(paths: Iterable[Path], manifest: Manifest | None) -> None:
    """Remove those files of an index that its manifest does not name."""
    named = {None} if manifest is None else {manifest.gone, *(part.name for part in manifest.parts)}
    for path in paths:
        keeps = path.name in named or path.name.split(".")[0] in named
        # What is not of our own kind is somebody's, whatever it does here.
        if not keeps and _OURS.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
