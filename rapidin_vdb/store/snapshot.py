"""One committed version of the table `samples`, for reading."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rapidin_vdb.errors import FilterError, TableError
from rapidin_vdb.results import StoredSample
from rapidin_vdb.store.filters import checked_filter, ids_filter
from rapidin_vdb.store.fingerprint import read_fingerprint
from rapidin_vdb.store.rows import stored_sample

TABLE = "samples"
# Lance reads and writes fastest in batches of about this size.
BATCH_BYTES = 8 << 20
IDS_A_FILTER = 5000


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what Lance raises into an error of ours: a full disk, a missing file, a commit that lost a race."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, pa.ArrowException) as error:
        raise TableError(f"{what}: {first_line(error)}") from error


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
        # Lance counts versions down in the names of their manifests, so that the newest comes first.
        manifest = Path(self._place, f"{TABLE}.lance", "_versions", f"{2**64 - 1 - self.version}.manifest")
        if manifest.is_file():
            return hashlib.sha256(manifest.read_bytes()).hexdigest()
        (made,) = [entry for entry in self._table.list_versions() if entry["version"] == self.version]
        return hashlib.sha256(f"{self.version} {made['timestamp'].isoformat()}".encode()).hexdigest()

    def count(self, where: str | None = None) -> int:
        """Return how many samples there are, or how many a filter lets through.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return len(self.sample_ids(where)) if where is not None else int(self._table.count_rows())

    def sample_ids(self, where: str | None = None) -> list[str]:
        """Return the ids of all samples, or of those a filter lets through, in no particular order.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return self._select(["sample_id"], where)["sample_id"].to_pylist()

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

    def vectors(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield all sample ids and RapidGrads, in batches of [samples] and float16 [samples, width]."""
        width = self.fingerprint.sketch.width
        query = self._table.search().select(["sample_id", "vector"])
        with told(f"the vectors of {self._place} cannot be read"):
            for batch in query.to_batches(max(1, BATCH_BYTES // (2 * width))):
                if batch.num_rows:
                    vectors = batch.column("vector").flatten().to_numpy(zero_copy_only=False)
                    yield batch.column("sample_id").to_pylist(), vectors.reshape(-1, width)

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
