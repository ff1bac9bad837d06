"""Samples become rows: every record is checked before the first gradient is taken, and every commit is whole."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rapidin_vdb.corpus import Template, Tokenizer, encode, read_corpus
from rapidin_vdb.errors import CorpusError, GradientError
from rapidin_vdb.gradient import RapidGradMaker
from rapidin_vdb.gradient.rapidgrad import to_half
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded, OnBadRecord, OnDuplicate, Sample
from rapidin_vdb.results import IngestReport
from rapidin_vdb.store import ColumnKind, Row, SampleTable, merge_kinds

# Records checked, encoded and sorted by length together.
_WINDOW = 1024
# A commit is made when this much is waiting: seldom enough to be cheap, often enough to lose little.
_COMMIT_BYTES = 256 << 20
_COMMIT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What to ingest."""

    paths: tuple[Path, ...]
    """Files, in order."""
    split: str | None = None
    """Wins over the records' own field; `train` without either."""
    source: str | None = None
    """Wins over the records' own field."""
    id_field: str = "id"
    """Which field holds the sample id."""
    limit: int | None = None
    """How many records to read at most."""

    def read(self) -> Iterator[Sample | CorpusError]:
        """Yield the samples, an error in the place of each record that cannot be one."""
        samples = read_corpus(self.paths, split=self.split, source=self.source, id_field=self.id_field)
        return islice(samples, self.limit)


@dataclass(kw_only=True)
class _Plan:
    """What the first reading of a corpus found."""

    todo: dict[str, str] = field(default_factory=dict)
    """Content hash of each sample to write, by id."""
    kinds: dict[str, ColumnKind] = field(default_factory=dict)
    """The columns that their fields need."""
    replaced: set[str] = field(default_factory=set)
    """Those of them whose id is in the table, with other content."""
    unchanged: int = 0
    """Samples that are there already."""
    kept: int = 0
    """Samples whose id stands for other content, which stays."""
    bad: list[str] = field(default_factory=list)
    """What is wrong with each record that cannot be stored."""


def ingest(
    table: SampleTable,
    maker: RapidGradMaker,
    corpus: Corpus,
    *,
    tokenizer: Tokenizer,
    template: Template,
    on_bad_record: OnBadRecord = "stop",
    on_duplicate: OnDuplicate = "error",
    progress: Progress = silent,
) -> IngestReport:
    """Write the RapidGrads of a corpus's samples, and say what was done.

    A sample whose id is in the table with the same content is left alone, so that an ingest that was interrupted, or is
    run twice, simply goes on. `on_duplicate` says what to do where the content differs. The corpus is read twice: first
    to check every record, then to take gradients.

    Raises:
        CorpusError: a record cannot be stored, under `on_bad_record="stop"`; nothing is written.
        GradientError: a gradient cannot be, under "stop"; the samples before it are written.
        TableError: a field does not fit its column; nothing is written.
    """
    started = time.monotonic()
    max_tokens = table.fingerprint.max_tokens

    def windows() -> Iterator[list[tuple[Sample, Encoded] | CorpusError]]:
        samples = corpus.read()
        while window := list(islice(samples, _WINDOW)):
            yield _encode_window(window, tokenizer=tokenizer, template=template, max_tokens=max_tokens)

    plan = _make_plan(table, windows(), on_bad_record=on_bad_record, on_duplicate=on_duplicate)
    table.ensure_columns(plan.kinds)
    writer = _Writer(table, replacing=plan.replaced)
    total, done, tokens = len(plan.todo), 0, 0
    progress("ingest", 0, total)
    try:
        for window in windows():
            for sample, encoded in sorted(_wanted(window, plan.todo), key=lambda pair: len(pair[1].input_ids)):
                try:
                    rapidgrad, loss = maker.make(encoded)
                    vector = to_half(rapidgrad, sample_id=sample.sample_id)
                    writer.write(Row(sample=sample, encoded=encoded, loss=loss, vector=vector))
                except GradientError as error:
                    if on_bad_record == "stop":
                        raise
                    plan.bad.append(str(error))
                done, tokens = done + 1, tokens + len(encoded.input_ids)
                progress("ingest", done, total)
    finally:
        # On an error or Ctrl-C too: what has been computed is not lost.
        writer.commit()
    return IngestReport(
        added=writer.added,
        replaced=writer.replaced,
        unchanged=plan.unchanged,
        kept=plan.kept,
        bad=tuple(plan.bad),
        tokens=tokens,
        seconds=time.monotonic() - started,
        table_version=table.snapshot().version,
    )


def _encode_window(
    window: Sequence[Sample | CorpusError], *, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> list[tuple[Sample, Encoded] | CorpusError]:
    samples = [entry for entry in window if isinstance(entry, Sample)]
    encoded = iter(encode(samples, tokenizer=tokenizer, template=template, max_tokens=max_tokens))
    result: list[tuple[Sample, Encoded] | CorpusError] = []
    for entry in window:
        if isinstance(entry, CorpusError):
            result.append(entry)
        else:
            tokens = next(encoded)
            result.append(tokens if isinstance(tokens, CorpusError) else (entry, tokens))
    return result


def _make_plan(
    table: SampleTable,
    windows: Iterator[list[tuple[Sample, Encoded] | CorpusError]],
    *,
    on_bad_record: OnBadRecord,
    on_duplicate: OnDuplicate,
) -> _Plan:
    stored = table.snapshot().content_hashes()
    plan = _Plan()
    for window in windows:
        for entry in window:
            if isinstance(entry, CorpusError):
                if on_bad_record == "stop":
                    raise CorpusError(
                        f"{entry}. Nothing was written; mend it, or pass over such records with: --on-bad-record skip"
                    )
                plan.bad.append(str(entry))
                continue
            sample = entry[0]
            if _decide(plan, sample, stored, table, on_duplicate):
                plan.todo[sample.sample_id] = sample.content_hash
                plan.kinds = merge_kinds(plan.kinds, sample.metadata)
    return plan


def _decide(plan: _Plan, sample: Sample, stored: dict[str, str], table: SampleTable, on_duplicate: OnDuplicate) -> bool:
    """Say whether a sample is to be written, counting it either way."""
    planned = plan.todo.get(sample.sample_id)
    before = planned or stored.get(sample.sample_id)
    if before is None:
        return True
    if before == sample.content_hash:
        plan.unchanged += 1
        return False
    if on_duplicate == "error":
        raise CorpusError(
            f"{sample.location}: sample {sample.sample_id} is "
            + ("already in these files" if planned else "in the database")
            + f" with other content{'' if planned else _differing(table, sample)}. Nothing was written; keep the first "
            "with --on-duplicate skip, take the new one with --on-duplicate replace, or name the field of unique ids "
            "with --id-field"
        )
    if on_duplicate == "skip":
        plan.kept += 1
        return False
    if planned is None:
        plan.replaced.add(sample.sample_id)
    return True


def _differing(table: SampleTable, sample: Sample) -> str:
    stored = table.snapshot().samples([sample.sample_id]).get(sample.sample_id)
    if stored is None:
        return ""
    names = [
        name for name in ("prompt", "response", "split", "source") if getattr(stored, name) != getattr(sample, name)
    ]
    return f" (its {' and '.join(names or ['other fields'])} differ)"


def _wanted(window: list[tuple[Sample, Encoded] | CorpusError], todo: dict[str, str]) -> list[tuple[Sample, Encoded]]:
    """Take the planned samples of a window off the plan; of two with one id, the one that the plan settled on."""
    wanted = []
    for entry in window:
        if not isinstance(entry, CorpusError) and todo.get(entry[0].sample_id) == entry[0].content_hash:
            del todo[entry[0].sample_id]
            wanted.append(entry)
    return wanted


class _Writer:
    """Gathers rows and commits them, many at a time."""

    def __init__(self, table: SampleTable, *, replacing: set[str]) -> None:
        self.added = 0
        self.replaced = 0
        self._table = table
        self._replacing = replacing
        self._rows: list[Row] = []
        self._bytes = 0
        self._since = time.monotonic()

    def write(self, row: Row) -> None:
        self._rows.append(row)
        self._bytes += row.vector.nbytes
        if self._bytes >= _COMMIT_BYTES or time.monotonic() - self._since >= _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        if self._rows:
            replaced = sum(row.sample.sample_id in self._replacing for row in self._rows)
            if replaced:
                self._table.replace(self._rows)
            else:
                self._table.append(self._rows)
            self.added, self.replaced = self.added + len(self._rows) - replaced, self.replaced + replaced
        self._rows, self._bytes, self._since = [], 0, time.monotonic()
