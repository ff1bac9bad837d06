"""Records of some files on their way into a new one: as lines of JSON, or as rows of Parquet, no value touched."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from rapidin_vdb.corpus.files import Record, read_records
from rapidin_vdb.errors import CorpusError, SpecError, is_unicode

# Rows of one row group: so many at the least, or so many bytes.
_GROUP_ROWS = 1 << 16
_GROUP_BYTES = 64 << 20


class LineCopy:
    """Some records on their way into a file of JSON lines; what is a line stays as it is, byte for byte."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        """Begin; `write` is the new file's."""
        self._write = write
        self.as_text = Counter[str]()
        """Fields with values that JSON cannot hold, such as times, and how many records have them as texts now."""

    def put(self, record: Record | CorpusError, line: str | None, kept: bool) -> None:
        """Take the next record, or pass over it.

        Raises:
            SpecError: it holds a number that JSON does not know.
        """
        if not kept:
            return
        if line is None and isinstance(record, Record):
            line = self._as_line(record)
        elif line is not None and not line.endswith("\n"):
            line += "\n"
        self._write((line or "").encode("utf-8", "surrogateescape"))

    def finish(self) -> None:
        """Do nothing: every line is written at once."""

    def close(self) -> None:
        """Do nothing."""

    def _as_line(self, record: Record) -> str:
        try:
            text = json.dumps(record.fields, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            for name, value in record.fields.items():
                self.as_text[name] += _has_texts(value, f"{record.location}: the field {name}")
            text = json.dumps(record.fields, ensure_ascii=False, default=str)
        return (text if is_unicode(text) else json.dumps(record.fields, default=str)) + "\n"


def _has_texts(value: Any, place: str) -> bool:
    """Say whether a value, or a part of it, becomes a text in JSON that is none.

    Raises:
        SpecError: it holds a number that JSON does not know.
    """
    others = list[str]()

    def noted(other: Any) -> str:
        others.append(str(other))
        return others[-1]

    try:
        json.dumps(value, allow_nan=False, default=noted)
    except ValueError as error:
        raise SpecError(
            f"{place} holds a number that is not finite, which JSON cannot hold; nothing was written. Write Parquet if "
            "all files are Parquet or saved datasets (--out FILE.parquet), which keeps every value, or mend this one"
        ) from error
    return bool(others)


class ParquetCopy:
    """Some rows of some files on their way into one Parquet file, which has their schema."""

    def __init__(self, paths: Sequence[Path], file: IO[bytes]) -> None:
        """Look at all files, and begin the new one.

        Raises:
            CorpusError: a file cannot be read.
            SpecError: one is of another format, or has other columns than the first, or such as Parquet does not know.
        """
        import pyarrow.parquet

        for path in paths:
            if not is_arrow(path):
                raise SpecError(
                    f"--out is a Parquet file, and {path} is none, nor a saved dataset; write JSON lines, or clean it "
                    "by itself"
                )
            # What is wrong with a file is told as by an ingest.
            next(iter(read_records(path)), None)
        first, *others = [(path, _schema(path)) for path in paths]
        for path, schema in others:
            if not schema.equals(first[1]):
                raise SpecError(f"{path} has other columns than {first[0]}; clean them one at a time")
        self.as_text = Counter[str]()
        """None: every value stays what it is."""
        self._schema = first[1]
        self._rows = (batch for path in paths for batch in _batches(path) if batch.num_rows)
        self._batch: Any = None
        self._kept: list[bool] = []
        self._waiting: list[Any] = []
        self._rows_waiting = self._bytes_waiting = 0
        with _written():
            self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)

    def put(self, record: Record | CorpusError, line: str | None, kept: bool) -> None:
        """Take the next row, or pass over it.

        Raises:
            CorpusError: there is none, or it cannot be read.
            SpecError: it cannot be written.
        """
        if self._batch is None:
            self._batch = next(self._rows, None)
        if self._batch is None:
            raise _changed()
        self._kept.append(kept)
        if len(self._kept) == self._batch.num_rows:
            # Not `filter`, which does not know every type of column.
            self._waiting += [self._batch.slice(start, end - start) for start, end in _runs(self._kept)]
            self._rows_waiting += sum(self._kept)
            self._bytes_waiting += self._batch.nbytes
            self._batch, self._kept = None, []
            if self._rows_waiting >= _GROUP_ROWS or self._bytes_waiting >= _GROUP_BYTES:
                self._write()

    def finish(self) -> None:
        """Write what is left.

        Raises:
            CorpusError: there are rows of which nothing was said.
            SpecError: it cannot be written.
        """
        if self._batch is not None or next(self._rows, None) is not None:
            raise _changed()
        if self._waiting:
            self._write()
        with _written():
            self._writer.close()

    def close(self) -> None:
        """Let go of the file, which the writer would go on to write when it is closed."""
        import pyarrow

        with suppress(pyarrow.ArrowException, OSError, ValueError):
            self._writer.close()
        self._writer.is_open = False

    def _write(self) -> None:
        import pyarrow

        with _written():
            self._writer.write_table(pyarrow.Table.from_batches(self._waiting, self._schema))
        self._waiting, self._rows_waiting, self._bytes_waiting = [], 0, 0


def is_arrow(path: Path) -> bool:
    """Say whether a file's records are rows of Arrow tables: Parquet, or a dataset saved on disk."""
    return path.suffix.lower() == ".parquet" or path.is_dir()


def _runs(kept: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield the half-open spans of what is kept.

    >>> list(_runs([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    borders = [number for number, (left, right) in enumerate(pairwise([False, *kept, False])) if left != right]
    yield from zip(borders[::2], borders[1::2], strict=True)


def _schema(path: Path) -> Any:
    import pyarrow.parquet

    with _read(path):
        if path.is_dir():
            with _opened(_parts(path)[0]) as rows:
                return rows.schema
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.schema_arrow


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with _read(path):
        if path.is_dir():
            for part in _parts(path):
                with _opened(part) as rows:
                    yield from rows
        else:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=1024)


def _parts(path: Path) -> list[Path]:
    """Return the files of a saved dataset, in order."""
    return [path / entry["filename"] for entry in json.loads((path / "state.json").read_text("utf-8"))["_data_files"]]


@contextmanager
def _opened(part: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(part)) as file, pyarrow.ipc.open_stream(file) as rows:
        yield rows


@contextmanager
def _read(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, TypeError) as error:
        what = "a saved dataset" if path.is_dir() else "Parquet"
        raise CorpusError(f"{path}: not readable as {what}: {error}") from error


@contextmanager
def _written() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise SpecError(f"--out cannot be written as Parquet: {error}; write JSON lines") from error


def _changed() -> CorpusError:
    return CorpusError("a file was changed while it was read; run it again")
