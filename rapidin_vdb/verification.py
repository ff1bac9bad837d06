"""Is a database what was written? Tables against their checksums and each other, indexes against their tables."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rapidin_vdb.errors import SpecError, TableError
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.index import list_manifests, verify_rows
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.results import Finding, VerifyReport
from rapidin_vdb.store import SampleTable, Snapshot, TableVersion, TokenSnapshot

# The first of each kind are told one by one.
_TOLD = 20


def verify(
    table: SampleTable, kept: Sequence[tuple[IndexKeeper, TableVersion]], *, progress: Progress = silent
) -> VerifyReport:
    """Read all of a database, and say what is wrong; what is only a cache is mended.

    Tables are read row by row: ids that stand twice, vectors that are not finite or zero, offsets outside their text,
    rows that are not what was written, tokens without their sample. Built indexes are read and compared with their
    checksums; one that is damaged is built anew.
    """
    snapshot, findings = table.snapshot(), []
    findings += list(_samples(snapshot, progress))
    tokens = table.tokens.snapshot()
    if tokens is not None:
        findings += list(_tokens(tokens, snapshot, progress))
    mended = [finding for keeper, version in kept for finding in _indexes(keeper, version, progress)]
    return VerifyReport(
        samples=snapshot.count(),
        tokens=0 if tokens is None else tokens.rows(),
        findings=tuple(findings),
        mended=tuple(mended),
    )


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
    seen: set[str] = set()
    total, done = snapshot.count(), 0
    if snapshot.width != snapshot.fingerprint.sketch.width:
        kinds["width"].note("all samples")
    try:
        for row, vector, wanted in snapshot.whole_rows():
            name = row["sample_id"]
            if name in seen:
                kinds["twice"].note(name)
            seen.add(name)
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
    except (TableError, UnicodeDecodeError) as error:
        yield Finding(place="the table samples", what=f"cannot be read to its end: {error}")
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
    seen: dict[tuple[str, str], set[int]] = {}
    total, done = tokens.rows(), 0
    try:
        for row, vector, wanted in tokens.whole_rows():
            name, number = row["sample_id"], row["token_index"]
            numbers = seen.setdefault((name, row["content_hash"]), set())
            if number in numbers:
                kinds["twice"].note(f"{name}, token {number}")
            numbers.add(number)
            if not np.isfinite(vector).all():
                kinds["vector"].note(f"{name}, token {number}")
            if wanted is not None and row["checksum"] != wanted:
                kinds["checksum"].note(f"{name}, token {number}")
            done += 1
            if done % 1024 == 0:
                progress("tokens", done, total)
    except (TableError, UnicodeDecodeError) as error:
        yield Finding(place="the table tokens", what=f"cannot be read to its end: {error}")
        return
    counts = snapshot.token_counts()
    for name, content in snapshot.content_hashes().items():
        numbers = seen.get((name, content), set())
        if numbers and numbers != set(range(counts[name])):
            kinds["missing"].note(name)
    progress("tokens", total, total)
    for kind in kinds.values():
        yield from kind.findings()


def _sound(vector: np.ndarray) -> bool:
    return bool(np.isfinite(vector).all() and vector.any())


def _indexes(keeper: IndexKeeper, version: TableVersion, progress: Progress) -> Iterator[Finding]:
    """Mend the indexes that are damaged, and say which."""
    folder: Path = keeper.folder
    known = list_manifests(folder)
    for manifest in known:
        try:
            verify_rows(folder, manifest)
        except SpecError as error:
            keeper.rebuild(version, manifest.index_recipe, progress=progress)
            yield Finding(place=f"index {manifest.name}", what=f"{error} (it was built anew)")
    names = {manifest.name for manifest in known}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and path.name not in names:
            keeper.remove(path.name)
            yield Finding(
                place=f"index {path.name}", what="its manifest is damaged or of another version (it was removed)"
            )
