"""Is a database what was written? Tables against their checksums and each other, indexes against their tables."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from rapidin_vdb.errors import PurgedError, RapidInError, SpecError, TableError, UnreadableIndexError
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.index import (
    MANIFEST,
    Manifest,
    index_folders,
    list_manifests,
    manifest_of,
    readable_manifest,
    verify_rows,
)
from rapidin_vdb.ledger import Names, Numbers
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.results import Finding, VerifyReport
from rapidin_vdb.store import (
    SampleTable,
    Snapshot,
    TableVersion,
    TokenSnapshot,
    indexed_columns,
    make_scalar_index,
    undisturbed,
    wrong_lookup,
)

# The first of each kind are told one by one.
_TOLD = 20
# Looks at both tables before writers are kept out for a moment.
_LOOKS = 20


def verify(
    table: SampleTable, kept: Sequence[tuple[IndexKeeper, Callable[[], TableVersion]]], *, progress: Progress = silent
) -> VerifyReport:
    """Read all of a database, and say what is wrong; what is only a cache is mended.

    Tables are read row by row: ids that stand twice, vectors that are not finite or zero, offsets outside their text,
    rows that are not what was written. Filters are answered from scalar indices and without. Built indexes are read and
    compared with their checksums. What is damaged of these is made anew; where that fails, it is among what is wrong.
    """
    samples, tokens, findings = _tables(table, progress)
    mends = []
    if not findings:
        # Else a copy of what is right might be made anew from what is not.
        mends += list(_scalar_indices(table))
    mends += [mend for keeper, newest in kept for mend in _indexes(keeper, newest, progress)]
    return VerifyReport(
        samples=samples,
        tokens=tokens,
        findings=(*findings, *(finding for finding, mended in mends if not mended)),
        mended=tuple(finding for finding, mended in mends if mended),
    )


@undisturbed
def _tables(table: SampleTable, progress: Progress) -> tuple[int, int, list[Finding]]:
    """Return how many samples and tokens there are, and what is wrong with them, all of one moment."""
    snapshot, tokens = _at_one_moment(table)
    findings = list(_samples(snapshot, progress))
    if tokens is not None:
        findings += list(_tokens(tokens, snapshot, progress))
    return snapshot.count(), 0 if tokens is None else tokens.rows(), findings


def _at_one_moment(table: SampleTable) -> tuple[Snapshot, TokenSnapshot | None]:
    """Return both tables between two commits: every commit that matters to both changes the samples last or first."""
    for _ in range(_LOOKS):
        snapshot, tokens = table.snapshot(), table.tokens.snapshot()
        if table.snapshot().digest == snapshot.digest:
            return snapshot, tokens
    with table.committing():
        return table.snapshot(), table.tokens.snapshot()


class _Told:
    """Findings of one kind: the first one by one, then how many more."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.places: list[str] = []
        self.more = 0

    def note(self, place: str) -> None:
        if len(self.places) < _TOLD:
            self.places.append(place)
        else:
            self.more += 1

    def findings(self) -> Iterator[Finding]:
        for place in self.places:
            yield Finding(place=place, what=self.what)
        if self.more:
            yield Finding(place=f"{self.more:,} more", what=self.what)


def _samples(snapshot: Snapshot, progress: Progress) -> Iterator[Finding]:
    kinds = {
        name: _Told(what)
        for name, what in {
            "twice": "the id stands twice in the table samples",
            "vector": "its RapidGrad is zero or not finite",
            "width": "its RapidGrad is not as long as the fingerprint says",
            "offsets": "its token offsets are not inside its response, or not as many as its tokens",
            "loss": "its loss is not a finite number above or equal to zero",
            "checksum": "its row is not what was written",
        }.items()
    }
    total, done = snapshot.count(), 0
    if snapshot.width != snapshot.fingerprint.sketch.width:
        kinds["width"].note("all samples")
    names = Names()
    try:
        for row, vector, wanted in snapshot.whole_rows():
            name = row["sample_id"]
            if not names.add(name):
                kinds["twice"].note(name)
            if not _sound(vector):
                kinds["vector"].note(name)
            spans, length = row["token_offsets"], len(row["response"])
            if not all(0 <= s["start"] <= s["end"] <= length for s in spans) or len(spans) != row["tokens"]:
                kinds["offsets"].note(name)
            if not (math.isfinite(row["loss"]) and row["loss"] >= 0):
                kinds["loss"].note(name)
            if wanted is not None and row["checksum"] != wanted:
                kinds["checksum"].note(name)
            done += 1
            if done % 256 == 0:
                progress("samples", done, total)
    except PurgedError:
        raise
    except (TableError, UnicodeDecodeError) as error:
        yield Finding(place="the table samples", what=f"cannot be read to its end: {error}")
    finally:
        names.close()
    progress("samples", total, total)
    for kind in kinds.values():
        yield from kind.findings()


def _tokens(tokens: TokenSnapshot, snapshot: Snapshot, progress: Progress) -> Iterator[Finding]:
    kinds = {
        name: _Told(what)
        for name, what in {
            "twice": "the token stands twice in the table tokens",
            "vector": "the token's RapidGrad is not finite",
            "checksum": "the token's row is not what was written",
            "missing": "has some of its tokens' RapidGrads, but not all",
        }.items()
    }
    total, done = tokens.rows(), 0
    with closing(Numbers()) as seen:
        try:
            for row, vector, wanted in tokens.whole_rows():
                name, number = row["sample_id"], row["token_index"]
                if not seen.add(name, row["content_hash"], number):
                    kinds["twice"].note(f"{name}, token {number}")
                if not np.isfinite(vector).all():
                    kinds["vector"].note(f"{name}, token {number}")
                if wanted is not None and row["checksum"] != wanted:
                    kinds["checksum"].note(f"{name}, token {number}")
                done += 1
                if done % 1024 == 0:
                    progress("tokens", done, total)
        except PurgedError:
            raise
        except (TableError, UnicodeDecodeError) as error:
            yield Finding(place="the table tokens", what=f"cannot be read to its end: {error}")
            return
        for name, content, count in snapshot.each_count():
            if seen.some_are_missing(name, content, count):
                kinds["missing"].note(name)
    progress("tokens", total, total)
    for kind in kinds.values():
        yield from kind.findings()


def _sound(vector: np.ndarray) -> bool:
    return bool(np.isfinite(vector).all() and vector.any())


Mend = tuple[Finding, bool]
"""What was wrong with a cache, and whether it is mended."""


def _scalar_indices(table: SampleTable) -> Iterator[Mend]:
    """Make the scalar indices anew that answer otherwise than the table itself."""
    try:
        columns = undisturbed(lambda: indexed_columns(table.snapshot()))()
    except TableError as error:
        yield Finding(place="the scalar indices", what=f"{error}"), False
        return
    look = undisturbed(lambda column: wrong_lookup(table.snapshot(), column))

    def mend(column: str) -> None:
        make_scalar_index(table, column)
        if wrong := look(column):
            raise TableError(wrong)

    for column in columns:
        try:
            wrong = look(column)
        except TableError as error:
            yield Finding(place=f"column {column}", what=f"cannot be read: {error}"), False
            continue
        if wrong:
            yield _mended(f"scalar index of {column}", wrong, "made", lambda column=column: mend(column))  # type: ignore[misc]


def _indexes(keeper: IndexKeeper, newest: Callable[[], TableVersion], progress: Progress) -> Iterator[Mend]:
    """Mend the indexes that are damaged, and say which."""
    folder: Path = keeper.folder
    for known in list_manifests(folder):
        try:
            damage = _damage(folder, known)
        except UnreadableIndexError as error:
            # Built anew, a sound one would be lost, and the new one might fare no better.
            yield Finding(place=f"index {known.name}", what=str(error)), False
            continue
        if damage is not None:
            manifest, what = damage
            yield _mended(
                f"index {known.name}",
                what,
                "built",
                lambda manifest=manifest: keeper.rebuild(newest, manifest, progress=progress),  # type: ignore[misc]
            )
    whole = {manifest.name for manifest in list_manifests(folder)}
    for name in index_folders(folder):
        if name in whole:
            continue
        what = "a build that died has left files without a manifest"
        try:
            if not _is_none(folder, name):
                continue  # somebody has built it meanwhile
            if (folder / name / MANIFEST).exists():
                what = "its manifest is damaged or of another version"
            # Whoever is building it has the lock, and is not waited for; and may be done by now.
            removed, _ = keeper.remove(name, wait=False, only=partial(_is_none, folder, name))
        except TimeoutError:
            continue
        except UnreadableIndexError as error:
            yield Finding(place=f"index {name}", what=str(error)), False
            continue
        except OSError as error:
            yield Finding(place=f"index {name}", what=f"{what}; it could not be removed: {error}"), False
            continue
        if removed:
            yield Finding(place=f"index {name}", what=f"{what} (it was removed)"), True


def _is_none(folder: Path, name: str, found: Manifest | None = None) -> bool:
    """Say whether a folder holds no index: that a manifest cannot be read now does not mean that there is none."""
    return found is None and manifest_of(folder, name) is None


def _damage(folder: Path, manifest: Manifest) -> tuple[Manifest, str] | None:
    """Return what is wrong with an index, and the manifest that says what it should be; None where nothing is.

    Raises:
        UnreadableIndexError: it cannot be read now.
    """
    while True:
        try:
            verify_rows(folder, manifest)
        except UnreadableIndexError:
            raise
        except SpecError as error:
            now = readable_manifest(folder, manifest.name)
            if now == manifest:
                return manifest, str(error)
            if now is None:
                return None  # gone meanwhile
            manifest = now  # replaced by somebody else while it was read
        else:
            return None


def _mended(place: str, what: str, how: str, mend: Callable[[], object]) -> Mend:
    """Mend a cache, and return what was wrong with it, with why it could not be mended where that is so."""
    try:
        mend()
    except (RapidInError, OSError) as error:
        return Finding(place=place, what=f"{what}; it could not be {how} anew: {error}"), False
    return Finding(place=place, what=f"{what} (it was {how} anew)"), True
