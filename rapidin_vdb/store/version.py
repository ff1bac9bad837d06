"""One committed version of a table of RapidGrads, for reading."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float16, Int64

from rapidin_vdb.errors import FilterError, PurgedError, TableError, is_unicode
from rapidin_vdb.store.filters import understood
from rapidin_vdb.store.place import Place
from rapidin_vdb.store.row_ids import ROW_ID, among, ascending, int64
from rapidin_vdb.store.rows import OWN_NAMES, PLACES, ColumnKind, column_kind
from rapidin_vdb.store.telling import told

# Lance reads and writes fastest in batches of about this size.
BATCH_BYTES = 8 << 20
IDS_A_FILTER = 5000
_CONTENTS_A_BATCH = 1 << 14
_CHANGED = "_row_last_updated_at_version"
# A purge takes away the files of a version before it takes away the version.
_PURGE_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class VectorBatch:
    """Some rows' RapidGrads."""

    keys: list[str]
    """Their samples, or tokens."""
    row_ids: Int64[np.ndarray, " samples"]
    """Their row ids."""
    versions: Int64[np.ndarray, " samples"]
    """The version in which each came to be what it is."""
    vectors: Float16[np.ndarray, "samples sketch"]
    """Their RapidGrads."""


class TableVersion:
    """One committed version of a table; what others write meanwhile is not seen."""

    KEY: tuple[str, ...] = ("sample_id",)
    """The columns that name a row."""
    PLAIN: tuple[str, ...] = ()
    """The columns that every row's checksum covers, besides the vector."""

    def __init__(self, table: Any, place: Place, name: str) -> None:
        self._table = table
        self._place = place
        self.name = name
        """The table's."""
        with told(f"the table {name} of {place} cannot be read"):
            self.version: int = table.version
            self.schema: pa.Schema = table.schema
        vector = self.schema.field("vector").type if "vector" in self.schema.names else None
        if vector is None or not pa.types.is_fixed_size_list(vector) or vector.value_type != pa.float16():
            raise TableError(f"the table {name} of {place} is damaged: it has no column of RapidGrads")
        self.width: int = vector.list_size
        """Length of its RapidGrads."""

    @property
    def place(self) -> Place:
        """Where the database lies."""
        return self._place

    @property
    def digest(self) -> str:
        """What tells this version from all others, also from one of the same number in a copy of the table."""
        found = self.digest_of(self.version)
        if found is None:
            raise self._purged()
        return found

    def check_kept(self) -> None:
        """See to it that this version is still there.

        Raises:
            PurgedError: a purge removed it.
        """
        _ = self.digest

    def _purged(self) -> PurgedError:
        return PurgedError(
            f"version {self.version} of the table {self.name} of {self._place} is gone: a purge removed it while it "
            "was being read; run the same command again"
        )

    def _is_purged(self) -> bool:
        """Say, after an error, whether a purge is its cause."""
        until = time.monotonic() + _PURGE_SECONDS
        try:
            while self.digest_of(self.version) is not None:
                if self._place.open_table(self.name).version == self.version or time.monotonic() > until:
                    return False
                time.sleep(0.05)
        except (ValueError, RuntimeError, OSError, TableError):
            return False
        return True

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turn what Lance raises into an error of ours, which says so where a purge is its cause."""
        try:
            with told(what):
                yield
        except TableError as error:
            if not isinstance(error, PurgedError | FilterError) and self._is_purged():
                raise self._purged() from error
            raise

    def digest_of(self, version: int) -> str | None:
        """Return the digest of another version of this table; None where it is no longer kept."""
        with told(f"the versions of {self._place} cannot be read"):
            manifest = self._place.manifest(self.name, version)
            if manifest is not None:
                return hashlib.sha256(manifest).hexdigest()
            # All of a table are named alike, and a list of its versions reads every manifest.
            if self._place.manifest(self.name, self.version) is not None:
                return None
            made = [entry for entry in self._table.list_versions() if entry["version"] == version]
        if not made:
            return None
        return hashlib.sha256(f"{version} {made[0]['timestamp'].isoformat()}".encode()).hexdigest()

    def each_content(self, of: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
        """Yield sample id and content hash of every row, or of those of some samples, without holding them all."""
        # A text with half of a surrogate pair is the id of no sample.
        wanted = None if of is None else pa.array([name for name in of if is_unicode(name)], pa.string())
        for batch in self._scan(["sample_id", "content_hash"], _CONTENTS_A_BATCH):
            if wanted is not None:
                batch = batch.filter(pc.is_in(batch.column("sample_id"), wanted))
            yield from self._contents(batch)

    def _contents(self, batch: pa.RecordBatch) -> Iterator[tuple[str, str]]:
        """Return sample id and content hash of a batch's rows."""
        columns = (batch.column(name).to_pylist() for name in ("sample_id", "content_hash"))
        return zip(*columns, strict=True)

    def changed_since(self, version: int) -> Iterator[pa.RecordBatch]:
        """Yield sample id and row id of the rows that came, or were replaced, since another version of this table.

        Lance knows of each row when it came to be what it is: of the others nothing is read.
        """
        return self._scan(["sample_id", ROW_ID], _CONTENTS_A_BATCH, f"{_CHANGED} > {version}", ours=True)

    def rows(self) -> int:
        """Return how many rows there are."""
        with self._reading(f"the table {self.name} of {self._place} cannot be read"):
            return int(self._table.count_rows())

    def row_keys(self) -> tuple[Int64[np.ndarray, " samples"], Int64[np.ndarray, " samples"]]:
        """Return the row id of every sample, and the version in which it came to be what it is.

        A row keeps its id when it is replaced. Together they tell which rows two versions share.
        """
        table = self._select([ROW_ID, _CHANGED], None)
        return int64(table[ROW_ID]), int64(table[_CHANGED])

    def keys_in_order(self) -> tuple[list[str], Int64[np.ndarray, " samples"], Int64[np.ndarray, " samples"]]:
        """Return every row's key, row id, and the version in which it came to be, in the order of `vectors`."""
        table = self._select([*self.KEY, ROW_ID, _CHANGED], None)
        return self._keys(table), int64(table[ROW_ID]), int64(table[_CHANGED])

    def vectors(self, row_ids: Int64[np.ndarray, " wanted"] | None = None) -> Iterator[VectorBatch]:
        """Yield the RapidGrads of all samples, in the table's order, or of some rows, in any order."""
        if row_ids is None:
            yield from self.scanned()
            return
        row_ids = np.sort(row_ids)
        # Rows taken one by one cost several times what they cost in a scan.
        if 4 * len(row_ids) > self.rows():
            yield from self.scanned(lambda found: among(found, row_ids))
        else:
            yield from self.taken(row_ids)

    def scanned(self, mine: Callable[[np.ndarray], np.ndarray] | None = None) -> Iterator[VectorBatch]:
        """Yield the RapidGrads of all rows, or of those that `mine` picks by row id, in the table's order."""
        size = max(1, BATCH_BYTES // (2 * self.width))
        with self._reading(f"the vectors of {self._place} cannot be read"):
            for batch in self._table.search().select(self._vector_columns).to_batches(size):
                picked = None if mine is None else mine(batch.column(ROW_ID).to_numpy().astype(np.int64))
                if picked is not None and not picked.all():
                    batch = batch.filter(pa.array(picked))
                if batch.num_rows:
                    yield self._vector_batch(batch)

    def taken(self, row_ids: Int64[np.ndarray, " wanted"]) -> Iterator[VectorBatch]:
        """Yield the RapidGrads of some rows, whose ids are given and come in ascending order."""
        size = max(1, BATCH_BYTES // (2 * self.width))
        with self._reading(f"the vectors of {self._place} cannot be read"):
            for first in range(0, len(row_ids), size):
                part = row_ids[first : first + size].tolist()
                table = self._table.take_row_ids(part).select(self._vector_columns).to_arrow()
                for batch in ascending(table).to_batches():
                    yield self._vector_batch(batch)

    @property
    def _vector_columns(self) -> list[str]:
        return [*self.KEY, "vector", ROW_ID, _CHANGED]

    def whole_rows(self) -> Iterator[tuple[dict[str, Any], np.ndarray, int | None]]:
        """Yield every row, its RapidGrad, and what its checksum should be; None where the table has no checksums.

        Raises:
            TableError: the table cannot be read.
        """
        summed = "checksum" in self.schema.names
        columns = [*self.PLAIN, *self._further(), "vector", *(["checksum"] if summed else [])]
        size = max(1, BATCH_BYTES // (2 * self.width))
        for batch in self._scan(columns, size):
            vectors = self._vectors_of(batch)
            rows = batch.drop_columns(["vector"]).to_pylist()
            for row, vector in zip(rows, vectors, strict=True):
                yield row, vector, self._checksum(row, vector) if summed else None

    def _checksum(self, row: dict[str, Any], vector: np.ndarray) -> int:
        """Return what the checksum of a row should be."""
        raise NotImplementedError

    def _further(self) -> list[str]:
        """Return the columns of records' fields."""
        return []

    def _keys(self, rows: Any) -> list[str]:
        """Return what names each row of a table or batch."""
        return rows.column("sample_id").to_pylist()

    def _vector_batch(self, batch: pa.RecordBatch) -> VectorBatch:
        """Return a batch's vectors, with what names their rows."""
        return VectorBatch(
            self._keys(batch),
            batch.column(ROW_ID).to_numpy().astype(np.int64),
            batch.column(_CHANGED).to_numpy().astype(np.int64),
            self._vectors_of(batch),
        )

    def _vectors_of(self, batch: pa.RecordBatch) -> Float16[np.ndarray, "rows sketch"]:
        # Not `flatten`, which copies; and the batch may be a slice of its buffers.
        column = batch.column("vector")
        flat = column.values.slice(column.offset * self.width, len(column) * self.width)
        return flat.to_numpy(zero_copy_only=False).reshape(-1, self.width)

    def _select(
        self, columns: list[str], where: str | None, page: slice | None = None, *, ours: bool = False
    ) -> pa.Table:
        """Return columns of the rows that a filter lets through; `ours` says that it is none that a user gave."""
        query = self._table.search().select(columns)
        if page is not None:
            query = query.offset(page.start).limit(page.stop - page.start)
        with self._reading(f"the table {self.name} of {self._place} cannot be read"):
            if where is None or ours:
                return (query if where is None else query.where(where)).to_arrow()
            with understood(where, self.columns) as expression:
                return query.where(expression).to_arrow()

    def _scan(
        self, columns: list[str], size: int, where: str | None = None, *, ours: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns as `_select` does, in the table's order, some rows at a time."""
        query = self._table.search().select(columns)
        with self._reading(f"the table {self.name} of {self._place} cannot be read"):
            if where is None or ours:
                yield from (query if where is None else query.where(where)).to_batches(size)
                return
            with understood(where, self.columns) as expression:
                yield from query.where(expression).to_batches(size)

    @property
    def column_kinds(self) -> dict[str, ColumnKind | None]:
        """What the columns of records' own fields hold, by name in lower case."""
        return {field.name.lower(): column_kind(field) for field in self.schema if field.name not in OWN_NAMES}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a filter may use, with their types."""
        return tuple(
            f"{field.name} ({field.type})"
            for field in self.schema
            if field.name not in ("vector", "input_ids", "token_offsets", "content_hash", "checksum", PLACES)
        )


def batches(values: list[str], size: int) -> Iterator[list[str]]:
    """Yield runs of at most `size` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
