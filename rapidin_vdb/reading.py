"""The samples of a database, for reading: what needs neither a model nor an index."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidin_vdb.arguments import one_of, whole
from rapidin_vdb.cleaning import write_cleaned
from rapidin_vdb.corpus import Restorer, paths_of, plain_record, taken_apart, turns_of
from rapidin_vdb.errors import SampleNotFoundError, SpecError, UnfitError
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Fingerprint, Message, OnUnscored, Sample, Scalar
from rapidin_vdb.results import CleanReport, DatabaseInfo, IndexInfo, KeptVersion, StoredSample
from rapidin_vdb.store import SampleTable, Since, Snapshot, TokenSnapshot, undisturbed

# Records between two words on how far an export is.
_RECORDS_A_WORD = 500


class SampleReader:
    """Shows, counts and pages through samples."""

    def __init__(self, table: SampleTable) -> None:
        self._table = table

    @property
    def path(self) -> str:
        """Where the database is."""
        return self._table.uri

    @property
    def fingerprint(self) -> Fingerprint:
        """What its vectors were made with."""
        return self._table.fingerprint

    @property
    def identity(self) -> str:
        """What tells it from other databases, also from one that was made anew at its place."""
        return self._table.identity

    @undisturbed
    def versions(self) -> list[KeptVersion]:
        """Return the versions that `as_of` can name, oldest first; every commit makes one, also that of a look-up."""
        return self._table.snapshot().history()

    @property
    def version(self) -> int:
        """The number of the newest version."""
        return self._table.snapshot().version

    @undisturbed
    def written_since(self, version: int, sample_ids: Sequence[str]) -> list[str]:
        """Return which of some samples came, or were replaced, after a version, and are there now; sorted.

        What was ranked then may be another text by now.
        """
        return sorted(Since(version).contents(self._table.snapshot(), list(sample_ids)))

    @property
    def bytes(self) -> int:
        """How much its files take, those of indexes that lie beside them included."""
        return self._table.place.bytes()

    @undisturbed
    def show(self, sample_id: str) -> StoredSample:
        """Return a sample as it is stored, without its vector.

        Raises:
            TableError: there is none of that id.
        """
        found = self._table.snapshot().samples([sample_id])
        if sample_id not in found:
            raise SampleNotFoundError(f"no sample {sample_id!r} in {self.path}")
        return found[sample_id]

    @undisturbed
    def show_turns(self, sample_id: str) -> tuple[StoredSample, tuple[Message, ...]]:
        """Return a sample as it is stored, and its turns where it is a conversation, as far as the texts show them.

        Raises:
            TableError: there is none of that id.
        """
        found = self._table.snapshot().restorable(sample_id)
        if found is None:
            raise SampleNotFoundError(f"no sample {sample_id!r} in {self.path}")
        record, _ = _record_of(*found, Restorer())
        return found[0], turns_of(record, sample_id)

    @undisturbed
    def samples(self, *, where: str | None = None, offset: int = 0, limit: int = 50) -> tuple[list[StoredSample], int]:
        """Return some of the samples that match a filter, in the table's order, and how many match.

        Raises:
            FilterError: the filter cannot be understood.
            SpecError: `offset` or `limit` is negative.
        """
        if offset < 0 or limit < 0:
            raise SpecError(f"offset is {offset} and limit {limit}; wanted 0 or more")
        snapshot = self._table.snapshot()
        total = snapshot.count(where)
        # Lance takes no number beyond 32 bits.
        page = snapshot.page(where, offset=offset, limit=min(limit, total)) if offset < total else []
        return page, total

    @undisturbed
    def count(self, where: str | None = None) -> int:
        """Return how many samples there are, or how many match a filter.

        Raises:
            FilterError: the filter cannot be understood.
        """
        return self._table.snapshot().count(where)

    def each_record(
        self, *, where: str | None = None, sums: Mapping[str, int] | None = None, progress: Progress = silent
    ) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """Yield id and record of the samples that match a filter, in the table's order, all of one committed version.

        A third value says whether it is the very record that was read, but for the order of its fields: lists, objects
        and whatever else was not kept may be missing. `sums` are checksums of the texts that samples of some ids are
        known to have: CRC-32 of the prompt (empty where there is none), a zero, and the response, in UTF-8.

        Raises:
            FilterError: the filter cannot be understood.
            UnfitError: samples of those ids have other texts; all were yielded before.
            PurgedError: a purge removed that version before all of it was read.
        """
        snapshot, restorer = self._table.snapshot(), Restorer()
        total, known, other = snapshot.count(where), sums or {}, list[str]()
        progress("records", 0, total)
        for number, (stored, content_hash, several) in enumerate(snapshot.each(where), 1):
            yield stored.sample_id, *_record_of(stored, content_hash, several, restorer)
            if number % _RECORDS_A_WORD == 0 or number == total:
                progress("records", number, total)
            if stored.sample_id in known and known[stored.sample_id] != _sum_of(stored):
                other.append(stored.sample_id)
        if other:
            raise UnfitError(
                f"{len(other):,} of the samples to be left out have other texts by now than when they were marked, "
                f"such as {other[0]}: look at them again, and mark anew what is still wrong; nothing is written"
            )

    def clean(
        self, *files: str | Path, out: str | Path, where: str | None = None, ids: Sequence[str] | None = None,
        absent: bool = False, random: int | None = None, seed: int = 1, on_unscored: OnUnscored = "stop",
        id_field: str = "id",
    ) -> CleanReport:  # fmt: skip
        """Write the records of some files to a new one, without those of some samples, and say what was done.

        They are the samples that match a filter, or those of some ids, as for `delete`; or all that are not in the
        database (any more), if `absent`; or so many as `random` says, drawn from the newest version, all alike and none
        twice: what a removal is compared with. The same samples and `seed` give the same draw on every machine.

        Lines of JSON stay byte for byte, and other formats become such lines; but Parquet files and saved datasets stay
        what they are where `out` ends with `.parquet`.

        What would be left out though it was never scored ends it before anything is written; by `on_unscored` it is
        kept, or left out. That is a record with the id of a sample, and another prompt or response; and, if `absent`,
        one that was never in the database, as far as kept versions show.

        Raises:
            CorpusError: a file cannot be read; nothing is written.
            FilterError: the filter cannot be understood; nothing is written.
            SpecError: not one of the four is given, none of the samples is there, or not so many are, records were
                never scored, a value cannot be written, `out` cannot be a new file, or nothing is found in files that
                do not seem to be the database's; nothing is written.
        """
        if (where is not None) + (ids is not None) + absent + (random is not None) != 1:
            raise SpecError("give one of: --where SQL, --ids FILE, --absent, or --random N")
        if not files:
            raise SpecError("no file to clean")
        one_of("on-unscored", on_unscored, OnUnscored)
        random, seed = None if random is None else whole("--random", random, 1), whole("--seed", seed, 0)
        return write_cleaned(
            paths_of(files), Path(out), self._table, where=where, ids=ids_of(ids), absent=absent,
            random=random, seed=seed, on_unscored=on_unscored, id_field=id_field,
        )  # fmt: skip

    @undisturbed
    def values_of(self, column: str, *, most: int = 100) -> list[Scalar] | None:
        """Return the different values of a column, sorted; None where there are more than `most`.

        Raises:
            FilterError: there is no such column.
        """
        return self._table.snapshot().values_of(column, most=most)


def _sum_of(stored: StoredSample) -> int:
    return zlib.crc32(f"{stored.prompt or ''}\0{stored.response}".encode())


def _record_of(
    stored: StoredSample, content_hash: str, several: bool, restorer: Restorer
) -> tuple[dict[str, Any], bool]:
    """Return the record of a stored sample, and whether it is the very one that was read."""
    sample = Sample(
        sample_id=stored.sample_id,
        prompt=stored.prompt,
        response=stored.response,
        split=stored.split,
        source=stored.source,
        metadata=stored.metadata,
        turns=taken_apart(stored.response, stored.token_offsets) if several else (),
        content_hash=content_hash,
    )
    record = restorer.restored(sample)
    return plain_record(sample) if record is None else record, record is not None


def info_of(
    snapshot: Snapshot, tokens: TokenSnapshot | None, *, built: tuple[IndexInfo, ...], size: int
) -> DatabaseInfo:
    """Return what `info` says of a version of a database, whose files take `size` bytes."""
    stored = snapshot.fingerprint
    return DatabaseInfo(
        samples=snapshot.count(),
        tokens=snapshot.total_tokens(),
        width=stored.sketch.width,
        shuffles=stored.sketch.shuffles,
        seed=stored.sketch.seed,
        normalize=stored.normalize,
        model=stored.model,
        adapter=stored.adapter,
        table_version=snapshot.version,
        indexes=built,
        bytes=size,
        token_gradients=0 if tokens is None else tokens.rows(),
        token_width=None if tokens is None else tokens.width,
        columns=snapshot.columns,
        made_with=stored.settings,
    )


def ids_of(ids: Iterable[str] | None) -> list[str] | None:
    """Return ids as a list, whatever holds them.

    Raises:
        SpecError: one string is in their place, or some are no texts.
    """
    if ids is None:
        return None
    if isinstance(ids, str):
        raise SpecError(f"ids is the string {ids!r}, whose letters would be the ids; wanted a list: ids=[{ids!r}]")
    found = list(ids)
    wrong = next((name for name in found if not isinstance(name, str)), None)
    if wrong is not None:
        raise SpecError(f"one of the ids is {wrong!r}; wanted texts, as ids are stored: {str(wrong)!r}")
    return found
