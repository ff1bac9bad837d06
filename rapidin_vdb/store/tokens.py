"""The table `tokens`: RapidGrads of single response tokens, for those samples that were asked for.

A row counts only where the table `samples` has its sample with the same content: that table is the truth, and a process
that dies between the two leaves nothing that anybody sees.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from rapidin_vdb.errors import TableError
from rapidin_vdb.records import Encoded, Fingerprint
from rapidin_vdb.store.changes import delete_rows
from rapidin_vdb.store.checksum import row_checksum
from rapidin_vdb.store.filters import ids_filter, listed
from rapidin_vdb.store.fingerprint import write_fingerprint
from rapidin_vdb.store.meanwhile import came_since
from rapidin_vdb.store.owners import Having, Owners, owners_of
from rapidin_vdb.store.place import Place
from rapidin_vdb.store.row_ids import ROW_ID
from rapidin_vdb.store.rows import vector_field
from rapidin_vdb.store.telling import pinned
from rapidin_vdb.store.version import (
    BATCH_BYTES,
    IDS_A_FILTER,
    TableVersion,
    batches,
    told,
)

TOKENS = "tokens"
_OWNERS_A_BATCH = 1 << 16
_FIELDS = (
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("token_index", pa.int32(), nullable=False),
    pa.field("start", pa.int32(), nullable=False),
    pa.field("end", pa.int32(), nullable=False),
    pa.field("content_hash", pa.string(), nullable=False),
    pa.field("checksum", pa.int64(), nullable=False),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """The RapidGrads of one sample's response tokens, ready to be written."""

    encoded: Encoded
    """The sample's tokens."""
    content_hash: str
    """The sample's."""
    vectors: np.ndarray
    """float16 [tokens, token width]."""


class TokenSnapshot(TableVersion):
    """One committed version of the table of tokens."""

    KEY = ("sample_id", "token_index")
    PLAIN = ("sample_id", "token_index", "start", "end", "content_hash")

    def __init__(self, table: Any, place: Place, owners: dict[str, Owners]) -> None:
        super().__init__(table, place, TOKENS)
        self._owners = owners

    def matching(self, samples: pa.ChunkedArray) -> tuple[Int64[np.ndarray, " matching"], int]:
        """Return the row ids of the tokens of samples, which `Snapshot.contents` names, and how many have tokens."""
        digest = self.digest
        owners = self._owners.get(digest)
        if owners is None:
            owners = owners_of(self._scan([ROW_ID, "sample_id", "content_hash"], _OWNERS_A_BATCH), ROW_ID)
            # The next question is of the same version or of a newer one.
            self._owners.clear()
            self._owners[digest] = owners
        return owners.tokens_of(samples)

    def sample_ids(self) -> Iterator[str]:
        """Yield the samples that have tokens; more than once where these do not lie side by side."""
        for batch in self._scan(["sample_id"], _OWNERS_A_BATCH):
            yield from pc.run_end_encode(batch.column("sample_id")).values.to_pylist()

    def _contents(self, batch: pa.RecordBatch) -> Iterator[tuple[str, str]]:
        """Return the samples of a batch's tokens, each once."""
        groups = pa.Table.from_batches([batch]).group_by(["sample_id", "content_hash"]).aggregate([])
        columns = (groups[name].to_pylist() for name in ("sample_id", "content_hash"))
        return zip(*columns, strict=True)

    def _checksum(self, row: dict[str, Any], vector: np.ndarray) -> int:
        return row_checksum([row[name] for name in self.PLAIN], (), vector)

    def _keys(self, rows: Any) -> list[str]:
        pairs = zip(rows.column("sample_id").to_pylist(), rows.column("token_index").to_pylist(), strict=True)
        return [token_key(sample_id, number) for sample_id, number in pairs]


def token_key(sample_id: str, number: int) -> str:
    """Return what names a token; in the order of sample ids, then of numbers."""
    return f"{sample_id}\0{number:010d}"


def token_of(key: str) -> tuple[str, int]:
    """Return the sample id and the number of a token.

    >>> token_of(token_key("demo-1", 12))
    ('demo-1', 12)
    """
    sample_id, _, number = key.rpartition("\0")
    return sample_id, int(number)


class TokenTable:
    """The table `tokens` of one database, which is there once token gradients were asked for."""

    def __init__(
        self, place: Place, fingerprint: Fingerprint, committing: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._place = place
        self._fingerprint = fingerprint
        self._committing = committing
        self._owners: dict[str, Owners] = {}
        self._last: Having | None = None  # of the version that was last written here

    def __bool__(self) -> bool:
        with told(f"the table tokens of {self._place} cannot be read"):
            return self._place.has_table(TOKENS)

    def snapshot(self, version: int | None = None) -> TokenSnapshot | None:
        """Return the newest committed version, pinned, or an older one; None where there is no such table."""
        if not self:
            return None
        with told(f"the table tokens of {self._place} cannot be read"):
            if version is None:
                return TokenSnapshot(pinned(self._place, TOKENS), self._place, self._owners)
            table = self._place.open_table(TOKENS)
            table.checkout(version)
        return TokenSnapshot(table, self._place, self._owners)

    def newest(self) -> TokenSnapshot:
        """Return what `snapshot` does, where there is such a table.

        Raises:
            TableError: there is none.
        """
        found = self.snapshot()
        if found is None:
            raise TableError(f"{self._place} has no table of tokens any more")
        return found

    @property
    def width(self) -> int | None:
        """Length of its RapidGrads; None where there is no such table."""
        snapshot = self.snapshot()
        return None if snapshot is None else snapshot.width

    def ensure(self, width: int) -> None:
        """Make the table, if it is not there.

        Raises:
            TableError: it is there with another width.
        """
        with self._committing():
            found = self.width
            if found is None:
                schema = pa.schema([*_FIELDS, vector_field(width)], metadata=write_fingerprint(self._fingerprint))
                self._place.create_table(TOKENS, schema)
            elif found != width:
                raise TableError(
                    f"tokens of {self._place} have RapidGrads of width {found} by now, as another ingest began them, "
                    f"and not {width}; run it again, with --token-width {found} or without"
                )

    def write(self, samples: Sequence[TokenRows]) -> int:
        """Write the tokens of some samples that have none; return how many.

        Samples that somebody else has given their tokens meanwhile are left alone.
        """
        with self._committing():
            table = self._place.open_table(TOKENS)
            having = self._having(table)
            there = self._there(table, having.among(sample.encoded.sample_id for sample in samples))
            # Those of other content stay until that is replaced: nobody sees two, and whoever commits first may win.
            new = [sample for sample in samples if (sample.encoded.sample_id, sample.content_hash) not in there]
            if new:
                table.add(pa.RecordBatchReader.from_batches(table.schema, self._arrow(new, table.schema)))
                having.add(sample.encoded.sample_id for sample in new)
                having.note_ours(int(table.version))
        return sum(len(sample.vectors) for sample in new)

    def delete_of(self, sample_ids: Sequence[str], *, but: Sequence[str] = ()) -> None:
        """Delete the tokens of some samples, but not those of some content hashes; called while committing."""
        if not sample_ids or not self:
            return
        spared = f" AND content_hash NOT IN ({listed(but)})" if but else ""
        having = self._having(self._place.open_table(TOKENS))
        for batch in batches(having.among(sample_ids), IDS_A_FILTER):
            having.note_ours(delete_rows(self._place, TOKENS, ids_filter(batch) + spared))

    def _having(self, table: Any) -> Having:
        """Return which samples may have tokens; of what others wrote since our last look, new rows alone are read."""
        newest = TokenSnapshot(table, self._place, self._owners)
        if self._last is None:
            self._last = Having(newest.version, newest.sample_ids())
        elif self._last.version != newest.version:
            for batch in came_since(newest, self._last.version):
                self._last.add(pc.unique(batch.column("sample_id")).to_pylist())
            self._last.version = newest.version
        return self._last

    def _there(self, table: Any, sample_ids: list[str]) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = set()
        for batch in batches(sample_ids, IDS_A_FILTER):
            rows = table.search().where(ids_filter(batch)).select(["sample_id", "content_hash"]).to_arrow()
            found |= set(zip(rows["sample_id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True))
        return found

    def _arrow(self, samples: Sequence[TokenRows], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        size = max(1, BATCH_BYTES // (2 * schema.field("vector").type.list_size))
        waiting: list[TokenRows] = []
        for number, sample in enumerate(samples):
            waiting.append(sample)
            if number == len(samples) - 1 or sum(len(entry.vectors) for entry in waiting) >= size:
                yield _record_batch(waiting, schema)
                waiting = []


def _record_batch(samples: Sequence[TokenRows], schema: pa.Schema) -> pa.RecordBatch:
    counts = [len(sample.vectors) for sample in samples]
    spans = [span for sample in samples for span in sample.encoded.offsets]

    def each(values: Sequence[str]) -> pa.Array:
        return pa.array(np.repeat(np.array(values, dtype=object), counts), pa.string())

    vectors = np.concatenate([sample.vectors for sample in samples]).astype(np.float16, copy=False)
    return pa.RecordBatch.from_arrays(
        [
            each([sample.encoded.sample_id for sample in samples]),
            pa.array(np.concatenate([np.arange(count) for count in counts]), pa.int32()),
            pa.array([start for start, _ in spans], pa.int32()),
            pa.array([end for _, end in spans], pa.int32()),
            each([sample.content_hash for sample in samples]),
            pa.array(_checksums(samples), pa.int64()),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=schema.field("vector").type),
        ],
        schema=schema,
    )


def _checksums(samples: Sequence[TokenRows]) -> list[int]:
    return [
        row_checksum((sample.encoded.sample_id, number, *span, sample.content_hash), (), vector)
        for sample in samples
        for number, (span, vector) in enumerate(zip(sample.encoded.offsets, sample.vectors, strict=True))
    ]
