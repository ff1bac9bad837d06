"""What is known of each sample by its id, kept off memory: a corpus may have more ids than memory holds.

Python's own SQLite, in a file for temporary data that has no name and goes with the process, however that ends. What
fits the cache never reaches the disk.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rapidin_vdb.errors import ScratchError, no_scratch

_CACHE_KIBIBYTES = 32 << 10


@dataclass(kw_only=True, slots=True)
class Entry:
    """What is known of one sample id."""

    there: str | None = None
    """Content hash of the sample that is in the table under it."""
    planned: str | None = None
    """Content hash of the sample that is to be written under it."""
    has_tokens: bool = False
    """Whether what is in the table has the RapidGrads of its single tokens."""
    replaced: bool = False
    """Whether other content was to be written in the place of what is in the table, at some moment of the planning."""
    taken: bool = False
    """Whether it has been handed out to be written."""
    deleted: bool = False
    """Whether it is not in the table any more, and was once."""

    @property
    def tokens_only(self) -> bool:
        """Whether the sample is in the table, and lacks the RapidGrads of its single tokens only."""
        return self.planned is not None and self.planned == self.there

    @property
    def replaces(self) -> bool:
        """Whether it takes the place of other content."""
        return self.there is not None and self.planned not in (None, self.there)


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a sample says, or said before it was deleted, as far as it takes to compare records with it."""

    sample_id: str
    """Its id."""
    content_hash: str
    """Hash of its record, split and source."""
    texts: str
    """Hash of its prompt and response."""
    split: str
    """Its split, which need not be that of its record."""
    source: str | None
    """Its source, likewise."""


class _Scratch:
    """A table in a file for temporary data."""

    _TABLE = ""

    def __init__(self) -> None:
        with _told():
            self._file = _temporary(self._TABLE)

    def close(self) -> None:
        """Forget all of it."""
        self._file.close()


class Ledger(_Scratch):
    """What an ingest knows of each sample id: what is in the table under it, and what is to be written."""

    _TABLE = (
        "CREATE TABLE samples (sample_id TEXT PRIMARY KEY, there TEXT, planned TEXT, has_tokens INT, "
        "replaced INT, taken INT, deleted INT) WITHOUT ROWID"
    )

    def begin(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Begin anew with the samples that are in the table, by id and content hash."""
        with _told():
            self._file.execute("DELETE FROM samples")
        self._many("INSERT OR REPLACE INTO samples VALUES (?, ?, NULL, 0, 0, 0, 0)", pairs)

    def note_deleted(self, sample_ids: Iterable[str]) -> None:
        """Note that samples were once in the table; such as are there again count as there."""
        self._many("INSERT OR IGNORE INTO samples VALUES (?, NULL, NULL, 0, 0, 0, 1)", ((name,) for name in sample_ids))

    def note_tokens(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Note that samples have the RapidGrads of their tokens, where they are in the table with that content."""
        self._many("UPDATE samples SET has_tokens = 1 WHERE sample_id = ? AND there = ?", pairs)

    def look(self, sample_ids: Iterable[str]) -> dict[str, Entry]:
        """Return what is known of some ids, those of which nothing is known among them."""
        found = {}
        with _told():
            for name in sample_ids:
                row = self._file.execute("SELECT * FROM samples WHERE sample_id = ?", (name,)).fetchone()
                found[name] = Entry() if row is None else _entry(*row)
        return found

    def put(self, entries: dict[str, Entry]) -> None:
        """Put what is known now of some ids in the place of what was."""
        self._many(
            "INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (name, entry.there, entry.planned, entry.has_tokens, entry.replaced, entry.taken, entry.deleted)
                for name, entry in entries.items()
            ),
        )

    def settle(self, *, token_gradients: bool) -> int:
        """Take off the plan what came back to what is in the table, and return how many samples did.

        With `token_gradients` those stay on it that lack the RapidGrads of their tokens.
        """
        count = self._count("SELECT count(*) FROM samples WHERE replaced AND planned = there")
        with _told():
            self._file.execute(
                "UPDATE samples SET planned = NULL WHERE replaced AND planned = there AND (has_tokens OR NOT ?)",
                (token_gradients,),
            )
        return count

    def each_there(self) -> Iterator[str]:
        """Yield the ids of the samples that are in the table, sorted; nothing is to be noted meanwhile."""
        statement = "SELECT sample_id FROM samples WHERE there NOT NULL ORDER BY sample_id"
        with _told():
            yield from (name for (name,) in self._file.execute(statement))

    def there(self) -> int:
        """Return how many samples are in the table."""
        return self._count("SELECT count(there) FROM samples")

    def planned(self) -> int:
        """Return how many samples are to be written."""
        return self._count("SELECT count(planned) FROM samples")

    def brought_back(self) -> int:
        """Return how many of them were deleted before."""
        return self._count("SELECT count(planned) FROM samples WHERE deleted")

    def tokens_only(self) -> int:
        """Return how many of them are in the table, and lack the RapidGrads of their single tokens only."""
        return self._count("SELECT count(*) FROM samples WHERE planned = there")

    def hand_out_again(self) -> None:
        """Forget what has been handed out."""
        with _told():
            self._file.execute("UPDATE samples SET taken = 0 WHERE taken")

    def _count(self, statement: str) -> int:
        with _told():
            (count,) = self._file.execute(statement).fetchone()
        return int(count)

    def _many(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        with _told():
            self._file.executemany(statement, rows)


class Contents(_Scratch):
    """What each of many samples says, or said: one id may have stood for several contents."""

    _TABLE = (
        "CREATE TABLE contents (sample_id TEXT, content_hash TEXT, texts TEXT, split TEXT, source TEXT, "
        "PRIMARY KEY (sample_id, content_hash)) WITHOUT ROWID"
    )

    def clear(self) -> None:
        """Forget all of them."""
        with _told():
            self._file.execute("DELETE FROM contents")

    def add(self, content: Content) -> None:
        """Add one, if it is new."""
        row = (content.sample_id, content.content_hash, content.texts, content.split, content.source)
        with _told():
            self._file.execute("INSERT OR IGNORE INTO contents VALUES (?, ?, ?, ?, ?)", row)

    def any(self) -> bool:
        """Say whether there is one."""
        with _told():
            return self._file.execute("SELECT 1 FROM contents LIMIT 1").fetchone() is not None

    def of(self, sample_id: str) -> list[Content]:
        """Return all of an id; none where nothing is known of it."""
        with _told():
            rows = self._file.execute("SELECT * FROM contents WHERE sample_id = ?", (sample_id,)).fetchall()
        return [
            Content(sample_id=name, content_hash=content_hash, texts=texts, split=split, source=source)
            for name, content_hash, texts, split, source in rows
        ]


class Names(_Scratch):
    """A set of names that may be too many for memory."""

    _TABLE = "CREATE TABLE names (name TEXT PRIMARY KEY) WITHOUT ROWID"

    def add(self, name: str) -> bool:
        """Add a name, and say whether it is new."""
        with _told():
            return self._file.execute("INSERT OR IGNORE INTO names VALUES (?)", (name,)).rowcount == 1


class Numbers(_Scratch):
    """Which numbers each of many samples has: its tokens'."""

    _TABLE = (
        "CREATE TABLE numbers (sample_id TEXT, content_hash TEXT, number INT, "
        "PRIMARY KEY (sample_id, content_hash, number)) WITHOUT ROWID"
    )

    def add(self, sample_id: str, content_hash: str, number: int) -> bool:
        """Add a number of a sample, and say whether it is new."""
        row = (sample_id, content_hash, number)
        with _told():
            return self._file.execute("INSERT OR IGNORE INTO numbers VALUES (?, ?, ?)", row).rowcount == 1

    def some_are_missing(self, sample_id: str, content_hash: str, count: int) -> bool:
        """Say whether a sample has numbers, but other ones than those from 0 to `count` - 1."""
        with _told():
            found, least, most = self._file.execute(
                "SELECT count(*), min(number), max(number) FROM numbers WHERE sample_id = ? AND content_hash = ?",
                (sample_id, content_hash),
            ).fetchone()
        return found > 0 and (found, least, most) != (count, 0, count - 1)


def _entry(
    name: str, there: str | None, planned: str | None, has_tokens: int, replaced: int, taken: int, deleted: int
) -> Entry:
    return Entry(
        there=there,
        planned=planned,
        has_tokens=bool(has_tokens),
        replaced=bool(replaced),
        taken=bool(taken),
        deleted=bool(deleted),
    )


def _temporary(table: str) -> sqlite3.Connection:
    """Return a file for temporary data with a table in it."""
    # Used by one thread at a time, though not always by the same.
    file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    file.execute("PRAGMA journal_mode = OFF")
    file.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
    file.execute(table)
    # Never ended: there is nobody to commit it for.
    file.execute("BEGIN")
    return file


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        told = no_scratch(
            "the list of sample ids that this command keeps among temporary files",
            error,
            folder=_folder(),
            variable="SQLITE_TMPDIR",
        )
        raise ScratchError(f"{told}. What was committed before stays") from error


def _folder() -> str | None:
    """Return where SQLite puts temporary files: the first that it can write to, in its own order."""
    given = [os.environ[name] for name in ("SQLITE_TMPDIR", "TMPDIR") if name in os.environ]
    usable = (name for name in (*given, "/var/tmp", "/usr/tmp", "/tmp", ".") if os.access(name, os.W_OK | os.X_OK))  # noqa: S108
    return next(usable, None)
