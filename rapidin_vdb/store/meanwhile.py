"""What others write while an ingest goes on, looked at commit by commit: whatever did not change is not read again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rapidin_vdb.store.commits import word_for
from rapidin_vdb.store.owners import hashes_of
from rapidin_vdb.store.row_ids import ROW_ID, int64
from rapidin_vdb.store.rows import Row
from rapidin_vdb.store.snapshot import Snapshot
from rapidin_vdb.store.version import TableVersion

# Of what a commit may be, these bring rows, and those change none, or take some away.
_BRINGING = frozenset({"ingest", "replace"})
_OTHERS = frozenset({"delete", "scalar index", "compaction", "columns", "purge"})
_UNNAMED = "BaseOperation"


@dataclass(frozen=True, kw_only=True)
class Appended:
    """What became of rows that were to be appended."""

    written: int
    """How many were."""
    unchanged: int
    """How many others had written meanwhile, with the same content."""
    other: tuple[Row, ...]
    """Those whose ids others had written meanwhile, with other content: they were left out."""
    seen: int
    """What to give as `seen` the next time."""


class Since:
    """Which samples came into a table, or were replaced there, since one of its versions.

    They are known by hashes and row ids, in 16 bytes a row. What is said of them is read from the table each time: a
    sample that came may be gone again, or be another row by now.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        """The version."""
        self._looked_at = version
        self._hashes = self._row_ids = np.zeros(0, np.int64)

    def contents(self, newest: Snapshot, sample_ids: Sequence[str]) -> dict[str, str]:
        """Return id and content hash of those of some samples that came since, and are there in the newest version."""
        self._look(newest)
        asked = hashes_of(sample_ids)
        first, last = (np.searchsorted(self._hashes, asked, side) for side in ("left", "right"))
        rows = [self._row_ids[begin:end] for begin, end in zip(first, last, strict=True) if begin < end]
        if not rows:
            return {}
        wanted = set(sample_ids)
        return {
            name: content for name, content in newest.contents_of(np.unique(np.concatenate(rows))) if name in wanted
        }

    def _look(self, newest: Snapshot) -> None:
        """Note what came since the last look."""
        found = [np.zeros((2, 0), np.int64)]
        for batch in came_since(newest, self._looked_at):
            found.append(np.stack([hashes_of(batch.column("sample_id").to_pylist()), int64(batch.column(ROW_ID))]))
        self._looked_at = newest.version
        hashes, row_ids = np.concatenate(found, axis=1)
        order = np.argsort(hashes)
        hashes, row_ids = hashes[order], row_ids[order]
        places = np.searchsorted(self._hashes, hashes)
        if len(self._hashes):
            # A row that is replaced again and again is noted once.
            known = np.minimum(places, len(self._hashes) - 1)
            new = (self._hashes[known] != hashes) | (self._row_ids[known] != row_ids)
            hashes, row_ids, places = hashes[new], row_ids[new], places[new]
        self._hashes = np.insert(self._hashes, places, hashes)
        self._row_ids = np.insert(self._row_ids, places, row_ids)


def came_since(newest: TableVersion, version: int) -> Iterator[pa.RecordBatch]:
    """Yield sample id and row id of the rows that a table got, or that were replaced, since one of its versions.

    Nothing is read where all that was committed since brings no rows. All rows come, where it may have brought back
    some of before, as a fence does; or is not known any more, as after a purge.
    """
    if newest.version == version:
        return
    words = _words(newest, version)
    if not words <= _BRINGING | _OTHERS:
        version = 0
    elif not words & _BRINGING:
        return
    yield from newest.changed_since(version)


def _words(newest: TableVersion, version: int) -> set[str]:
    """Return what the commits since a version did, in words; the empty word stands for what is unknown."""
    words: list[str] = [""] if newest.version < version else []
    try:
        dataset = newest.place.dataset(newest.name)
        for number in range(version + 1, newest.version + 1):
            made_by = dataset.read_transaction(number)
            word = word_for(made_by)
            # Of what Lance commits ahead of a compaction, file numbers set aside for it, it gives no name.
            if word == "compaction" and words[-1:] == [_UNNAMED]:
                words.pop()
            unnamed = made_by is not None and type(made_by.operation).__name__ == _UNNAMED
            words.append(_UNNAMED if unnamed else word)
    except (ValueError, RuntimeError, OSError):
        words.append("")  # it is gone; where nothing can be read at all, reading the rows says so
    return set(words)
