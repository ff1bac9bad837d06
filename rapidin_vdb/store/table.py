"""The table `samples` of one database: the truth, of which every index is a cache."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from rapidin_vdb.errors import FilterError, TableError, TableExistsError, TableNotFoundError
from rapidin_vdb.records import Fingerprint
from rapidin_vdb.results import StoredSample
from rapidin_vdb.store.filters import checked_filter, ids_filter
from rapidin_vdb.store.fingerprint import read_fingerprint, write_fingerprint
from rapidin_vdb.store.rows import (
    OWN_NAMES,
    ColumnKind,
    Row,
    arrow_table,
    column_field,
    column_kind,
    samples_schema,
    stored_sample,
)

TABLE = "samples"
# Lance reads and writes fastest in batches of about this size.
_BATCH_BYTES = 8 << 20
_IDS_A_FILTER = 5000
_WIDENED = "_widened_"


class Snapshot:
    """One committed version of the table; what others write meanwhile is not seen."""

    def __init__(self, table: Any, place: str) -> None:
        self._table = table
        self._place = place
        self.version: int = table.version
        schema = table.schema
        self.fingerprint = read_fingerprint(schema.metadata, place=place)
        self.schema: pa.Schema = schema

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
        for batch in _batches(sorted(set(sample_ids)), _IDS_A_FILTER):
            rows = self._select(columns, ids_filter(batch)).to_pylist()
            found |= {row["sample_id"]: stored_sample(row) for row in rows}
        return found

    def vectors(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield all sample ids and RapidGrads, in batches of [samples] and float16 [samples, width]."""
        width = self.fingerprint.sketch.width
        query = self._table.search().select(["sample_id", "vector"])
        for batch in query.to_batches(max(1, _BATCH_BYTES // (2 * width))):
            if batch.num_rows:
                vectors = batch.column("vector").flatten().to_numpy(zero_copy_only=False)
                yield batch.column("sample_id").to_pylist(), vectors.reshape(-1, width)

    def _select(self, columns: list[str], where: str | None) -> pa.Table:
        query = self._table.search().select(columns)
        if where is None:
            return query.to_arrow()
        expression = checked_filter(where)
        try:
            return query.where(expression).to_arrow()
        except Exception as error:  # lancedb raises ValueError, RuntimeError or OSError, as its planner pleases
            if not isinstance(error, ValueError | RuntimeError | OSError | TypeError):
                raise
            raise FilterError(
                f"the filter {where!r} is not understood: {_first_line(error)}. Columns are: {self.columns()}"
            ) from error

    def columns(self) -> str:
        """Return the columns that a filter may use, with their types, for a message."""
        return ", ".join(
            f"{field.name} ({field.type})"
            for field in self.schema
            if field.name not in ("vector", "input_ids", "token_offsets", "content_hash")
        )


class SampleTable:
    """The table `samples`, open for reading and writing."""

    def __init__(self, uri: str) -> None:
        """Open the table of an existing database.

        Raises:
            TableNotFoundError: there is no database there.
            TableError: there is one that cannot be read.
        """
        self.uri = uri
        if "://" not in uri and not Path(uri, f"{TABLE}.lance").is_dir():
            raise TableNotFoundError(
                f"no database at {uri}; make one with: rapidin-vdb init {uri} --model NAME_OR_PATH"
            )
        try:
            self._connection = _connect(uri)
            self._table = self._connection.open_table(TABLE)
        except (ValueError, OSError, RuntimeError) as error:
            raise TableError(f"the database at {uri} cannot be opened: {_first_line(error)}") from error
        self.fingerprint = read_fingerprint(self._table.schema.metadata, place=uri)

    @staticmethod
    def check_free(uri: str) -> None:
        """Refuse a place where something already is.

        Raises:
            TableExistsError: a database, or other files.
        """
        if "://" in uri:
            return
        if Path(uri, f"{TABLE}.lance").exists():
            raise TableExistsError(f"a database is already at {uri}; add to it with: rapidin-vdb ingest {uri} FILE")
        if Path(uri).is_file() or (Path(uri).is_dir() and any(Path(uri).iterdir())):
            raise TableExistsError(f"{uri} is not empty, and what it holds is no database; give a new folder")

    @staticmethod
    def create(uri: str, fingerprint: Fingerprint) -> "SampleTable":
        """Make a new, empty table.

        Raises:
            TableExistsError: there is something already.
            TableError: the place cannot be written.
        """
        SampleTable.check_free(uri)
        schema = samples_schema(fingerprint.sketch.width, write_fingerprint(fingerprint))
        try:
            # Stable row ids let an index see exactly what changed since its version.
            _connect(uri).create_table(
                TABLE, schema=schema, storage_options={"new_table_enable_stable_row_ids": "true"}
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise TableError(f"no database can be made at {uri}: {_first_line(error)}") from error
        return SampleTable(uri)

    def snapshot(self) -> Snapshot:
        """Return the newest committed version, pinned."""
        table = self._connection.open_table(TABLE)
        table.checkout(table.version)
        return Snapshot(table, self.uri)

    def ensure_columns(self, kinds: dict[str, ColumnKind]) -> None:
        """Add the columns that are missing, and widen whole numbers to floating point where asked.

        Raises:
            TableError: a column exists with another type; nothing is changed then.
        """
        self._finish_widening()
        schema = self._table.schema
        existing = {field.name.lower(): field for field in schema if field.name not in OWN_NAMES}
        missing, widened = [], []
        for name, kind in kinds.items():
            field = existing.get(name.lower())
            if field is None:
                missing.append(column_field(name, kind))
            elif field.name != name:
                raise TableError(
                    f"the records' field {name} differs from the column {field.name} in case only; rename it"
                )
            elif column_kind(field) == "int" and kind == "float":
                widened.append(name)
            elif not _holds(column_kind(field), kind):
                raise TableError(
                    f"the records' field {name} is {kind}, but the column {name} holds {field.type}; "
                    "rename the field or bring it to that type"
                )
        if missing:
            self._table.add_columns(pa.schema(missing))
        for name in widened:
            self._widen(name)

    def _widen(self, name: str) -> None:
        """Turn a column of whole numbers into floating point, which Lance cannot do in place: by way of a copy."""
        self._table.add_columns({_WIDENED + name: f"CAST(`{name}` AS DOUBLE)"})
        self._finish_widening()

    def _finish_widening(self) -> None:
        """Put the copies of widened columns in their places, also where a process died half-way."""
        for copy in [name for name in self._table.schema.names if name.startswith(_WIDENED)]:
            name = copy.removeprefix(_WIDENED)
            if name in self._table.schema.names:
                self._table.drop_columns([name])
            self._table.alter_columns({"path": copy, "rename": name})

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows whose ids are not in the table, in one commit."""
        self._table.add(self._arrow(rows))

    def replace(self, rows: Sequence[Row]) -> None:
        """Put rows in the place of those with the same ids, in one commit."""
        merge = self._table.merge_insert("sample_id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(self._arrow(rows))

    def _arrow(self, rows: Sequence[Row]) -> pa.RecordBatchReader:
        table = arrow_table(rows, self._table.schema)
        batches = table.to_batches(max(1, _BATCH_BYTES // (2 * self.fingerprint.sketch.width)))
        return pa.RecordBatchReader.from_batches(table.schema, batches)

    def delete_where(self, where: str) -> int:
        """Delete the samples a filter lets through, in one commit, and return how many there were.

        Raises:
            FilterError: the filter cannot be understood; nothing is deleted.
        """
        count = self.snapshot().count(where)
        if count:
            self._table.delete(checked_filter(where))
        return count

    def delete_ids(self, sample_ids: Sequence[str]) -> list[str]:
        """Delete samples by id, and return the ids that were there."""
        there = sorted(set(self.snapshot().sample_ids()) & set(sample_ids))
        for batch in _batches(there, _IDS_A_FILTER):
            self._table.delete(ids_filter(batch))
        return there


def _connect(uri: str) -> Any:
    # An interval of zero: every look at a table is a look at its newest commit.
    return lancedb.connect(uri, read_consistency_interval=timedelta(0))


def _holds(column: ColumnKind | None, kind: ColumnKind) -> bool:
    return column == kind or column == "str" or (column == "float" and kind == "int")


def _batches(values: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # Lance ends its messages with the place in its own source.
    for mark in (", /root/", ", /home/", ", rust/", " Rust backtrace", ", C:\\"):
        text = text.split(mark)[0]
    return text[:300]
