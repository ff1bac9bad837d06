"""Files of records are written again without some samples: what is left is to be trained on."""

import errno
import gzip
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice
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
            than the database; nothing is written. Or somebody else has made `out` meanwhile: what was written is kept
            beside it.
    """
    written = left_out = 0
    bad: list[str] = []
    some = list[str](), deque[str](maxlen=_LOOKED_UP)
    with closing(Ledger()) as ledger, closing(Names()) as seen, _new_file(out) as file:
        # A text with half of a surrogate pair is the id of no sample.
        impossible = dict.fromkeys(name for name in ids if not is_unicode(name))
        ledger.begin((name, "") for name in ids if name not in impossible)
        wanted = missing = ledger.there() + len(impossible)
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
        others = (name for name in ids if missing and name not in impossible and seen.add(name))
        unfound = tuple(islice(chain(others, impossible), _TOLD))
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
    """Open a new file under another name, and give it its own once all of it is on the disk.

    Raises:
        SpecError: it cannot be.
    """
    taken = False
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
            raw.flush()
            os.fsync(raw.fileno())
        partial.chmod(0o666 & ~_umask())
        try:
            _give_name(partial, out)
        except FileExistsError as error:
            taken = True
            raise SpecError(
                f"--out is {out}, which somebody else made meanwhile, and which was left as it is; all that was to be "
                f"written there is in {partial}: give it another name"
            ) from error
    except OSError as error:
        raise SpecError(f"--out is {out}, which cannot be written: {error.strerror or error}") from error
    finally:
        if not taken:
            partial.unlink(missing_ok=True)


def _give_name(partial: Path, out: Path) -> None:
    """Give a file its own name, for good.

    Raises:
        FileExistsError: another file has it.
    """
    try:
        os.link(partial, out)
    except FileExistsError:
        raise
    except OSError:
        # Not every file system knows a second name of one file. An empty file keeps the name until the rename.
        os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            partial.replace(out)
        except OSError:
            out.unlink()
            raise
    else:
        partial.unlink()
    try:
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Nor can every one be asked for a folder's entries to be on the disk.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
