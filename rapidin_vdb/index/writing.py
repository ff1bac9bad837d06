"""Indexes are written part by part; a manifest, which comes last, puts them in force."""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from filelock import FileLock

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index.coarse import folded
from rapidin_vdb.index.index import Batch
from rapidin_vdb.index.keys import Keys, joined
from rapidin_vdb.index.manifest import MANIFEST, Held, Manifest, Part, list_manifests
from rapidin_vdb.index.source import norm_of
from rapidin_vdb.recipe import IndexRecipe


def write_index(folder: Path, recipe: IndexRecipe, held: Held, batches: Iterable[Batch], *, count: int) -> Manifest:
    """Write an index of `count` rows below `folder`, in the place of one of the same name; never half of it."""
    place = folder / recipe.name
    place.mkdir(parents=True, exist_ok=True)
    with _lock(place):
        shards = len(recipe.shard_devices)
        # Runs of equal length, the first ones longer by a row where it does not come out even.
        sizes = [count // shards + (number < count % shards) for number in range(shards)]
        parts, largest = _write_parts(place, recipe, batches, list(enumerate(sizes)), held.width)
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
    folder: Path, manifest: Manifest, held: Held, keys: Keys, batches: Iterable[Batch], *, count: int, wait: bool = True
) -> Manifest:
    """Bring an index to another version of the table: `keys` say which rows are alive, `batches` bring `count` more.

    Raises:
        SpecError: somebody else has changed the index since the manifest was read.
        OSError: it cannot be written; or, where it is not to `wait`, somebody else is writing it.
    """
    place = folder / manifest.name
    with _lock(place, wait=wait):
        if manifest not in list_manifests(folder):
            raise SpecError(f"the index {manifest.name} was changed by somebody else meanwhile")
        sizes = [0] * manifest.shards
        for part in manifest.parts:
            sizes[part.shard] += part.count
        smallest = min(range(manifest.shards), key=lambda shard: sizes[shard])
        dealt = [(smallest, count)] if count else []
        parts, largest = _write_parts(place, manifest.index_recipe, batches, dealt, held.width)
        gone = None
        if not keys.alive.all():
            gone = f"gone-{uuid4().hex}.npy"
            np.save(place / gone, np.flatnonzero(~keys.alive), allow_pickle=False)
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
        if manifest not in list_manifests(folder):
            return replace(manifest, recall=recall)
        manifest = replace(manifest, recall=recall)
        _commit(folder / manifest.name, manifest)
    return manifest


def _lock(place: Path, *, wait: bool = True) -> FileLock:
    return FileLock(place / ".lock", timeout=-1 if wait else 0)


def _write_parts(
    place: Path, recipe: IndexRecipe, batches: Iterable[Batch], dealt: list[tuple[int, int]], width: int
) -> tuple[tuple[Part, ...], float]:
    """Write rows as parts of the given shards and sizes, in order; all of them, or none."""
    names: list[str] = []
    try:
        return _written_parts(place, recipe, batches, dealt, width, names)
    except BaseException:
        for name in names:
            for path in place.glob(f"{name}.*"):
                path.unlink(missing_ok=True)
        raise


def _written_parts(
    place: Path, recipe: IndexRecipe, batches: Iterable[Batch], dealt: list[tuple[int, int]], width: int,
    names: list[str],
) -> tuple[tuple[Part, ...], float]:  # fmt: skip
    largest, parts = 0.0, []
    arriving = iter(batches)
    waiting: Batch | None = None
    for shard, size in (entry for entry in dealt if entry[1]):
        part, done, came = Part(name=uuid4().hex, count=size, shard=shard), 0, []
        names.append(part.name)
        with ExitStack() as files:
            rows = files.enter_context(_array_file(place / f"{part.name}.rows.npy", size, width))
            coarse = None
            if recipe.coarse_width:
                coarse = files.enter_context(_array_file(place / f"{part.name}.coarse.npy", size, recipe.coarse_width))
            while done < size:
                batch, waiting = _cut(waiting or next(arriving), size - done)
                rows.write(np.ascontiguousarray(batch.rows).data)
                if coarse is not None:
                    coarse.write(np.ascontiguousarray(folded(batch.rows, recipe.coarse_width)).data)
                largest = max(largest, norm_of(batch.rows))
                came.append(batch.keys)
                done += len(batch.rows)
        keys = joined(came)
        np.save(place / f"{part.name}.keys.npy", np.stack([keys.row_ids, keys.versions]), allow_pickle=False)
        (place / f"{part.name}.ids.json").write_text(json.dumps(keys.sample_ids), "utf-8")
        for path in place.glob(f"{part.name}.*"):
            _sync(path)
        parts.append(part)
    return tuple(parts), largest


def _sync(path: Path) -> None:
    """Let nothing be named by a manifest that a loss of power could still take away."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _array_file(path: Path, count: int, width: int) -> BinaryIO:
    file = path.open("wb")
    header = {"descr": "<f2", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


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
    new.write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
    _sync(new)
    new.replace(place / MANIFEST)
    named = {part.name for part in manifest.parts}
    for path in place.iterdir():
        keeps = path.name in (MANIFEST, ".lock", manifest.gone) or path.name.split(".")[0] in named
        if not keeps:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
