"""One committed version of the table `samples`, for reading."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Int64

from rapidin_vdb.errors import FilterError, is_unicode
from rapidin_vdb.records import Encoded, Scalar
from rapidin_vdb.results import KeptVersion, StoredSample
from rapidin_vdb.store.commits import word_for
from rapidin_vdb.store.filters import ids_filter
from rapidin_vdb.store.fingerprint import read_fingerprint, read_identity
from rapidin_vdb.store.owners import named
from rapidin_vdb.store.place import Place
from rapidin_vdb.store.row_ids import ROW_ID, int64
from rapidin_vdb.store.rows import OWN_NAMES, PLACES, stored_checksum, stored_sample
from rapidin_vdb.store.version import IDS_A_FILTER, TableVersion, batches

SAMPLES = "samples"
_NEVER_SHOWN = frozenset({"vector", "input_ids", "content_hash", "checksum", PLACES})
_SAMPLES_A_BATCH = 1000
_COUNTS_A_BATCH = 1 << 14
# So many deletions are looked at for samples that come back; each takes the row ids of two versions.
_DELETIONS = 32
# Where they are only told of, they are looked for among so many versions. Each names all files of the table: after
# ten thousand commits, in a million bytes.
_LATELY = 512


class Snapshot(TableVersion):
    """One committed version of the table of samples."""

    PLAIN = (
        "sample_id", "split", "source", "prompt", "response", "input_ids", "token_offsets", "tokens", "truncated",
        "loss", "content_hash",
    )  # fmt: skip

    def __init__(self, table: Any, place: Place) -> None:
        super().__init__(table, place, SAMPLES)
        self.fingerprint = read_fingerprint(self.schema.metadata, place=str(place))

    @property
    def identity(self) -> str:
        """What tells its database from others, also from one that was made anew at its place."""
        return read_identity(self.schema.metadata, place=self._place.uri)

    def history(self) -> list[KeptVersion]:
        """Return the versions that are kept and hold any sample, oldest first."""
        with self._reading(f"the versions of {self._place} cannot be read"):
            entries = sorted(self._table.list_versions(), key=lambda entry: int(entry["version"]))
            dataset = self._place.dataset(self.name)
            return [
                KeptVersion(
                    version=int(entry["version"]),
                    made=entry["timestamp"].astimezone(),
                    samples=int(entry["metadata"]["total_rows"]),
                    made_by=word_for(dataset.read_transaction(int(entry["version"]))),
                )
                for entry in entries
                if int(entry["metadata"]["total_rows"])
            ]

    def deletions(self, *, lately: bool = False) -> list[tuple[int, int]]:
        """Return the versions before and after each of the last deletions, oldest first, as far as both are kept.

        Versions are looked at from this one on backwards, until the last 32 deletions are found; with `lately`, 512 of
        them at most. Of deletions one behind the other, as many ids make them, the first and the last version are
        enough.
        """
        with self._reading(f"the versions of {self._place} cannot be read"):
            dataset = self._place.dataset(self.name)
            runs: list[tuple[int, int]] = []
            has = self.rows()
            for after in range(self.version, max(1, self.version - _LATELY) if lately else 1, -1):
                follows = bool(runs) and runs[-1][0] == after
                had = None if len(runs) == _DELETIONS and not follows else self._rows_at(dataset, after - 1)
                if had is None:
                    break
                # Nor what a fence took back: that was never there for anybody.
                if has < had and word_for(dataset.read_transaction(after)) == "delete":
                    if follows:
                        runs[-1] = after - 1, runs[-1][1]
                    else:
                        runs.append((after - 1, after))
                has = had
            return runs[::-1]

    def _rows_at(self, dataset: Any, version: int) -> int | None:
        """Return how many rows another version has; None where it is no longer kept."""
        try:
            return int(dataset.checkout_version(version).count_rows())
        except (ValueError, RuntimeError, OSError):
            if self._place.manifest(self.name, version) is not None:
                raise
            return None

    def ids_of_rows(self, row_ids: Int64[np.ndarray, " some"]) -> list[str]:
        """Return the ids of the samples in some rows."""
        return [str(name) for name in self._taken(row_ids, "sample_id")["sample_id"].to_pylist()]

    def contents_of(self, row_ids: Int64[np.ndarray, " some"]) -> Iterator[tuple[str, str]]:
        """Return id and content hash of the samples in some rows; those that are not there are passed over."""
        rows = self._taken(row_ids, "sample_id", "content_hash")
        return zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True)

    def _taken(self, row_ids: Int64[np.ndarray, " some"], *columns: str) -> pa.Table:
        """Return columns of some rows, in no particular order."""
        with self._reading(f"the table {self.name} of {self._place} cannot be read"):
            return self._table.take_row_ids(row_ids.tolist()).select(list(columns)).to_arrow()

    def count(self, where: str | None = None) -> int:
        """Return how many samples there are, or how many a filter lets through.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return len(self.row_ids(where)) if where is not None else self.rows()

    def row_ids(self, where: str) -> Int64[np.ndarray, " matching"]:
        """Return the row ids of the samples a filter lets through, in no particular order.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return int64(self._select([ROW_ID], where)[ROW_ID])

    def group_of(self, column: str) -> tuple[Int64[np.ndarray, " samples"], list[Scalar]]:
        """Return the row id of every sample and its value in a column.

        Raises:
            FilterError: there is no such column, or it holds no plain values.
        """
        name = self.group_column(column)
        table = self._select([ROW_ID, name], None)
        return int64(table[ROW_ID]), table[name].to_pylist()

    def group_column(self, column: str) -> str:
        """Return the name of a column by whose values samples can be grouped; upper and lower case are one.

        Raises:
            FilterError: there is no such column, or it holds no plain values.
        """
        known = {field.name.lower(): field.name for field in self.schema if not pa.types.is_nested(field.type)}
        name = known.get(column.lower())
        if name is None or name in ("content_hash", "checksum"):
            raise FilterError(f"no column {column!r} to group by. Columns are: {', '.join(self.columns)}")
        return name

    def contents(self, where: str | None = None) -> pa.ChunkedArray:
        """Return what names every sample and its content, or those of what a filter lets through.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return named(self._select(["sample_id", "content_hash"], where))

    def total_tokens(self) -> int:
        """Return the number of response tokens of all samples."""
        return int(np.sum(self._select(["tokens"], None)["tokens"].to_numpy(), dtype=np.int64))

    def samples(self, sample_ids: Sequence[str]) -> dict[str, StoredSample]:
        """Return samples by id, without their vectors; unknown ids are left out."""
        columns, found = self._shown(), dict[str, StoredSample]()
        # Sorted: a row far from the last one costs a read of its own.
        for batch in batches(_possible(sample_ids), IDS_A_FILTER):
            rows = self._select(columns, ids_filter(batch), ours=True).to_pylist()
            found |= {row["sample_id"]: stored_sample(row) for row in rows}
        return found

    def restorable(self, sample_id: str) -> tuple[StoredSample, str, bool] | None:
        """Return a sample with what `each` gives beside it; None where there is no such sample."""
        if not _possible([sample_id]):
            return None
        columns = [*self._shown(), *self._places(), "content_hash"]
        rows = self._select(columns, ids_filter([sample_id]), ours=True).to_pylist()
        return _restorable(rows[0]) if rows else None

    def page(self, where: str | None, *, offset: int, limit: int) -> list[StoredSample]:
        """Return some of the samples that a filter lets through, in the table's order.

        Raises:
            FilterError: the filter cannot be understood.
        """
        if limit < 1:
            return []
        rows = self._select(self._shown(), where, slice(offset, offset + limit)).to_pylist()
        return [stored_sample(row) for row in rows]

    def each(self, where: str | None = None) -> Iterator[tuple[StoredSample, str, bool]]:
        """Yield the samples that a filter lets through, in the table's order.

        Each with its content hash, and with whether other turns stand between its tokens.

        Raises:
            FilterError: the filter cannot be understood.
        """
        for batch in self._scan([*self._shown(), *self._places(), "content_hash"], _SAMPLES_A_BATCH, where):
            yield from map(_restorable, batch.to_pylist())

    def vector_of(self, sample_id: str) -> Float16[np.ndarray, " sketch"] | None:
        """Return a sample's RapidGrad; None where there is no such sample."""
        if not _possible([sample_id]):
            return None
        row_ids = int64(self._select([ROW_ID], ids_filter([sample_id]), ours=True)[ROW_ID])
        return next(self.vectors(row_ids)).vectors[0] if len(row_ids) else None

    def values_of(self, column: str, *, most: int) -> list[Scalar] | None:
        """Return the different values of a column, sorted; None where there are more than `most`.

        Raises:
            FilterError: there is no such column, or it holds no plain values.
        """
        values: set[Scalar] = set()
        name = self.group_column(column)
        for batch in self._scan([name], _COUNTS_A_BATCH, None):
            values.update(batch[name].unique().to_pylist())
            if len(values - {None}) > most:
                return None
        return sorted(values - {None})  # type: ignore[type-var]

    def _shown(self) -> list[str]:
        return [name for name in self.schema.names if name not in _NEVER_SHOWN]

    def encoded(self, sample_ids: Sequence[str]) -> dict[str, Encoded]:
        """Return the tokens of samples, by id, as they were when their RapidGrads were made."""
        columns, found = ["sample_id", "input_ids", "token_offsets", *self._places(), "truncated"], {}
        for batch in batches(_possible(sample_ids), IDS_A_FILTER):
            for row in self._select(columns, ids_filter(batch), ours=True).to_pylist():
                found[row["sample_id"]] = Encoded(
                    sample_id=row["sample_id"],
                    input_ids=tuple(row["input_ids"]),
                    offsets=tuple((span["start"], span["end"]) for span in row["token_offsets"]),
                    truncated=row["truncated"],
                    places=None if row.get(PLACES) is None else tuple(row[PLACES]),
                )
        return found

    def each_count(self) -> Iterator[tuple[str, str, int]]:
        """Yield id, content hash, and number of response tokens of every sample."""
        columns = ["sample_id", "content_hash", "tokens"]
        for batch in self._scan(columns, _COUNTS_A_BATCH):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)

    def _places(self) -> list[str]:
        return [PLACES] if PLACES in self.schema.names else []

    def _further(self) -> list[str]:
        return self._places() + [name for name in self.schema.names if name not in OWN_NAMES]

    def _checksum(self, row: dict[str, Any], vector: np.ndarray) -> int:
        return stored_checksum(row, vector)


def _restorable(row: dict[str, Any]) -> tuple[StoredSample, str, bool]:
    content_hash = row.pop("content_hash")
    return stored_sample(row), content_hash, row.get(PLACES) is not None


def _possible(sample_ids: Sequence[str]) -> list[str]:
    """Return ids in order, each once, but for texts with half of a surrogate pair, which are the ids of no sample."""
    return sorted({name for name in sample_ids if is_unicode(name)})
