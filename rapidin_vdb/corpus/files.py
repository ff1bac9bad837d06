"""Files of any known format become records, one at a time; a malformed one is handed on as an error, not raised.

JSON lines, JSON arrays (either may be gzipped), CSV, Parquet, and Hugging Face datasets saved on disk.
"""

import csv
import gzip
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from os import PathLike
from pathlib import Path
from typing import Any

from rapidin_vdb.errors import CorpusError, SpecError

_FORMATS = ".jsonl, .ndjson, .json or .csv (each also .gz), .parquet, or a folder saved by datasets.save_to_disk"
_JSON = (".jsonl", ".json", ".ndjson")

# What a reader calls a number: not 007, 1_000, nan or " 1", which Python would take for one.
_INT = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# An address, also one that became a path, in which two slashes are one. A single letter is a drive.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,3})(?!/)(.*)", re.DOTALL)
_TEXTS = frozenset("id instruction input output prompt response completion generation text split source".split())


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record as it stands in a file."""

    location: str
    """File and line (or row), for messages."""
    fields: dict[str, Any]
    """Names and values."""


def paths_of(files: Sequence[str | Path]) -> tuple[Path, ...]:
    """Return the paths of files.

    Raises:
        CorpusError: one of them is the address of something elsewhere.
        SpecError: one of them is something else, such as a list of names.
    """
    for file in files:
        if not isinstance(file, str | PathLike):
            raise SpecError(f"a file is of type {type(file).__name__}; wanted names: ingest('a.jsonl', 'b.jsonl')")
        if _ADDRESS.fullmatch(str(file)) and not _is(Path(file), lambda mode: True):
            raise _not_there(file)
    return tuple(map(Path, files))


def read_records(path: Path) -> Iterator[Record | CorpusError]:
    """Yield the records of a file in order, an error in the place of each that is malformed.

    Raises:
        CorpusError: the file is missing, of no known format, or cannot be read at all.
    """
    if _is(path, stat.S_ISDIR):
        return _read_saved_dataset(path)
    if not _is(path, stat.S_ISREG):
        raise _not_there(path)
    match _suffix(path):
        case suffix if suffix in _JSON:
            return (record for record, _ in _read_json(path))
        case ".csv":
            return _read_csv(path)
        case ".parquet":
            return _read_parquet(path)
        case suffix:
            raise CorpusError(f"{path}: {suffix or 'no suffix'} is no known format; wanted {_FORMATS}")


def read_lines(path: Path) -> Iterator[tuple[Record | CorpusError, str | None]]:
    """Yield the records of a file, as `read_records` does, each with its line where the file has one for each.

    Bytes of a line that are no UTF-8 are half of surrogate pairs in it.

    Raises:
        CorpusError: the file is missing, of no known format, or cannot be read at all.
    """
    if _is(path, stat.S_ISREG) and _suffix(path) in _JSON:
        return _read_json(path)
    return ((record, None) for record in read_records(path))


def _not_there(file: str | PathLike[str]) -> CorpusError:
    """Return the error of a file that is not there: an address as it was given, as far as a path still has it."""
    found = _ADDRESS.fullmatch(str(file))
    if found is None:
        return CorpusError(f"{file}: no such file")
    scheme, slashes, rest = found.groups()
    if len(slashes) == 1:
        slashes = "///" if scheme.lower() == "file" else "//"
    return CorpusError(
        f"{scheme}:{slashes}{rest}: this is an address, and records are read from files of this machine; copy it here, "
        "or mount what holds it, and give its path"
    )


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    """Say whether a path leads to something of a kind.

    Raises:
        CorpusError: that cannot be seen, as in a folder that must not be entered.
    """
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise CorpusError(f"{path}: cannot be read: {error}") from error


def _suffix(path: Path) -> str:
    """Return what names a file's format, that of compression aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open_text(path: Path, newline: str | None = None) -> TextIOWrapper:
    # Undecodable bytes become surrogates, which the check of each record then finds and places.
    if path.suffix.lower() == ".gz":
        return TextIOWrapper(gzip.open(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _read_json(path: Path) -> Iterator[tuple[Record | CorpusError, str | None]]:
    try:
        with _open_text(path) as file:
            first = next((character for line in file for character in line if not character.isspace()), "")
        if first == "[":
            yield from ((record, None) for record in _read_json_array(path))
        else:
            yield from _read_json_lines(path)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error


def _read_json_lines(path: Path) -> Iterator[tuple[Record | CorpusError, str]]:
    with _open_text(path, newline="") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            try:
                value = json.loads(line.rstrip())  # else what is missing at the end is missed in the next line
            except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
                what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                yield CorpusError(f"{location}: not JSON: {what}"), line
                continue
            yield _record(location, value), line


def _read_json_array(path: Path) -> Iterator[Record | CorpusError]:
    with _open_text(path) as file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise CorpusError(f"{path}{line}: not JSON: {error}") from error
    for number, value in enumerate(values, start=1):
        yield _record(f"{path}, element {number}", value)


def _record(location: str, value: Any) -> Record | CorpusError:
    if not isinstance(value, dict):
        return CorpusError(f"{location}: found {_kind(value)}; wanted an object with named fields")
    return Record(location=location, fields=value)


def _kind(value: Any) -> str:
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _read_csv(path: Path) -> Iterator[Record | CorpusError]:
    csv.field_size_limit(2**31 - 1)
    kinds = _csv_kinds(path)
    for location, names, row in _csv_rows(path):
        if len(row) != len(names):
            yield CorpusError(f"{location}: {len(row)} values; wanted {len(names)} ({', '.join(names)})")
            continue
        yield Record(
            location=location,
            fields={name: _csv_value(value, kinds[name]) for name, value in zip(names, row, strict=True)},
        )


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    line = 1
    try:
        with _open_text(path, newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            if len(set(names)) != len(names):
                raise CorpusError(f"{path}, line 1: a column name stands twice in: {', '.join(names)}")
            line = reader.line_num + 1
            for row in reader:
                if row:
                    yield f"{path}, line {line}", names, row
                line = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(f"{path}, in the row that begins in line {line}: not CSV: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error


def _csv_kinds(path: Path) -> dict[str, type]:
    """CSV has no types: a column is of the narrowest of int, float and text that fits all its values."""
    kinds: dict[str, type] = {}
    for _, names, row in _csv_rows(path):
        if len(row) != len(names):  # a comma too many shifts values into other columns, and it is a bad record anyway
            continue
        for name, value in zip(names, row, strict=True):
            kind = kinds.setdefault(name, str if name in _TEXTS else int)
            if kind is int and value and not _INT.fullmatch(value):
                kind = float
            elif kind is not str and _INT.fullmatch(value) and (len(value) > 20 or not -(2**63) <= int(value) < 2**63):
                kind = str  # no number would keep all of its digits
            if kind is float and value and not _FLOAT.fullmatch(value):
                kind = str
            kinds[name] = kind
    return kinds


def _csv_value(value: str, kind: type) -> Any:
    return value if kind is str else kind(value) if value else None


def _read_parquet(path: Path) -> Iterator[Record | CorpusError]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _arrow_records(path, file.iter_batches(batch_size=1024))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise CorpusError(f"{path}: not readable as Parquet: {error}") from error


def _read_saved_dataset(path: Path) -> Iterator[Record | CorpusError]:
    import pyarrow

    if _is(path / "dataset_dict.json", stat.S_ISREG):
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        example = f", as in: {path / splits[0]} --split {splits[0]}" if splits else ""
        raise CorpusError(f"{path}: holds the splits {', '.join(splits) or 'none'}; ingest one at a time{example}")
    if not _is(path / "state.json", stat.S_ISREG):
        raise CorpusError(f"{path}: a folder without state.json; wanted {_FORMATS}")
    try:
        names = [entry["filename"] for entry in json.loads((path / "state.json").read_text("utf-8"))["_data_files"]]
        first = 0
        for name in names:
            with pyarrow.memory_map(str(path / name)) as file, pyarrow.ipc.open_stream(file) as batches:
                for batch in batches:
                    yield from _arrow_records(path, [batch], first=first)
                    first += batch.num_rows
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise CorpusError(f"{path}: not readable as a saved dataset: {error}") from error


def _arrow_records(path: Path, batches: Any, first: int = 0) -> Iterator[Record | CorpusError]:
    for batch in batches:
        for number, fields in enumerate(batch.to_pylist(), start=first):
            yield Record(location=f"{path}, row {number}", fields=fields)
        first += batch.num_rows
