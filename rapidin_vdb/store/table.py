"""The table `samples` of one database: the truth, of which every index is a cache."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa

from rapidin_vdb.errors import TableError, TableExistsError, TableNotFoundError, UnfitError
from rapidin_vdb.ledger import Ledger
from rapidin_vdb.records import Fingerprint
from rapidin_vdb.store.changes import delete_rows, put_rows
from rapidin_vdb.store.columns import check_out, ensure_columns, settle
from rapidin_vdb.store.filters import checked_filter, ids_filter
from rapidin_vdb.store.fingerprint import new_identity, read_fingerprint, read_identity, write_fingerprint
from rapidin_vdb.store.indexing import make_missing
from rapidin_vdb.store.meanwhile import Appended, Since
from rapidin_vdb.store.place import LOCK, place_of
from rapidin_vdb.store.purging import purge_table
from rapidin_vdb.store.rows import ColumnKind, Row, arrow_table, samples_schema
from rapidin_vdb.store.snapshot import SAMPLES, Snapshot
from rapidin_vdb.store.telling import is_refused, pinned, same_database
from rapidin_vdb.store.tokens import TOKENS, TokenTable
from rapidin_vdb.store.version import BATCH_BYTES, IDS_A_FILTER, batches, told

logger = logging.getLogger(__name__)

# Samples of tokens that are compared with the table of samples at once.
_CONTENTS_A_LOOK = 1 << 14


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
        self.identity = read_identity(metadata, place=uri)
        self.tokens = TokenTable(self.place, self.fingerprint, self.committing)
        """The RapidGrads of single tokens."""
        self._since: Since | None = None  # what others wrote since a version that an ingest was planned for

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
        schema = samples_schema(
            fingerprint.sketch.width, write_fingerprint(fingerprint) | new_identity(), turns=fingerprint.turns
        )
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
            UnfitError: there is no such version, or it is no longer kept.
        """
        with told(f"the database at {self.uri} cannot be read"):
            if version is None:
                return Snapshot(same_database(pinned(self.place, SAMPLES), self.identity, self.place), self.place)
            table = same_database(self.place.open_table(SAMPLES), self.identity, self.place)
        try:
            if not 1 <= version <= int(table.version):
                raise ValueError(version)
            check_out(table, version)
        except (ValueError, RuntimeError, OSError) as error:
            raise UnfitError(f"{self.uri} has no version {version}, or no longer; {self._kept(table)}") from error
        return Snapshot(table, self.place)

    def _kept(self, table: Any) -> str:
        """Say which versions there are; a purge leaves only the newest."""
        with told(f"the versions of {self.uri} cannot be read"):
            kept = sorted(int(entry["version"]) for entry in table.list_versions())
        if len(kept) < 2:
            return f"only the newest is kept, {', '.join(map(str, kept))} (see `info --versions`)"
        gaps = "" if kept[-1] - kept[0] == len(kept) - 1 else f", of which {len(kept)} are kept"
        return f"wanted one from {kept[0]} to {kept[-1]}{gaps} (see `info --versions`)"

    def ensure_scalar_indices(self) -> None:
        """Let filters on `split`, `source` and `sample_id` look things up, for new rows too.

        Whoever may only read goes without them, which is slower and nothing else.
        """
        try:
            with self._changing():
                make_missing(lambda: self._table)
        except TableError as error:
            if not is_refused(error):
                raise
            logger.warning("filters look at every row where scalar indices are missing: %s", error)

    def ensure_columns(self, kinds: dict[str, ColumnKind], *, seen: int = 0) -> int:
        """Add the columns that are missing, and widen whole numbers to floating point where asked.

        Returns the version now where nobody else has written since version `seen`, and `seen` otherwise.

        Raises:
            UnfitError: a column exists with another type; nothing is changed then.
        """
        with self._changing(seen) as (table, alone):
            ensure_columns(table, kinds)
            return int(table.version) if alone else seen

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Keep all other writers out; may be entered again inside."""
        place = f"the database {self.uri}"
        # Whether what was being committed is there now is not known where the answer got lost.
        with told(f"{place} cannot be written; what was committed before stays"), self.place.lock:
            yield

    def check_writable(self) -> None:
        """Refuse a place that can only be read, before anything is computed that could not be kept.

        Raises:
            TableError: it cannot be written.
        """
        with self.committing():
            pass

    @contextmanager
    def _changing(self, seen: int = 0) -> Iterator[tuple[Any, bool]]:
        """Keep other writers out, and finish what one left; yield the table, and whether none wrote since `seen`."""
        with self.committing():
            table = same_database(self._table, self.identity, self.place)
            alone = table.version == seen
            settle(table)
            yield table, alone

    def append(self, rows: Sequence[Row], *, seen: int) -> Appended:
        """Add rows in one commit, but for those that others added since version `seen`, for which they were planned.

        The next `seen` is the version now, where nobody else has written since, and else the same again, for what
        others wrote may hold rows that come later.

        Plain appends are many times faster than merges, and never look at ids: so we do, under a lock. What was written
        since then is read once for all appends that are planned for the same version.
        """
        with self._changing(seen) as (table, alone):
            ids = [row.sample.sample_id for row in rows]
            there = {} if alone else self.written_since(ids, seen=seen)
            new = [row for row in rows if row.sample.sample_id not in there]
            other = [
                row
                for row in rows
                if there.get(row.sample.sample_id, row.sample.content_hash) != row.sample.content_hash
            ]
            if new:
                table.add(self._arrow(new, table.schema))
            return Appended(
                written=len(new),
                unchanged=len(rows) - len(new) - len(other),
                other=tuple(other),
                seen=int(table.version) if alone else seen,
            )

    def written_since(self, sample_ids: Sequence[str], *, seen: int) -> dict[str, str]:
        """Return id and content hash of those of some samples that came since version `seen`, and are there now.

        Those that were there before, and were replaced since, are among them. Called while committing.
        """
        if self._since is None or self._since.version != seen:
            self._since = Since(seen)
        return self._since.contents(self.snapshot(), sample_ids)

    def replace(self, rows: Sequence[Row], *, seen: int) -> int:
        """Put rows in the place of those with the same ids, in one commit; return what to give as `seen` next."""
        with self._changing(seen) as (table, alone):
            version = put_rows(self.place, SAMPLES, "sample_id", self._arrow(rows, table.schema))
            self.tokens.delete_of([row.sample.sample_id for row in rows], but=[row.sample.content_hash for row in rows])
            return version if alone else seen

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
        with self._changing():
            # Samples first: tokens without their sample are never looked at.
            before = self.snapshot()
            gone = before.rows()
            if before.count(where):
                delete_rows(self.place, SAMPLES, expression)
            # Not what the filter gave before: what is told must be what was done.
            gone -= self.snapshot().rows()
            self._sweep()
        return gone

    def delete_ids(self, sample_ids: Sequence[str]) -> list[str]:
        """Delete samples by id, and return the ids that were there."""
        with self._changing():
            there = sorted({name for name, _ in self.snapshot().each_content(sample_ids)})
            for batch in batches(there, IDS_A_FILTER):
                delete_rows(self.place, SAMPLES, ids_filter(batch))
            self.tokens.delete_of(there)
        return there

    def purge(self) -> None:
        """Leave nothing of deleted or replaced samples in the tables' files; older versions are gone after that.

        Raises:
            TableError: the files cannot be written.
        """
        with self._changing():
            self._sweep()
            for name in (SAMPLES, TOKENS):
                if self.place.has_table(name):
                    purge_table(self.place, name)

    def _sweep(self) -> None:
        """Delete the tokens of samples that are not there, or not any more; called while committing."""
        tokens = self.tokens.snapshot()
        if tokens is None:
            return
        stale, alive = set[str](), dict[str, str]()
        with closing(Ledger()) as ledger:
            ledger.begin(self.snapshot().each_content())
            contents = tokens.each_content()
            while pairs := list(islice(contents, _CONTENTS_A_LOOK)):
                entries = ledger.look(name for name, _ in pairs)
                gone = {name for name, content in pairs if entries[name].there != content}
                stale |= gone
                alive |= {name: there for name in gone if (there := entries[name].there) is not None}
        self.tokens.delete_of(sorted(stale), but=[alive[name] for name in sorted(alive)])
