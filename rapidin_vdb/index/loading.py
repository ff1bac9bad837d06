"""Indexes are loaded onto their devices, and checked against their manifest on the way."""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rapidin_vdb.errors import SpecError, UnreadableIndexError, out_of_reach
from rapidin_vdb.index.index import ShardedIndex
from rapidin_vdb.index.keys import Keys, joined
from rapidin_vdb.index.making import gpu_of, make_shard
from rapidin_vdb.index.manifest import Manifest, Part, array_header, unreadable
from rapidin_vdb.index.source import ArraySource, FileSource, RowFile, RowSource
from rapidin_vdb.index.texts import Texts
from rapidin_vdb.machine import free_bytes
from rapidin_vdb.recipe import IndexRecipe, Residence

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Run:
    """Rows of neighbouring numbers that lie in one file."""

    file: RowFile
    """Where."""
    first: int
    """The number of the first."""
    shard: int
    """Which shard holds them."""


def load_keys(folder: Path, manifest: Manifest) -> Keys:
    """Return the keys of a built index.

    Raises:
        UnreadableIndexError: they cannot be read now.
        SpecError: its files are missing or do not fit the manifest.
    """
    place = folder / manifest.name
    with _told(manifest):
        parts = []
        for part in manifest.parts:
            row_ids, versions = _array(place / f"{part.name}.keys.npy", part.checksums["keys.npy"])
            # Ids are looked at for what is returned only.
            ends, content = (
                _array(place / f"{part.name}.{kind}", part.checksums[kind], mapped=True)
                for kind in ("ends.npy", "ids.npy")
            )
            sample_ids = Texts([(ends, content)])
            if not len(sample_ids) == len(row_ids) == part.count:
                raise ValueError("the number of rows differs from the manifest")
            parts.append(Keys(sample_ids, row_ids, versions, np.ones(part.count, bool)))
        keys = joined(parts)
        if manifest.gone is not None:
            keys.alive[_array(place / manifest.gone, int(manifest.gone.split("-")[1], 16))] = False
        if int(keys.alive.sum()) != manifest.samples:
            raise ValueError("the number of samples differs from the manifest")
    return keys


def _check(path: Path, checksum: int) -> None:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    if crc != checksum:
        raise ValueError(f"{path.name} is not what was written")


def _array(path: Path, checksum: int, *, mapped: bool = False) -> np.ndarray:
    """Return an array; one that is `mapped` stays on disk, unless it is small."""
    _check(path, checksum)
    far = mapped and path.stat().st_size > _BLOCK
    return np.load(path, mmap_mode="r" if far else None, allow_pickle=False)


def verify_rows(folder: Path, manifest: Manifest) -> None:
    """Read all files of an index, and compare them with their checksums.

    Raises:
        UnreadableIndexError: they cannot be read now.
        SpecError: one of them is missing, or is not what was written.
    """
    check_index(folder, manifest)
    with _told(manifest):
        for part in manifest.parts:
            for kind, checksum in part.checksums.items():
                _check(folder / manifest.name / f"{part.name}.{kind}", checksum)


def check_index(folder: Path, manifest: Manifest) -> None:
    """Look whether an index's files are there and fit its manifest; their rows are not read.

    Raises:
        UnreadableIndexError: they cannot be read now.
        SpecError: they are missing or do not fit.
    """
    load_keys(folder, manifest)
    with _told(manifest):
        for part in manifest.parts:
            _row_file(folder, manifest, part, "rows", manifest.width)
            if manifest.index_recipe.coarse_width:
                _row_file(folder, manifest, part, "coarse", manifest.index_recipe.coarse_width)


def load_index(folder: Path, manifest: Manifest) -> ShardedIndex:
    """Load a built index onto its devices; one that is mapped or streamed stays on disk.

    Raises:
        UnreadableIndexError: they cannot be read now.
        SpecError: its files are missing or do not fit the manifest.
    """
    recipe = manifest.index_recipe
    keys = load_keys(folder, manifest)
    with _told(manifest):
        inner = recipe.coarse_width or manifest.width
        kind = "coarse" if recipe.coarse_width else "rows"
        starts = np.cumsum([0, *(part.count for part in manifest.parts)])
        # Folded rows are the part that is held in memory.
        residence: Residence = "resident" if recipe.coarse_width else recipe.residence
        single = recipe.element_type == "float32"
        size = (4 if single else 2) * manifest.rows * inner
        here = all(gpu_of(device, recipe) is None for device in recipe.devices)
        if residence == "resident" and here and size > 0.8 * free_bytes("cpu"):
            logger.warning(
                "the index %s of %d MiB does not fit into memory: mapping its files", recipe.name, size >> 20
            )
            residence, single = "mapped", False
            # By our scan: half precision on a GPU may be torch's, which sees one where FAISS sees none.
            recipe = replace(recipe, element_type="float16", library="faiss")
        elif residence == "resident" and (single or not here):
            # FAISS copies them to where it wants them.
            residence = "mapped"
        shards, numbers = [], []
        runs = [
            _Run(_row_file(folder, manifest, part, kind, inner), int(first), part.shard)
            for part, first in zip(manifest.parts, starts, strict=False)
        ]
        devices = list(_devices(manifest, recipe))
        if _a_shard_a_core(recipe) and len(recipe.shard_devices) != len(devices):
            # Where it was built are more cores than here, or fewer.
            devices = list(recipe.shard_devices)
            runs = _dealt(runs, len(devices), inner)
        for shard, device in enumerate(devices):
            mine = [run for run in runs if run.shard == shard]
            source = _source([run.file for run in mine], residence, inner)
            shards.append(make_shard(device, source, recipe, width=inner))
            owned = [np.arange(run.first, run.first + run.file.count) for run in mine]
            numbers.append(np.concatenate([np.empty(0, np.int64), *owned]))
        full = None
        if recipe.coarse_width:
            files = [_row_file(folder, manifest, part, "rows", manifest.width) for part in manifest.parts]
            full = _source(files, "mapped" if recipe.residence == "resident" else recipe.residence, manifest.width)
    return ShardedIndex(
        recipe=recipe,
        width=manifest.width,
        keys=keys,
        shards=tuple(shards),
        numbers=tuple(numbers),
        largest_norm=manifest.largest_norm,
        full=full,
        parts=frozenset(part.name for part in manifest.parts),
    )


def _row_file(folder: Path, manifest: Manifest, part: Part, kind: str, width: int) -> RowFile:
    path = folder / manifest.name / f"{part.name}.{kind}.npy"
    wanted = array_header(part.count, width)
    with path.open("rb") as file:
        found = file.read(len(wanted))
    # Compared, not parsed: there is one way to write it.
    if found != wanted:
        raise ValueError(f"{path.name} is no array of float16 of {(part.count, width)}")
    offset = len(wanted)
    if path.stat().st_size != offset + 2 * part.count * width:
        raise ValueError(f"{path.name} is {path.stat().st_size} bytes long, not {offset + 2 * part.count * width}")
    return RowFile(path, offset, part.count)


def _source(files: list[RowFile], residence: Residence, width: int) -> RowSource:
    if residence == "streamed":
        return FileSource(files, width)
    if residence == "mapped":
        # For reading only: of a private mapping that could be written, the system wants all of it as memory.
        mapped = [np.memmap(file.path, np.uint16, "r", file.offset, (file.count, width)) for file in files]
        return ArraySource(mapped, width)
    source = ArraySource([], width)
    for file in files:
        rows = np.fromfile(file.path, np.uint16, file.count * width, offset=file.offset)
        source = source.added(rows.reshape(file.count, width))
    return source


@contextmanager
def _told(manifest: Manifest) -> Iterator[None]:
    """Turn what goes wrong in reading an index into an error of ours."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UnreadableIndexError(f"the index {manifest.name} cannot be loaded: {error}") from error
    except (OSError, ValueError, IndexError, EOFError, TypeError, KeyError) as error:
        if isinstance(error, OSError) and out_of_reach(error):
            raise unreadable(manifest.name, error) from error
        raise SpecError(
            f"the index {manifest.name} is damaged: {error}; build it anew with: rapidin-vdb index"
        ) from error


def _a_shard_a_core(recipe: IndexRecipe) -> bool:
    return not recipe.shards_per_device and set(recipe.devices) == {"cpu"}


def _dealt(runs: list[_Run], shards: int, width: int) -> list[_Run]:
    """Return rows cut into so many shards of equal length, the first ones longer by a row."""
    count = sum(run.file.count for run in runs)
    ends = [(shard + 1) * (count // shards) + min(shard + 1, count % shards) for shard in range(shards)]
    dealt, shard = [], 0
    for run in runs:
        done = 0
        while done < run.file.count:
            while run.first + done == ends[shard]:
                shard += 1
            taken = min(run.file.count - done, ends[shard] - run.first - done)
            piece = replace(run.file, offset=run.file.offset + 2 * width * done, count=taken)
            dealt.append(_Run(piece, run.first + done, shard))
            done += taken
    return dealt


def _devices(manifest: Manifest, recipe: IndexRecipe) -> Iterator[str]:
    """Yield a device for each shard; "one a core" may have meant another number of cores."""
    devices = recipe.shard_devices
    for shard in range(manifest.shards):
        yield devices[shard % len(devices)]
