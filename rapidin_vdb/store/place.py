"""Where a database lies, and the way there: a folder, or a place in an object store."""

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lancedb
import pyarrow as pa
from filelock import FileLock

from rapidin_vdb.errors import TableError, without_secrets
from rapidin_vdb.store.durable import DurableLock
from rapidin_vdb.store.leftovers import remove_versions

LOCK = ".commit.lock"
CLOUDS = ("s3", "gs", "az")
# Stable row ids let an index see exactly what changed since its version.
STABLE = {"new_table_enable_stable_row_ids": "true"}
# Lance keeps up to 1 GiB of manifests and the like, and 6 GiB of scalar indices. Each commit leaves a manifest there as
# long as the table has commits: 1,200 of them fill the gibibyte, of which all but the last are of no use to us.
_METADATA_BYTES, _INDEX_BYTES = 64 << 20, 512 << 20


def connected(uri: str, **options: Any) -> Any:
    """Return a connection with caches of its own: another may be of a database that was made anew at the same place."""
    session = lancedb.Session(index_cache_size_bytes=_INDEX_BYTES, metadata_cache_size_bytes=_METADATA_BYTES)
    return lancedb.connect(uri, session=session, **options)


def as_lance(uri: str, version: int | None = None, options: dict[str, str] | None = None) -> Any:
    """Return a version of a table, the newest if none, as Lance knows it."""
    import lance

    return lance.dataset(
        uri, version=version, storage_options=options or None, metadata_cache_size_bytes=_METADATA_BYTES
    )


@runtime_checkable
class Place(Protocol):
    """Where a database lies; as text, its name."""

    uri: str
    """Its name, as it was given."""
    address: str
    """Where it is, whatever the working folder becomes: another process finds it there."""
    lock: Any
    """A context, held while committing by one writer at a time; may be entered again inside."""
    cache: Path
    """The folder for indexes."""
    cached: bool
    """Whether that folder is elsewhere than the database, and may grow to a limit only."""
    options: dict[str, str]
    """What Lance has to be told about the way there."""
    settings: dict[str, str]
    """Variables of the environment by which another machine finds it."""
    patience: float
    """For how many seconds a commit that failed is tried again."""

    def open_table(self, name: str) -> Any:
        """Return the newest version of a table, which stays that; its commit fails where the lock was lost."""
        ...

    def counting(self, name: str, version: int) -> int:
        """Return the version whose rows count where this is the newest of a table."""
        ...

    def create_table(self, name: str, schema: pa.Schema) -> None:
        """Make a table, in the place of what a process that died has left of one."""
        ...

    def dataset(self, name: str) -> Any:
        """Return a table as Lance knows it."""
        ...

    def remove_old(self, name: str, base: int) -> int:
        """Remove what only versions of a table before `base` need, the newest; called while committing.

        Return how many versions that leaves, where all could be removed.
        """
        ...

    def has_table(self, name: str) -> bool:
        """Say whether a table has a committed version; a process that died while making it leaves files without."""
        ...

    def entries(self) -> set[str] | None:
        """Return the names of what is there; None where there is no folder, or a file."""
        ...

    def prepare(self) -> None:
        """See that files can be written there, and that two writers cannot both win."""
        ...

    def manifest(self, name: str, version: int) -> bytes | None:
        """Return what Lance wrote of a version of a table; None where it is not kept under a name that we know."""
        ...

    def bytes(self) -> int:
        """Return how much all of it takes."""
        ...


class Folder:
    """A folder of this machine's file system."""

    cached = False
    patience = 0.0

    def __init__(self, path: str) -> None:
        self.uri = path
        # Once, and the same for Lance, which knows `~` too: where the working folder is changed, it is another.
        self._path = self.cache = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 (which fails for "~nobody")
        self.address = str(self._path)
        # Held for the moment of a commit only; the system lets go of it when a process dies.
        self.lock: Any = DurableLock(FileLock(self._path / LOCK), f"the database {path}", self._path)
        self.options: dict[str, str] = {}
        self.settings: dict[str, str] = {}
        self._made: Any = None

    def __str__(self) -> str:
        return self.uri

    @property
    def _connection(self) -> Any:
        if self._made is None:
            self._made = connected(self.address, read_consistency_interval=timedelta(0))
        return self._made

    def open_table(self, name: str) -> Any:
        """Return a table, always at its newest version: the lock cannot be lost."""
        try:
            return self._connection.open_table(name)
        except (OSError, RuntimeError, ValueError):
            self._check_newest(name)
            raise

    def _check_newest(self, name: str) -> None:
        """Raise a TableError that says what to do where the manifest of a table's newest version is empty."""
        # Names count down: the newest comes first.
        for path in sorted((self._path / f"{name}.lance" / "_versions").glob("*.manifest"))[:1]:
            if path.stat().st_size == 0:
                raise TableError(
                    f"{path} is empty, as a loss of power in the middle of a commit leaves it; that commit was never "
                    "said to be done. Move this file away, and the database is as it was before"
                )

    def counting(self, name: str, version: int) -> int:
        """Return the same version: nobody can come too late."""
        return version

    def create_table(self, name: str, schema: pa.Schema) -> None:
        """Make a table."""
        shutil.rmtree(self._path / f"{name}.lance", ignore_errors=True)
        self._connection.create_table(name, schema=schema, storage_options=STABLE)

    def dataset(self, name: str) -> Any:
        """Return a table as Lance knows it."""
        return as_lance(str(self._path / f"{name}.lance"))

    def remove_old(self, name: str, base: int) -> int:
        """Remove what a table's newest version does not need, and return how many versions that leaves."""
        # Nobody else is writing: what no version names was left by who died.
        remove_versions(self.dataset(name), unnamed=True)
        return 1

    def has_table(self, name: str) -> bool:
        """Say whether a table has a committed version."""
        try:
            # Not `glob`, which reads all of a folder that has a file for every commit.
            with os.scandir(self._path / f"{name}.lance" / "_versions") as entries:
                return any(entry.name.endswith(".manifest") for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def entries(self) -> set[str] | None:
        """Return the names of what is in the folder."""
        if self._path.is_dir():
            return {path.name for path in self._path.iterdir()}
        return None if self._path.is_file() else set()

    def prepare(self) -> None:
        """Make the folder."""
        self._path.mkdir(parents=True, exist_ok=True)

    def manifest(self, name: str, version: int) -> bytes | None:
        """Return what Lance wrote of a version of a table."""
        try:
            return (self._path / f"{name}.lance" / "_versions" / manifest_name(version)).read_bytes()
        except FileNotFoundError:
            return None  # or no longer: a purge may be going on

    def bytes(self) -> int:
        """Return how much all files take."""
        return size_of(self.address)


def size_of(place: str) -> int:
    """Return how many bytes the files below a folder have; those that somebody takes away meanwhile have none."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            path = Path(folder, name)
            try:
                total += 0 if path.is_symlink() else path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def manifest_name(version: int) -> str:
    """Return the name of a version's manifest: Lance counts down in it, so that the newest comes first."""
    return f"{2**64 - 1 - version}.manifest"


def place_of(uri: str) -> Place:
    """Return the place that a path or a URI names: `file://`, or one of the object stores `s3://`, `gs://`, `az://`.

    Raises:
        TableError: it is none of these, or holds what may be a secret.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        lost, slash, rest = uri.partition(":/")
        if slash and lost in CLOUDS:
            raise TableError(
                f"{without_secrets(uri)}: an address loses a slash as a Path; give it as a text, '{lost}://...'"
            )
        return Folder(uri)
    if scheme == "file":
        return Folder(rest)
    if scheme not in CLOUDS:
        raise TableError(
            f"{without_secrets(uri)}: databases on {scheme}:// are not supported; give a folder, or a URI of "
            + ", ".join(f"{cloud}://" for cloud in CLOUDS)
        )
    # Here: a database in a folder needs none of it.
    from rapidin_vdb.store.bucket import Bucket

    return Bucket(uri)
