"""Which records are of samples that are to be left out of training files, and which were never scored."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from rapidin_vdb.corpus import Record, by_itself, sample_from
from rapidin_vdb.corpus.samples import hash_of, text_of
from rapidin_vdb.errors import CorpusError, SpecError, is_unicode
from rapidin_vdb.ledger import Content, Contents, Entry, Ledger
from rapidin_vdb.records import Turns
from rapidin_vdb.results import StoredSample
from rapidin_vdb.store import SampleTable, Snapshot, undisturbed

Verdict = Literal["other", "chosen", "unknown", "changed", "never"]
"""Of a record: it is of no sample that is to be left out; it is of one; it has the id of one of which nothing else is
known; it has the id of one, and says something else; or its id was never in the database, as far as that is known."""

# A look for ids reads those of all samples, and one for texts holds them.
_IDS_A_LOOK = 1 << 16
_SAMPLES_A_LOOK = 5000


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The samples that are to be left out, and what is known of them."""

    table: SampleTable
    """Where they are, or were."""
    ledger: Ledger
    """Their ids; with `absent`, those of what is there, and of what was deleted."""
    contents: Contents
    """What they say, or said, as far as it is known."""
    absent: bool
    """Whether all are to be left out that are not in the database."""
    impossible: tuple[str, ...]
    """Of the ids that were given, those that no sample can have."""
    deletions_known: bool
    """Whether what was deleted is known from the first version on."""
    id_field: str
    """Which field of records holds the id."""

    def verdict(self, record: Record, name: str, known: Entry) -> Verdict:
        """Say what a record of an id is."""
        if self.absent == (known.there is not None):
            return "other"
        if self.absent and not known.deleted:
            return "never"
        contents = self.contents.of(name)
        if not contents:
            return "unknown"
        return "chosen" if _is_one_of(record, contents, self.table.fingerprint.turns, self.id_field) else "changed"

    def belong(self, names: Sequence[str]) -> bool:
        """Say whether any of some ids is in the database; of an empty one all might have been."""
        snapshot = self.table.snapshot()
        return not snapshot.rows() or any(True for _ in snapshot.each_content(names))


@contextmanager
def choose(
    table: SampleTable, *, where: str | None, ids: Sequence[str] | None, absent: bool, random: int | None, seed: int,
    id_field: str,
) -> Iterator[Choice]:  # fmt: skip
    """Note which samples are to be left out: those that match a filter, of some ids, not there, or so many at random.

    Raises:
        FilterError: the filter cannot be understood.
        SpecError: there is no such sample, or there are not so many.
    """
    if ids is not None and not ids:
        raise SpecError("--ids names no sample, so that nothing would be left out; nothing was written")
    impossible = tuple(dict.fromkeys(name for name in ids or () if not is_unicode(name)))
    with closing(Ledger()) as ledger, closing(Contents()) as contents:
        if absent:
            known = _note_there(table, ledger, contents)
        elif where is not None:
            known = _note_matching(table, ledger, contents, where)
        elif random is not None:
            known = _note_drawn(table, ledger, contents, random, seed)
        else:
            known = _note_named(table, ledger, contents, [name for name in ids or () if is_unicode(name)])
        yield Choice(
            table=table, ledger=ledger, contents=contents, absent=absent, impossible=impossible, deletions_known=known,
            id_field=id_field,
        )  # fmt: skip


@undisturbed
def _note_matching(table: SampleTable, ledger: Ledger, contents: Contents, where: str) -> bool:
    def noted(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
        for stored, content_hash, _ in snapshot.each(where):
            contents.add(_content(stored, content_hash))
            yield stored.sample_id, content_hash

    snapshot = table.snapshot()
    contents.clear()
    ledger.begin(noted(snapshot))
    if not ledger.there():
        raise SpecError(
            f"no sample in {table.uri} matches --where {where!r}, so that nothing would be left out; nothing was "
            "written. Capital letters count in texts; the columns are those of: rapidin-vdb info. If the samples were "
            "deleted before, leave out what is not in the database, with --absent"
        )
    return _all_is_kept(snapshot)


@undisturbed
def _note_named(table: SampleTable, ledger: Ledger, contents: Contents, ids: Sequence[str]) -> bool:
    snapshot = table.snapshot()
    contents.clear()
    ledger.begin((name, "") for name in ids)
    there = dict(snapshot.each_content(ids))
    _add(contents, snapshot, there)
    if gone := [name for name in ids if name not in there]:
        # What they said is known from the versions before the last deletions.
        for before, _ in reversed(snapshot.deletions(lately=True)):
            version = table.snapshot(before)
            said = dict(version.each_content(gone))
            _add(contents, version, said)
            gone = [name for name in gone if name not in said]
            if not gone:
                break
    return _all_is_kept(snapshot)


@undisturbed
def _note_drawn(table: SampleTable, ledger: Ledger, contents: Contents, count: int, seed: int) -> bool:
    snapshot = table.snapshot()
    contents.clear()
    ledger.begin(snapshot.each_content())
    total = ledger.there()
    if count > total:
        raise SpecError(
            f"--random is {count:,}, and {table.uri} has {total:,} samples; wanted at most so many: as many as the "
            "removal left out that this is to be compared with"
        )
    # Raw words of a bit generator: they, unlike what numpy draws from them, are the same for ever, on every machine.
    keys = np.random.Philox(np.random.SeedSequence(seed)).random_raw(total)
    places = iter(np.sort(np.argsort(keys, kind="stable")[:count]).tolist())
    place, names = next(places), list[str]()
    for number, name in enumerate(ledger.each_there()):
        if number == place:
            names.append(name)
            place = next(places, None)
    drawn = {name: known.there or "" for name, known in ledger.look(names).items()}
    ledger.begin(drawn.items())
    _add(contents, snapshot, drawn)
    return _all_is_kept(snapshot)


@undisturbed
def _note_there(table: SampleTable, ledger: Ledger, contents: Contents) -> bool:
    snapshot = table.snapshot()
    contents.clear()
    ledger.begin(snapshot.each_content())
    for before, after in _all_deletions(table, snapshot):
        gone = np.setdiff1d(before.row_keys()[0], after.row_keys()[0], assume_unique=True)
        names = iter(before.ids_of_rows(gone))
        while some := list(islice(names, _IDS_A_LOOK)):
            ledger.note_deleted(some)
            deleted = [name for name, known in ledger.look(some).items() if known.deleted]
            _add(contents, before, dict(before.each_content(deleted)))
    return _all_is_kept(snapshot)


def _all_deletions(table: SampleTable, snapshot: Snapshot) -> Iterator[tuple[Snapshot, Snapshot]]:
    """Yield the versions before and after each deletion, the last first, as far as they are kept."""
    while found := snapshot.deletions():
        for before, after in reversed(found):
            yield table.snapshot(before), table.snapshot(after)
        # There may be earlier ones than a snapshot tells of at once.
        snapshot = table.snapshot(found[0][0])


def _all_is_kept(snapshot: Snapshot) -> bool:
    """Say whether all versions are kept: a purge leaves only the newest."""
    return snapshot.digest_of(1) is not None


def _add(contents: Contents, snapshot: Snapshot, hashes: Mapping[str, str]) -> None:
    """Note what some samples say in a version."""
    names = iter(hashes)
    while some := list(islice(names, _SAMPLES_A_LOOK)):
        for name, stored in snapshot.samples(some).items():
            contents.add(_content(stored, hashes[name]))


def _content(stored: StoredSample, content_hash: str) -> Content:
    return Content(
        sample_id=stored.sample_id,
        content_hash=content_hash,
        texts=_texts(stored.prompt, stored.response),
        split=stored.split,
        source=stored.source,
    )


def _is_one_of(record: Record, contents: Sequence[Content], turns: Turns, id_field: str) -> bool:
    """Say whether a record is what was scored: the same one, or one of the same prompt and response.

    Its other fields are in no gradient; and a table in another format has values of other types.
    """
    text, texts = text_of(record.fields), set[str]()
    for content in contents:
        # Split and source may be those that the ingest was told.
        hashes = {hash_of(text, content.split, content.source)}
        with suppress(CorpusError):
            sample = sample_from(record, split=content.split, source=content.source, id_field=id_field, turns=turns)
            # With the turns that fields beside it make, or without: that is for the template to say.
            for written in (sample, by_itself(sample)):
                hashes.add(written.content_hash)
                texts.add(_texts(written.prompt, written.response))
        if content.content_hash in hashes or content.texts in texts:
            return True
    return False


def _texts(prompt: str | None, response: str) -> str:
    return hashlib.sha256(json.dumps([prompt, response]).encode("ascii")).hexdigest()[:32]
