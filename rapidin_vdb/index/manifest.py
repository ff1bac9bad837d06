"""What a built index holds: a cache beside the table, each in a folder of its own with a manifest.

A folder holds parts: rows as a plain array of float16, their keys, their ids one behind the other with where each ends,
and the folded rows where the recipe is coarse. What came into the table later is a further part, what left it a list of
numbers; the manifest says which files count, and is replaced as a whole.
"""

import io
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rapidin_vdb.errors import SpecError, UnreadableIndexError, out_of_reach
from rapidin_vdb.recipe import IndexRecipe

MANIFEST = "manifest.json"
LOCK = ".lock"
_FORMAT = 5
_NAME = re.compile(r"[0-9a-f]{32}|gone-[0-9a-f]{8}-[0-9a-f]{32}\.npy")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that came into an index together."""

    name: str
    """Beginning of its files' names."""
    count: int
    """How many rows."""
    shard: int
    """Which shard holds them."""
    checksums: dict[str, int]
    """The CRC of each of its files, by the end of the file's name."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a built index holds, and how it was made."""

    name: str
    """The recipe's name."""
    recipe: dict[str, Any]
    """The recipe."""
    table: str
    """Which table it indexes."""
    table_version: int
    """The table's version that it holds."""
    table_digest: str
    """What tells this version from any other, also from one of the same number in a copy of the table."""
    width: int
    """Length of a RapidGrad."""
    samples: int
    """How many samples it holds."""
    shards: int
    """Into how many shards its rows are dealt."""
    parts: tuple[Part, ...]
    """Its rows, in the order of their numbers."""
    gone: str | None
    """The file of the numbers that the table no longer has."""
    largest_norm: float
    """No row is longer."""
    recall: dict[str, Any] | None = None
    """What a coarse search was measured to find, as `measured_recall` says it; None for an exact one.

    In what was written before it was measured, `recall_harmful` is missing.
    """
    format: int = _FORMAT
    """Version of this layout."""

    @property
    def index_recipe(self) -> IndexRecipe:
        """The recipe, as a record."""
        return IndexRecipe(**self.recipe | {"devices": tuple(self.recipe["devices"])})

    @property
    def rows(self) -> int:
        """How many rows its files hold, those too that the table no longer has."""
        return sum(part.count for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Which version of which table an index holds."""

    table: str
    """Its name."""
    version: int
    """Its version."""
    digest: str
    """What tells this version from all others."""
    width: int
    """Length of a RapidGrad."""


def array_header(count: int, width: int) -> bytes:
    """Return what a file of so many rows begins with, as numpy writes it."""
    buffer = io.BytesIO()
    header: dict[str, Any] = {"descr": "<f2", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def checksum_of(values: dict[str, Any]) -> int:
    """Return the checksum of a manifest's values."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode("utf-8"))


def _is_of_its_kinds(manifest: Manifest) -> bool:
    """Say whether the values of a manifest are what they should be; the checksum does not say who wrote it."""
    texts = [manifest.name, manifest.table, manifest.table_digest, *(part.name for part in manifest.parts)]
    counts = [manifest.table_version, manifest.width, manifest.samples, manifest.shards]
    counts += [part.count for part in manifest.parts]
    sums = [value for part in manifest.parts for value in part.checksums.values()]
    return (
        all(isinstance(text, str) for text in (*texts, *([] if manifest.gone is None else [manifest.gone])))
        and all(type(count) is int and count >= 0 for count in (*counts, *sums))
        and all(type(part.shard) is int and 0 <= part.shard < manifest.shards for part in manifest.parts)
        and type(manifest.largest_norm) in (int, float)
        and isinstance(manifest.recall, dict | None)
    )


def _stays_inside(manifest: Manifest) -> bool:
    """Say whether all files that a manifest names lie beside it."""
    names = [part.name for part in manifest.parts] + ([] if manifest.gone is None else [manifest.gone])
    return all(_NAME.fullmatch(name) for name in names) and all(
        kind in ("rows.npy", "coarse.npy", "keys.npy", "ids.npy", "ends.npy")
        for part in manifest.parts
        for kind in part.checksums
    )


def list_manifests(folder: Path) -> list[Manifest]:
    """Return the manifests of the indexes below `folder` that can be read, by name."""
    found = (readable_manifest(folder, path.parent.name) for path in sorted(folder.glob(f"[!.]*/{MANIFEST}")))
    return [manifest for manifest in found if manifest is not None]


def readable_manifest(folder: Path, name: str) -> Manifest | None:
    """Return the manifest of an index; None where there is none that can be read now."""
    try:
        return manifest_of(folder, name)
    except UnreadableIndexError:
        return None  # for now it is as good as none


def manifest_of(folder: Path, name: str) -> Manifest | None:
    """Return the manifest of an index; None where there is none, or none that counts.

    Raises:
        UnreadableIndexError: nobody can say now whether there is one.
    """
    try:
        values = json.loads((folder / name / MANIFEST).read_text("utf-8"))
        if values.pop("checksum", None) != checksum_of(values) or values.get("format") != _FORMAT:
            return None
        parts = tuple(Part(**part) for part in values["parts"])
        manifest = Manifest(**values | {"parts": parts})
        fits = _is_of_its_kinds(manifest) and name == manifest.name == manifest.index_recipe.name
        return manifest if fits and _stays_inside(manifest) else None
    except OSError as error:
        if out_of_reach(error):
            raise unreadable(name, error) from error
    # RecursionError: lists of thousands of lists.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SpecError):
        pass  # an index is a cache: one that cannot be read is as good as none
    return None


def unreadable(name: str, error: OSError) -> UnreadableIndexError:
    """Return the error that the system does not let an index be read."""
    return UnreadableIndexError(
        f"the index {name} cannot be read: {error}; its files may be whole, and stay: see to that, or remove them, and "
        "build it anew with: rapidin-vdb index"
    )


def index_folders(folder: Path) -> list[str]:
    """Return the names of the folders below `folder` in which there is anything, be it an index or not."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path.name for path in inside if path.is_dir() and (path.is_symlink() or _holds_anything(path))]


def _holds_anything(place: Path) -> bool:
    try:
        return bool(contents(place))
    except PermissionError:
        return True  # whoever goes on with it will be told


def contents(place: Path) -> list[Path]:
    """Return what lies in an index's folder, but for its lock."""
    return [path for path in place.iterdir() if path.name != LOCK]
