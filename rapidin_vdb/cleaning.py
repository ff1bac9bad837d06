"""Files of records are written again without some samples: what is left is to be trained on."""

import gzip
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from rapidin_vdb.corpus import Record, read_lines, sample_id_of
from rapidin_vdb.errors import CorpusError, SpecError, is_unicode
from rapidin_vdb.ledger import Ledger, Names
from rapidin_vdb.results import CleanReport

_WINDOW = 1024
_LOOKED_UP = 500
_TOLD = 10


def write_cleaned(
    paths: Iterable[Path], out: Path, ids: Sequence[str], *, only: bool = False, id_field: str = "id",
    belong: Callable[[Sequence[str]], bool] = lambda names: True,
) -> CleanReport:  # fmt: skip
    """Write the records of some files, in order, without those of some samples, and say what was done.

    With `only`, those of these samples alone are written. Lines of JSON stay as they are, byte for byte; records of
    other formats become lines of JSON. A record that cannot be one of a sample is kept where all but some are, and
    where it is a line. `belong` says whether any of some ids is one of the database's; it is asked where none of those
    that were to be left out is in the files, about the first and the last of theirs.

    Raises:
        CorpusError: a file cannot be read; nothing is written.
        SpecError: `out` is there already, is of another format, or cannot be written, or the files are of other ids
            than the database; nothing is written.
    """
    written = left_out = 0
    bad: list[str] = []
    some = list[str](), deque[str](maxlen=_LOOKED_UP)
    with closing(Ledger()) as ledger, closing(Names()) as seen, _new_file(out) as file:
        ledger.begin((name, "") for name in ids)
        wanted = missing = ledger.there()
        records = _named(paths, id_field)
        while window := list(islice(records, _WINDOW)):
            known = ledger.look(name for name, _ in window if not isinstance(name, CorpusError))
            for name, line in window:
                if isinstance(name, CorpusError):
                    kept = bool(line) and not only
                    bad.append(f"{name} ({'kept' if kept else 'left out'})")
                else:
                    (some[0] if len(some[0]) < _LOOKED_UP else some[1]).append(name)
                    named = known[name].there is not None
                    missing -= named and seen.add(name)
                    kept = named == only
                if kept:
                    file.write(line.encode("utf-8", "surrogateescape"))
                written, left_out = written + kept, left_out + (not kept)
        seem = [*some[0], *some[1]]
        if seem and wanted and missing == wanted and not only and not belong(seem):
            raise SpecError(
                f"nothing is to be left out of these files, and none of {len(seem):,} of their records has an id "
                f"that is in the database, such as {seem[0]!r}. Name the field of ids, as for ingest, with --id-field "
                f"(it is {id_field}), or leave out files that were not ingested"
            )
        unfound = tuple(islice((name for name in ids if missing and seen.add(name)), _TOLD))
    return CleanReport(
        written=written, left_out=left_out, not_found=missing, first_not_found=unfound, bad=tuple(bad), out=str(out)
    )


def _named(paths: Iterable[Path], id_field: str) -> Iterator[tuple[str | CorpusError, str]]:
    """Yield each record's sample id, or why it has none, and its line, which is empty where there can be none."""
    for lines in [read_lines(path) for path in paths]:
        for record, line in lines:
            if line is None:
                line = _as_line(record) if isinstance(record, Record) else ""
            elif not line.endswith("\n"):
                line += "\n"
            try:
                if isinstance(record, CorpusError):
                    raise record
                yield sample_id_of(record, id_field=id_field), line
            except CorpusError as error:
                yield error, line


def _as_line(record: Record) -> str:
    text = json.dumps(record.fields, ensure_ascii=False, default=str)
    return (text if is_unicode(text) else json.dumps(record.fields, default=str)) + "\n"


@contextmanager
def _new_file(out: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a new file under another name, and give it its own once all of it is written.

    Raises:
        SpecError: it cannot be.
    """
    suffixes = [suffix.lower() for suffix in out.suffixes]
    if suffixes[-1:] not in ([".jsonl"], [".ndjson"]) and suffixes[-2:] != [".jsonl", ".gz"]:
        raise SpecError(f"--out is {out}; wanted the name of a new file of JSON lines, .jsonl or .jsonl.gz")
    if os.path.lexists(out):
        raise SpecError(f"--out is {out}, which is there already; give another name, or remove it first")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise SpecError(f"--out is {out}, which cannot be written: {error.strerror}") from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as raw:
            if suffixes[-1] == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw) as file:
                    yield file
            else:
                yield raw
        partial.chmod(0o666 & ~_umask())
        partial.replace(out)
    except OSError as error:
        raise SpecError(f"--out is {out}, which cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
