"""One committed version of the table `samples`, for reading."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Int64

from rapidin_vdb.errors import FilterError, TableError
from rapidin_vdb.records import Scalar
from rapidin_vdb.results import StoredSample
from rapidin_vdb.store.filters import checked_filter, ids_filter
from rapidin_vdb.store.fingerprint import read_fingerprint
from rapidin_vdb.store.rows import stored_sample

TABLE = "samples"
# Lance reads and writes fastest in batches of about this size.
BATCH_BYTES = 8 << 20
IDS_A_FILTER = 5000
_ROW_ID = "_rowid"
_CHANGED = "_row_last_updated_at_version"


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what Lance raises into an error of ours: a full disk, a missing file, a commit that lost a race."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, pa.ArrowException) as error:
        raise TableError(f"{what}: {first_line(error)}") from error


@dataclass(frozen=True, eq=False)
class VectorBatch:
    """Some rows' RapidGrads."""

    sample_ids: list[str]
    """Their samples."""
    row_ids: Int64[np.ndarray, " samples"]
    """Their row ids."""
    versions: Int64[np.ndarray, " samples"]
    """The version in which each came to be what it is."""
    vectors: Float16[np.ndarray, "samples sketch"]
    """Their RapidGrads."""


class Snapshot:
    """One committed version of the table; what others write meanwhile is not seen."""

    def __init__(self, table: Any, place: str) -> None:
        self._table = table
        self._place = place
        self.version: int = table.version
        schema = table.schema
        self.fingerprint = read_fingerprint(schema.metadata, place=place)
        self.schema: pa.Schema = schema

    @property
    def digest(self) -> str:
        """What tells this version from all others, also from one of the same number in a copy of the table."""
        found = self.digest_of(self.version)
        assert found is not None
        return found

    def digest_of(self, version: int) -> str | None:
        """Return the digest of another version of this table; None where it is no longer kept."""
        # Lance counts versions down in the names of their manifests, so that the newest comes first.
        manifest = Path(self._place, f"{TABLE}.lance", "_versions", f"{2**64 - 1 - version}.manifest")
        if manifest.is_file():
            return hashlib.sha256(manifest.read_bytes()).hexdigest()
        made = [entry for entry in self._table.list_versions() if entry["version"] == version]
        if not made:
            return None
        return hashlib.sha256(f"{version} {made[0]['timestamp'].isoformat()}".encode()).hexdigest()

    def count(self, where: str | None = None) -> int:
        """Return how many samples there are, or how many a filter lets through.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return len(self.row_ids(where)) if where is not None else int(self._table.count_rows())

    def sample_ids(self, where: str | None = None) -> list[str]:
        """Return the ids of all samples, or of those a filter lets through, in no particular order.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return self._select(["sample_id"], where)["sample_id"].to_pylist()

    def row_ids(self, where: str) -> Int64[np.ndarray, " matching"]:
        """Return the row ids of the samples a filter lets through, in no particular order.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return _int64(self._select([_ROW_ID], where)[_ROW_ID])

    def row_keys(self) -> tuple[Int64[np.ndarray, " samples"], Int64[np.ndarray, " samples"]]:
        """Return the row id of every sample, and the version in which it came to be what it is.

        A row keeps its id when it is replaced. Together they tell which rows two versions share.
        """
        table = self._select([_ROW_ID, _CHANGED], None)
        return _int64(table[_ROW_ID]), _int64(table[_CHANGED])

    def keys_in_order(self) -> tuple[list[str], Int64[np.ndarray, " samples"], Int64[np.ndarray, " samples"]]:
        """Return every sample's id, row id, and the version in which it came to be, in the order of `vectors`."""
        table = self._select(["sample_id", _ROW_ID, _CHANGED], None)
        return table["sample_id"].to_pylist(), _int64(table[_ROW_ID]), _int64(table[_CHANGED])

    def group_of(self, column: str) -> tuple[Int64[np.ndarray, " samples"], list[Scalar]]:
        """Return the row id of every sample and its value in a column.

        Raises:
            FilterError: there is no such column, or it holds no plain values.
        """
        known = {field.name.lower(): field.name for field in self.schema if not pa.types.is_nested(field.type)}
        name = known.get(column.lower())
        if name is None or name == "content_hash":
            raise FilterError(f"no column {column!r} to group by. Columns are: {', '.join(self.columns)}")
        table = self._select([_ROW_ID, name], None)
        return _int64(table[_ROW_ID]), table[name].to_pylist()

    def content_hashes(self) -> dict[str, str]:
        """Return the content hash of every sample, by id."""
        table = self._select(["sample_id", "content_hash"], None)
        return dict(zip(table["sample_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))

    def total_tokens(self) -> int:
        """Return the number of response tokens of all samples."""
        return int(np.sum(self._select(["tokens"], None)["tokens"].to_numpy(), dtype=np.int64))

    def samples(self, sample_ids: Sequence[str]) -> dict[str, StoredSample]:
        """Return samples by id, without their vectors; unknown ids are left out."""
        columns = [name for name in self.schema.names if name not in ("vector", "input_ids", "content_hash")]
        found: dict[str, StoredSample] = {}
        # Sorted: a row far from the last one costs a read of its own.
        for batch in batches(sorted(set(sample_ids)), IDS_A_FILTER):
            rows = self._select(columns, ids_filter(batch)).to_pylist()
            found |= {row["sample_id"]: stored_sample(row) for row in rows}
        return found

    def vectors(self, row_ids: Int64[np.ndarray, " wanted"] | None = None) -> Iterator[VectorBatch]:
        """Yield the RapidGrads of all samples, in the table's order, or of some rows, in any order."""
        width = self.fingerprint.sketch.width
        size = max(1, BATCH_BYTES // (2 * width))
        columns = ["sample_id", "vector", _ROW_ID, _CHANGED]
        with told(f"the vectors of {self._place} cannot be read"):
            # Rows taken one by one cost several times what they cost in a scan.
            if row_ids is None or 4 * len(row_ids) > int(self._table.count_rows()):
                for batch in self._table.search().select(columns).to_batches(size):
                    if batch.num_rows and (found := _vector_batch(batch, width, row_ids)) is not None:
                        yield found
                return
            for first in range(0, len(row_ids), size):
                part = np.sort(row_ids[first : first + size]).tolist()
                for batch in self._table.take_row_ids(part).select(columns).to_arrow().to_batches():
                    found = _vector_batch(batch, width, None)
                    assert found is not None
                    yield found

    def _select(self, columns: list[str], where: str | None) -> pa.Table:
        query = self._table.search().select(columns)
        if where is None:
            with told(f"the table of {self._place} cannot be read"):
                return query.to_arrow()
        expression = checked_filter(where)
        try:
            return query.where(expression).to_arrow()
        except Exception as error:  # lancedb raises ValueError, RuntimeError or OSError, as its planner pleases
            if not isinstance(error, ValueError | RuntimeError | OSError | TypeError):
                raise
            raise FilterError(
                f"the filter {where!r} is not understood: {first_line(error)}. Columns are: {', '.join(self.columns)}"
            ) from error

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a filter may use, with their types."""
        return tuple(
            f"{field.name} ({field.type})"
            for field in self.schema
            if field.name not in ("vector", "input_ids", "token_offsets", "content_hash")
        )


def _int64(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64)


def _vector_batch(batch: pa.RecordBatch, width: int, row_ids: np.ndarray | None) -> VectorBatch | None:
    """Return a batch's vectors, or those of some rows; None where it has none of them."""
    found = batch.column(_ROW_ID).to_numpy().astype(np.int64)
    if row_ids is not None:
        mine = np.isin(found, row_ids)
        if not mine.any():
            return None
        batch, found = batch.filter(pa.array(mine)), found[mine]
    # Not `flatten`, which copies; and the batch may be a slice of its buffers.
    column = batch.column("vector")
    flat = column.values.slice(column.offset * width, len(column) * width)
    return VectorBatch(
        batch.column("sample_id").to_pylist(),
        found,
        batch.column(_CHANGED).to_numpy().astype(np.int64),
        flat.to_numpy(zero_copy_only=False).reshape(-1, width),
    )


def batches(values: list[str], size: int) -> Iterator[list[str]]:
    """Yield runs of at most `size` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def first_line(error: BaseException) -> str:
    """Return what Lance says, without the place in its source where it says so."""
    text = " ".join(str(error).split())
    # Lance ends its messages with the place in its own source.
    for mark in (", /root/", ", /home/", ", rust/", " Rust backtrace", ", C:\\"):
        text = text.split(mark)[0]
    return text[:300]
