"""Files of records are written again without some samples: what is left is to be trained on."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from rapidin_vdb.choice import Choice, choose
from rapidin_vdb.corpus import Record, read_lines, sample_id_of
from rapidin_vdb.corpus.copies import LineCopy, ParquetCopy
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.ledger import Entry, Names
from rapidin_vdb.new_file import new_file
from rapidin_vdb.records import OnUnscored
from rapidin_vdb.results import CleanReport
from rapidin_vdb.store import SampleTable

_WINDOW = 1024
_LOOKED_UP = 500
_TOLD = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A record on its way from one file to another."""

    name: str | CorpusError
    """Its sample's id, or why it has none."""
    record: Record | CorpusError
    """The record, if it is one."""
    line: str | None
    """Its line, where its file has one for each."""

    @property
    def place(self) -> str:
        """What it is, for messages."""
        if isinstance(self.name, CorpusError) or isinstance(self.record, CorpusError):
            return str(self.name)
        return f"{self.name!r} ({self.record.location})"


@dataclass(kw_only=True)
class _Tally:
    """What became of the records."""

    missing: int
    """Samples of which no record has been seen."""
    written: int = 0
    left_out: int = 0
    deleted: int = 0
    by_id_alone: int = 0
    changed: int = 0
    never: int = 0
    first_changed: str = ""
    first_never: str = ""
    bad: list[str] = field(default_factory=list)
    known: bool = False
    """Whether any record has an id that is, or was, in the database."""


def write_cleaned(
    paths: Sequence[Path], out: Path, table: SampleTable, *, where: str | None = None, ids: Sequence[str] | None = None,
    absent: bool = False, random: int | None = None, seed: int = 1, on_unscored: OnUnscored = "stop",
    id_field: str = "id",
) -> CleanReport:  # fmt: skip
    """Write the records of some files, in order, without those of some samples, and say what was done.

    They are the samples that match a filter, those of some ids, all that are not in the database, or so many that are
    drawn from it at random. Lines of JSON stay as they are, byte for byte, and rows of Arrow tables on their way into
    Parquet; records of other formats become lines of JSON. A record that cannot be one of a sample is kept where all
    but some are, and where it is a line.

    Records that would be left out though they were never scored (with the id of a sample, and another prompt or
    response; with `absent`, of no sample that was ever there) end it, are kept, or are left out, by `on_unscored`.

    Raises:
        CorpusError: a file cannot be read; nothing is written.
        FilterError: the filter cannot be understood; nothing is written.
        SpecError: there is no such sample, or there are not so many; the files are of other ids than the database, some
            of their records were never scored, or `out` is there already, is of another format, cannot be written, or
            cannot hold a value; nothing is written. Or somebody else has made `out` meanwhile: what was written is kept
            beside it.
    """
    _check_format(out)
    some = list[str](), deque[str](maxlen=_LOOKED_UP)
    with (
        closing(Names()) as seen,
        new_file(out) as file,
        choose(table, where=where, ids=ids, absent=absent, random=random, seed=seed, id_field=id_field) as choice,
        closing(ParquetCopy(paths, file) if out.suffix.lower() == ".parquet" else LineCopy(file.write)) as copy,
    ):
        wanted = choice.ledger.there() + len(choice.impossible)
        tally = _Tally(missing=wanted)
        records = _named(paths, id_field)
        while window := list(islice(records, _WINDOW)):
            known = choice.ledger.look(one.name for one in window if isinstance(one.name, str))
            for one in window:
                if isinstance(one.name, str):
                    (some[0] if len(some[0]) < _LOOKED_UP else some[1]).append(one.name)
                    tally.missing -= known[one.name].there is not None and seen.add(one.name)
                kept = _judge(one, known, choice, tally, on_unscored)
                copy.put(one.record, one.line, kept)
                tally.written, tally.left_out = tally.written + kept, tally.left_out + (not kept)
        copy.finish()
        if not absent and tally.missing == wanted:
            _check_belonging(choice, [*some[0], *some[1]], wanted)
        unscored = tuple(_unscored(tally, choice))
        if on_unscored == "stop" and unscored:
            raise SpecError(*unscored, *_ways_out(tally, choice))
        others = (name for name in choice.ledger.each_there() if tally.missing and seen.add(name))
        unfound = tuple(islice(chain(others, choice.impossible), _TOLD))
    return CleanReport(
        written=tally.written, left_out=tally.left_out, not_found=tally.missing, first_not_found=unfound,
        bad=tuple(tally.bad), out=str(out), deleted=tally.deleted, changed=tally.changed, never=tally.never,
        unscored=unscored, by_id_alone=tally.by_id_alone,
        as_text={name: count for name, count in copy.as_text.items() if count},
    )  # fmt: skip


def _check_format(out: Path) -> None:
    suffixes = [suffix.lower() for suffix in out.suffixes]
    if suffixes[-1:] not in ([".jsonl"], [".ndjson"], [".parquet"]) and suffixes[-2:] != [".jsonl", ".gz"]:
        raise SpecError(
            f"--out is {out}; wanted the name of a new file of JSON lines, .jsonl or .jsonl.gz, or of Parquet, .parquet"
        )


def _named(paths: Sequence[Path], id_field: str) -> Iterator[_Found]:
    """Yield the records, each with its sample's id, or why it has none."""
    for lines in [read_lines(path) for path in paths]:
        for record, line in lines:
            name: str | CorpusError
            try:
                if isinstance(record, CorpusError):
                    raise record
                name = sample_id_of(record, id_field=id_field)
            except CorpusError as error:
                name = error
            yield _Found(name=name, record=record, line=line)


def _judge(one: _Found, known: Mapping[str, Entry], choice: Choice, tally: _Tally, on_unscored: OnUnscored) -> bool:
    """Say whether a record is to be kept, and note why where it is not, or would not be."""
    if isinstance(one.name, CorpusError) or isinstance(one.record, CorpusError):
        kept = can_be_kept = one.line is not None or isinstance(one.record, Record)
        if choice.absent and can_be_kept:
            tally.never += 1
            tally.first_never = tally.first_never or one.place
            kept = on_unscored != "leave-out"
        tally.bad.append(f"{one.name} ({'kept' if kept else 'left out'})")
        return kept
    verdict = choice.verdict(one.record, one.name, known[one.name])
    tally.known |= verdict != "never"
    match verdict:
        case "other":
            return True
        case "changed":
            tally.changed += 1
            tally.first_changed = tally.first_changed or one.place
        case "never":
            tally.never += 1
            tally.first_never = tally.first_never or one.place
        case "unknown":
            tally.by_id_alone += 1
            return False
        case "chosen":
            tally.deleted += choice.absent
            return False
    return on_unscored != "leave-out"


def _check_belonging(choice: Choice, names: Sequence[str], wanted: int) -> None:
    """Refuse files in which nothing is to be left out, where they, or the ids, do not seem to be the database's.

    Raises:
        SpecError: they do not.
    """
    if names and not choice.belong(names):
        raise SpecError(
            f"nothing is to be left out of these files, and none of {len(names):,} of their records has an id that is "
            f"in the database, such as {names[0]!r}. Name the field of ids, as for ingest, with --id-field (it is "
            f"{choice.id_field}), or leave out files that were not ingested"
        )
    if choice.deletions_known and not choice.contents.any():
        first = next(chain(choice.ledger.each_there(), choice.impossible))
        raise SpecError(
            f"none of the {wanted:,} ids to be left out is in these files or in the database, such as {first!r}, so "
            "that nothing would be left out; nothing was written. Wanted ids as `query --json` and `show` tell them"
        )


def _unscored(tally: _Tally, choice: Choice) -> Iterator[str]:
    """Yield what is to be told of records that were never scored."""
    if tally.changed:
        what = "record has" if tally.changed == 1 else "records have"
        yield (
            f"{tally.changed:,} {what} the id of a sample that is to be left out, but not the prompt and response that "
            f"were scored under it; the first: {tally.first_changed}"
        )
    if tally.never:
        what = "record is" if tally.never == 1 else "records are"
        why = "never was" if tally.never == 1 else "never were"
        why += ", as what an ingest passes over, or does not reach by its --limit"
        if not choice.deletions_known:
            why = "may never have been: what was deleted is not known any more from before a purge"
        gone = f" ({tally.deleted:,} more had been deleted)" if tally.deleted else ""
        yield f"{tally.never:,} {what} not in the database, and {why}{gone}; the first: {tally.first_never}"


def _ways_out(tally: _Tally, choice: Choice) -> Iterator[str]:
    """Yield what can be done about them."""
    if tally.never and not tally.known:
        yield f"no other is either: if another field holds the ids, name it with --id-field (it is {choice.id_field})"
    them = "it" if tally.changed + tally.never == 1 else "them"
    yield (
        f"nothing was written, for nobody seems to have judged {them}: keep {them} with --on-unscored keep, or leave "
        f"{them} out with --on-unscored leave-out"
    )
