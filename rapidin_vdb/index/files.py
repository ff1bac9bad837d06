"""Built indexes on disk: a cache beside the table, each in a folder of its own with a manifest."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index.index import ShardedIndex
from rapidin_vdb.index.library import faiss, gpu_count
from rapidin_vdb.index.shard import Shard
from rapidin_vdb.recipe import IndexRecipe

_MANIFEST = "manifest.json"
_IDS = "sample_ids.json"
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """How a built index was made."""

    name: str
    """The recipe's name."""
    recipe: dict[str, Any]
    """The recipe."""
    table: str
    """Which table it indexes."""
    table_version: int
    """The table's version that it holds."""
    width: int
    """Length of a RapidGrad."""
    samples: int
    """How many rows it holds; their ids are in the file beside this one."""
    shards: tuple[str, ...]
    """The shards' files, in order."""
    largest_norm: float
    """No row is longer."""
    table_digest: str
    """What tells this version from any other, also from one of the same number in a copy of the table."""
    format: int = _FORMAT
    """Version of this layout."""

    @property
    def index_recipe(self) -> IndexRecipe:
        """The recipe, as a record."""
        return IndexRecipe(**self.recipe | {"devices": tuple(self.recipe["devices"])})


def save_index(index: ShardedIndex, folder: Path, *, table: str, table_version: int, table_digest: str) -> Manifest:
    """Write an index below `folder`, in the place of an older one of the same name; never half of it."""
    module = faiss()
    name = index.recipe.name
    temporary = folder / f".{name}.{uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        files = []
        for number, shard in enumerate(index.shards):
            files.append(f"shard_{number}.faiss")
            on_cpu = shard.index if shard.gpu is None else module.index_gpu_to_cpu(shard.index)
            module.write_index(on_cpu, str(temporary / files[-1]))
        (temporary / _IDS).write_text(json.dumps(index.sample_ids), "utf-8")
        manifest = Manifest(
            name=name,
            recipe=index.recipe.to_dict(),
            table=table,
            table_version=table_version,
            width=index.width,
            samples=len(index.sample_ids),
            shards=tuple(files),
            largest_norm=index.largest_norm,
            table_digest=table_digest,
        )
        # The manifest comes last: a folder without one is no index.
        (temporary / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
        target = folder / name
        if target.exists():
            target.rename(folder / f".{name}.{uuid4().hex}.old")
        temporary.rename(target)
    finally:
        for leftover in folder.glob(f".{name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return manifest


def list_manifests(folder: Path) -> list[Manifest]:
    """Return the manifests of the indexes below `folder` that can be read, by name."""
    found = []
    for path in sorted(folder.glob(f"[!.]*/{_MANIFEST}")):
        try:
            values = json.loads(path.read_text("utf-8"))
            if values.get("format") == _FORMAT:
                found.append(Manifest(**values | {"shards": tuple(values["shards"])}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # an index is a cache: one that cannot be read is as good as none
    return found


def load_index(folder: Path, manifest: Manifest) -> ShardedIndex:
    """Load a built index onto its devices.

    Raises:
        SpecError: its files are missing or do not fit the manifest.
    """
    module = faiss()
    place = folder / manifest.name
    recipe = manifest.index_recipe
    try:
        sample_ids = json.loads((place / _IDS).read_text("utf-8"))
        shards = []
        for device, name in zip(_devices(manifest, recipe), manifest.shards, strict=True):
            shard = Shard(device, width=manifest.width, element_type=recipe.element_type)
            loaded = module.read_index(str(place / name))
            if shard.gpu is None:
                shard.index = loaded
            elif loaded.ntotal:
                shard.add(loaded.reconstruct_n(0, loaded.ntotal))
            shards.append(shard)
        if sum(shard.rows for shard in shards) != len(sample_ids) or len(sample_ids) != manifest.samples:
            raise ValueError("the number of rows differs from the manifest")
        if any(shard.index.d != manifest.width for shard in shards):
            raise ValueError("the width differs from the manifest")
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(
            f"the index {manifest.name} is damaged: {error}; build it anew with: rapidin-vdb index"
        ) from error
    return ShardedIndex(
        recipe, width=manifest.width, sample_ids=sample_ids, shards=shards, largest_norm=manifest.largest_norm
    )


def _devices(manifest: Manifest, recipe: IndexRecipe) -> tuple[str, ...]:
    """Return a device for each shard file; "one a core" may have meant another number of cores."""
    devices = recipe.shard_devices
    if len(devices) == len(manifest.shards):
        return devices
    known = recipe.devices if gpu_count() else ("cpu",)
    return tuple(known[number % len(known)] for number in range(len(manifest.shards)))
