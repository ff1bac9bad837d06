"""The table `samples` of one database: the truth, of which every index is a cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pyarrow as pa
from lancedb.index import Bitmap, BTree

from rapidin_vdb.errors import TableError, TableExistsError, TableNotFoundError
from rapidin_vdb.records import Fingerprint
from rapidin_vdb.store.filters import checked_filter, ids_filter
from rapidin_vdb.store.fingerprint import read_fingerprint, write_fingerprint
from rapidin_vdb.store.place import LOCK, place_of
from rapidin_vdb.store.rows import (
    OWN_NAMES,
    ColumnKind,
    Row,
    arrow_table,
    column_field,
    column_kind,
    samples_schema,
)
from rapidin_vdb.store.snapshot import SAMPLES, Snapshot
from rapidin_vdb.store.tokens import TOKENS, TokenTable
from rapidin_vdb.store.version import BATCH_BYTES, IDS_A_FILTER, batches, told

_WIDENED = "_widened_"


class SampleTable:
    """The table `samples`, open for reading and writing."""

    def __init__(self, uri: str) -> None:
        """Open the table of an existing database.

        Raises:
            TableNotFoundError: there is no database there.
            TableError: there is one that cannot be read.
        """
        self.place = place_of(uri)
        """Where it lies."""
        self.uri = uri = self.place.uri
        with told(f"the database at {uri} cannot be opened"):
            there = self.place.has_table(SAMPLES)
        if not there:
            raise TableNotFoundError(
                f"no database at {uri}; make one with: rapidin-vdb init {uri} --model NAME_OR_PATH"
            )
        with told(f"the database at {uri} cannot be opened"):
            metadata = self._table.schema.metadata
        self.fingerprint = read_fingerprint(metadata, place=uri)
        self._lock = self.place.lock
        self.tokens = TokenTable(self.place, self.fingerprint, self.committing)
        """The RapidGrads of single tokens."""

    @property
    def _table(self) -> Any:
        """The newest version, for reading or for one commit; opened anew, which shows that the lock is still ours."""
        return self.place.open_table(SAMPLES)

    @staticmethod
    def check_free(uri: str) -> None:
        """Refuse a place where something already is.

        Raises:
            TableExistsError: a database, or other files.
        """
        place = place_of(uri)
        with told(f"{place} cannot be read"):
            made, there = place.has_table(SAMPLES), place.entries()
        if made:
            raise TableExistsError(f"a database is already at {uri}; add to it with: rapidin-vdb ingest {uri} FILE")
        # What an init that died has begun may be begun again.
        if there is None or there - {f"{SAMPLES}.lance", LOCK}:
            raise TableExistsError(f"{uri} is not empty, and what it holds is no database; give a new folder")

    @staticmethod
    def create(uri: str, fingerprint: Fingerprint) -> "SampleTable":
        """Make a new, empty table.

        Raises:
            TableExistsError: there is something already.
            TableError: the place cannot be written.
        """
        SampleTable.check_free(uri)
        place = place_of(uri)
        schema = samples_schema(fingerprint.sketch.width, write_fingerprint(fingerprint))
        with told(f"no database can be made at {place}"):
            place.prepare()
            with place.lock:
                # Again: somebody else may have made one since, which must not be taken for what an init left that died.
                SampleTable.check_free(uri)
                place.create_table(SAMPLES, schema)
        return SampleTable(uri)

    def snapshot(self, version: int | None = None) -> Snapshot:
        """Return the newest committed version, pinned, or an older one.

        Raises:
            TableError: there is no such version, or it is no longer kept.
        """
        with told(f"the database at {self.uri} cannot be read"):
            table = self.place.open_table(SAMPLES)
            newest = int(table.version)
        refusal = TableError(
            f"{self.uri} has no version {version}, or no longer; wanted one from 1 to {newest} (`info` says the newest)"
        )
        if version is not None and not 1 <= version <= newest:
            raise refusal
        try:
            table.checkout(newest if version is None else version)
        except (ValueError, RuntimeError, OSError) as error:
            raise refusal from error
        return Snapshot(table, self.place)

    def ensure_scalar_indices(self) -> None:
        """Let filters on `split`, `source` and `sample_id` look things up, for new rows too."""
        with self.committing():
            there = {index.columns[0]: index for index in self._table.list_indices()}
            for column, config in (("split", Bitmap()), ("source", Bitmap()), ("sample_id", BTree())):
                found = there.get(column)
                # Rows that came later are looked at one by one, which is cheap for few.
                if found is None or 4 * found.num_unindexed_rows > found.num_indexed_rows:
                    self._table.create_index(column, config=config, replace=True)

    def ensure_columns(self, kinds: dict[str, ColumnKind], *, seen: int = 0) -> int:
        """Add the columns that are missing, and widen whole numbers to floating point where asked.

        Returns the version now where nobody else has written since version `seen`, and `seen` otherwise.

        Raises:
            TableError: a column exists with another type; nothing is changed then.
        """
        with self.committing():
            return self._ensure_columns(kinds, seen)

    def _ensure_columns(self, kinds: dict[str, ColumnKind], seen: int) -> int:
        alone = self._table.version == seen
        self._finish_widening()
        schema = self._table.schema
        existing = {field.name.lower(): field for field in schema if field.name not in OWN_NAMES}
        missing, widened = [], []
        for name, kind in kinds.items():
            field = existing.get(name.lower())
            if field is None:
                missing.append(column_field(name, kind))
            elif column_kind(field) == "int" and kind == "float":
                widened.append(field.name)
            elif not _holds(column_kind(field), kind):
                raise TableError(
                    f"the records' field {name} is {kind}, but the column {name} holds {field.type}; "
                    "rename the field or bring it to that type"
                )
        if missing:
            self._table.add_columns(pa.schema(missing))
        for name in widened:
            self._widen(name)
        return int(self._table.version) if alone else seen

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

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Keep all other writers out; may be entered again inside."""
        with told(f"{self.uri} cannot be written, and is as it was before"), self._lock:
            yield

    def check_writable(self) -> None:
        """Refuse a place that can only be read, before anything is computed that could not be kept.

        Raises:
            TableError: it cannot be written.
        """
        with self.committing():
            pass

    def append(self, rows: Sequence[Row], *, seen: int) -> tuple[int, int]:
        """Add rows in one commit, but for those that others added since version `seen`, for which they were planned.

        Returns how many were added, and what to give as `seen` the next time: the version now, where nobody else has
        written since, and else the same again, for what others wrote may hold rows that come later.

        Plain appends are many times faster than merges, and never look at ids: so we do, under a lock.
        """
        with self.committing():
            table = self._table
            alone = table.version == seen
            if not alone:
                there = set(self.snapshot().sample_ids())
                rows = [row for row in rows if row.sample.sample_id not in there]
            if rows:
                table.add(self._arrow(rows, table.schema))
            return len(rows), int(table.version) if alone else seen

    def replace(self, rows: Sequence[Row], *, seen: int) -> int:
        """Put rows in the place of those with the same ids, in one commit; return what to give as `seen` next."""
        with self.committing():
            table = self._table
            alone = table.version == seen
            merge = table.merge_insert("sample_id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(self._arrow(rows, table.schema))
            self.tokens.delete_of([row.sample.sample_id for row in rows], but=[row.sample.content_hash for row in rows])
            return int(table.version) if alone else seen

    def _arrow(self, rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatchReader:
        size = max(1, BATCH_BYTES // (2 * self.fingerprint.sketch.width))
        # Converted as Lance asks for them: a second copy of a whole commit would double what is waiting.
        made = (
            batch
            for first in range(0, len(rows), size)
            for batch in arrow_table(rows[first : first + size], schema).to_batches()
        )
        return pa.RecordBatchReader.from_batches(schema, made)

    def delete_where(self, where: str) -> int:
        """Delete the samples a filter lets through, in one commit, and return how many there were.

        Raises:
            FilterError: the filter cannot be understood; nothing is deleted.
        """
        expression = checked_filter(where)
        self.snapshot().count(where)  # so that a filter that is not understood is told as such
        with self.committing():
            # Samples first: tokens without their sample are never looked at.
            gone = self.snapshot().sample_ids(where)
            if gone:
                self._table.delete(expression)
            self._sweep()
        return len(gone)

    def delete_ids(self, sample_ids: Sequence[str]) -> list[str]:
        """Delete samples by id, and return the ids that were there."""
        with self.committing():
            there = sorted(set(self.snapshot().sample_ids()) & set(sample_ids))
            for batch in batches(there, IDS_A_FILTER):
                self._table.delete(ids_filter(batch))
            self._sweep()
        return there

    def purge(self) -> None:
        """Leave nothing of deleted or replaced samples in the tables' files; older versions are gone after that.

        Raises:
            TableError: the files cannot be written.
        """
        with self.committing():
            self._sweep()
            for name in (SAMPLES, TOKENS):
                if not self.place.has_table(name):
                    continue
                # Every fragment that lost a row, however large, is written anew without it.
                self.place.dataset(name).optimize.compact_files(
                    materialize_deletions=True, materialize_deletions_threshold=0.0
                )
                if name == SAMPLES:
                    # Scalar indices hold values of rows that are gone.
                    for index in self._table.list_indices():
                        config = BTree() if index.columns[0] == "sample_id" else Bitmap()
                        self._table.create_index(index.columns[0], config=config, replace=True)
                self.place.dataset(name).cleanup_old_versions(
                    older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
                )
                # Lance passes over files that it may not delete.
                if len(left := self.place.dataset(name).versions()) > 1:
                    raise TableError(
                        f"{len(left) - 1} older versions of the table {name} of {self.uri} could not be deleted: "
                        "permission denied, or others are writing; see to it, and run the purge again"
                    )

    def _sweep(self) -> None:
        """Delete the tokens of samples that are not there, or not any more; called while committing."""
        tokens = self.tokens.snapshot()
        if tokens is not None:
            alive = self.snapshot().content_hashes()
            stale = {name for name, content in tokens.content_hashes() if alive.get(name) != content}
            self.tokens.delete_of(sorted(stale), but=[alive[name] for name in stale if name in alive])


def _holds(column: ColumnKind | None, kind: ColumnKind) -> bool:
    return column == kind or column == "str" or (column == "float" and kind == "int")
