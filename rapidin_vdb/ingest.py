"""Samples become rows: every record is checked before the first gradient is taken, and every commit is whole."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing

from rapidin_vdb.batches import Pair
from rapidin_vdb.compute import Compute
from rapidin_vdb.corpus import Template, Tokenizer
from rapidin_vdb.engine import Made
from rapidin_vdb.errors import CorpusError, GradientError, RapidInError, TableError
from rapidin_vdb.intake import Corpus, encoded_windows
from rapidin_vdb.ledger import Entry, Ledger
from rapidin_vdb.locks import keeping, wait
from rapidin_vdb.plan import Plan, make_plan, planned_windows
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded, OnBadRecord, OnDeleted, OnDuplicate, Sample
from rapidin_vdb.results import IngestReport
from rapidin_vdb.store import Row, SampleTable, Snapshot, TokenRows, may_pass

logger = logging.getLogger(__name__)

# A commit is made when this much is waiting: seldom enough to be cheap, often enough to lose little.
_COMMIT_BYTES = 64 << 20
_COMMIT_SECONDS = 60.0
# Between two tries of a commit that failed.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
# What a row takes besides its vector while it waits, as Python's objects: its record, each token id, each span.
_RECORD_BYTES, _ID_BYTES, _SPAN_BYTES = 2048, 36, 120


def ingest(
    table: SampleTable,
    corpus: Corpus,
    compute: Compute,
    *,
    tokenizer: Tokenizer,
    template: Template,
    batch_tokens: int,
    on_bad_record: OnBadRecord = "stop",
    on_duplicate: OnDuplicate = "error",
    on_deleted: OnDeleted = "add",
    token_width: int | None = None,
    progress: Progress = silent,
) -> IngestReport:
    """Write the RapidGrads of a corpus's samples, and say what was done.

    A sample whose id is in the table with the same content is left alone, so that an ingest that was interrupted, or is
    run twice, simply goes on. `on_duplicate` says what to do where the content differs. The corpus is read twice: first
    to check every record, then to take gradients. With `token_width`, `compute` makes RapidGrads of single tokens too;
    samples that are in the table without them get them.

    Raises:
        CorpusError: a record cannot be stored, under `on_bad_record="stop"`; nothing is written. Or another ingest has
            written other content under one of the ids meanwhile, under `on_duplicate="error"`, or a file was changed
            meanwhile; the rest is written.
        GradientError: a gradient cannot be, under "stop"; the samples before it are written.
        TableError: a field does not fit its column; nothing is written.
    """
    started = time.monotonic()
    max_tokens = table.fingerprint.max_tokens

    def windows() -> Iterator[list[Pair | CorpusError]]:
        return encoded_windows(corpus, tokenizer=tokenizer, template=template, max_tokens=max_tokens)

    table.check_writable()
    with closing(Ledger()) as ledger:
        plan = make_plan(
            table,
            windows(),
            ledger,
            on_bad_record=on_bad_record,
            on_duplicate=on_duplicate,
            on_deleted=on_deleted,
            token_gradients=token_width is not None,
            progress=progress,
        )
        plan.seen = table.ensure_columns(plan.kinds, seen=plan.seen)
        if token_width is not None:
            table.tokens.ensure(token_width)
        writer = _Writer(table, plan.seen, on_duplicate)
        planned = planned_windows(windows(), ledger, batch_tokens, width=table.fingerprint.sketch.width)
        tokens = _write(planned, plan, compute, writer, on_bad_record, progress)
    read = plan.read_records() | {"unchanged": plan.unchanged + writer.unchanged, "kept": plan.kept + writer.kept}
    return IngestReport(
        **read,
        added=writer.added,
        replaced=writer.replaced,
        tokens=tokens,
        token_gradients=writer.token_gradients,
        seconds=time.monotonic() - started,
        table_version=table.snapshot().version,
    )


def _write(
    planned: Iterator[tuple[list[Pair], dict[str, Entry]]],
    plan: Plan,
    compute: Compute,
    writer: "_Writer",
    on_bad_record: OnBadRecord,
    progress: Progress,
) -> int:
    """Take the gradients of what is planned and write them; return how many tokens went through the model."""
    done = tokens = 0
    in_flight: dict[str, tuple[Sample, Entry]] = {}

    def batches() -> Iterator[list[Encoded]]:
        for batch, entries in planned:
            in_flight.update({sample.sample_id: (sample, entries[sample.sample_id]) for sample, _ in batch})
            yield [encoded for _, encoded in batch]

    progress("ingest", 0, plan.samples)
    try:
        for batch, results in compute(batches()):
            for encoded, result in zip(batch, results, strict=True):
                sample, entry = in_flight.pop(encoded.sample_id)
                done, tokens = done + 1, tokens + len(encoded.input_ids)
                if not isinstance(result, GradientError):
                    writer.add(sample, encoded, result, entry)
                elif on_bad_record == "stop":
                    raise GradientError(
                        f"{sample.location}: {result}. What was done before is kept; pass over such samples with: "
                        "--on-bad-record skip"
                    )
                else:
                    plan.bad.append(f"{sample.location}: {result}")
            # Between batches only: a run that was killed has whole batches in the table, and forms the same again.
            writer.commit_if_due()
            progress("ingest", done, plan.samples)
            progress("tokens", tokens, max(plan.tokens, tokens))
        writer.commit()
    except BaseException as error:
        writer.commit_behind(error)
        raise
    if done < plan.samples:
        raise CorpusError(
            f"{plan.samples - done:,} of {plan.samples:,} samples that were read first were not in the files when they "
            "were read again: a file was changed meanwhile. What was done is kept; run it again"
        )
    return tokens


class _Writer:
    """Gathers rows and commits them, many at a time."""

    def __init__(self, table: SampleTable, seen: int, on_duplicate: OnDuplicate) -> None:
        self.added = 0
        self.replaced = 0
        self.unchanged = 0
        self.kept = 0
        self.token_gradients = 0
        self._table = table
        self._on_duplicate = on_duplicate
        self._seen = seen
        self._rows: list[Row] = []
        self._replacing: set[str] = set()
        """The ids of those of them that take the place of other content."""
        self._tokens: list[TokenRows] = []
        self._bytes = 0
        self._since = time.monotonic()
        self._gave_up = False

    def add(self, sample: Sample, encoded: Encoded, made: Made, entry: Entry) -> None:
        if not entry.tokens_only:
            if entry.replaces:
                self._replacing.add(sample.sample_id)
            self._rows.append(Row(sample=sample, encoded=encoded, vector=made.vector, loss=made.loss))
            self._bytes += made.vector.nbytes
        self._bytes += len(sample.prompt or "") + len(sample.response)
        self._bytes += _RECORD_BYTES + _ID_BYTES * len(encoded.input_ids) + _SPAN_BYTES * len(encoded.offsets)
        if made.tokens is not None:
            self._tokens.append(TokenRows(encoded=encoded, content_hash=sample.content_hash, vectors=made.tokens))
            self._bytes += made.tokens.nbytes

    def commit_if_due(self) -> None:
        if self._bytes >= _COMMIT_BYTES or time.monotonic() - self._since >= _COMMIT_SECONDS:
            self.commit()

    def commit(self, *, patient: bool = True) -> None:
        """Commit what waits; where that fails in an object store, again, as long as its patience lasts.

        Raises:
            TableError: it failed to the last; nothing that waits is tried once more.
        """
        until, pause = math.nan, _FIRST_PAUSE
        with keeping():
            while (self._rows or self._tokens) and not self._gave_up:
                waiting = self._rows, self._replacing, self._tokens, self._seen
                done = self.added, self.replaced, self.unchanged, self.kept
                begun = time.monotonic()
                try:
                    with self._table.committing():
                        until += time.monotonic() - begun  # what a lock was waited for is no part of it
                        self._commit_tokens()
                        self._commit_rows()
                except TableError as error:
                    if math.isnan(until):
                        until = time.monotonic() + (self._table.place.patience if patient else 0)
                    if time.monotonic() + pause > until or not may_pass(error):
                        self._gave_up = True
                        raise
                    # What came to be written all the same is passed over then, as if another had written it: it is
                    # looked for behind the version that was seen before. (Tokens that were are not counted again.)
                    self._rows, self._replacing, self._tokens, self._seen = waiting
                    self.added, self.replaced, self.unchanged, self.kept = done
                    logger.warning("%s; it is tried again", error)
                    wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
        self._bytes = 0
        self._since = time.monotonic()

    def commit_behind(self, error: BaseException) -> None:
        """Commit what waits behind an error, or a Ctrl-C: what has been computed is not lost.

        Raises:
            TableError: it is; both are told.
        """
        try:
            self.commit(patient=isinstance(error, Exception))
        except Exception as later:
            if isinstance(error, RapidInError):
                raise TableError(f"{error}; and what was done since the last commit is lost: {later}") from error
            raise
        except BaseException:  # in the middle of a pause
            self.commit(patient=False)
            raise

    # Both are emptied first: a Ctrl-C in the middle must not write rows a second time that Lance goes on to write.

    def _commit_tokens(self) -> None:
        tokens, self._tokens = self._tokens, []
        snapshot = self._table.snapshot() if tokens else None
        if snapshot is not None and snapshot.version != self._seen:
            tokens = self._still_wanted(tokens, snapshot)
        if tokens:
            # Before their samples: a sample whose tokens were asked for is never there without them.
            self.token_gradients += self._table.tokens.write(tokens)

    def _still_wanted(self, tokens: list[TokenRows], newest: Snapshot) -> list[TokenRows]:
        """Return those whose samples others have not deleted or replaced meanwhile."""
        coming = {row.sample.sample_id for row in self._rows}
        # Of samples that come with them, what others wrote is enough; those that were there may be gone.
        there = self._table.written_since(sorted(coming), seen=self._seen)
        if others := [entry.encoded.sample_id for entry in tokens if entry.encoded.sample_id not in coming]:
            there |= dict(newest.each_content(others))

        def wanted(entry: TokenRows) -> bool:
            name = entry.encoded.sample_id
            if name not in there:
                return name in coming
            return there[name] == entry.content_hash or (name in coming and self._on_duplicate == "replace")

        return [entry for entry in tokens if wanted(entry)]

    def _commit_rows(self) -> None:
        (rows, self._rows), (replacing, self._replacing) = (self._rows, []), (self._replacing, set())
        if not rows:
            return
        if replacing:
            self._replace(rows, len(replacing))
            return
        done = self._table.append(rows, seen=self._seen)
        self._seen = done.seen
        self.added, self.unchanged = self.added + done.written, self.unchanged + done.unchanged
        if not done.other:
            return
        if self._on_duplicate == "replace":
            self._replace(list(done.other), len(done.other))
        elif self._on_duplicate == "skip":
            self.kept += len(done.other)
        else:
            first = done.other[0].sample
            raise CorpusError(
                f"{first.location}: sample {first.sample_id} was written with other content while this ingest went on"
                + (f", and {len(done.other) - 1} more" if len(done.other) > 1 else "")
                + ". What was done besides is kept; run it again, and keep the first with --on-duplicate skip, or take "
                "the new one with --on-duplicate replace"
            )

    def _replace(self, rows: list[Row], replaced: int) -> None:
        self._seen = self._table.replace(rows, seen=self._seen)
        self.added, self.replaced = self.added + len(rows) - replaced, self.replaced + replaced
