"""RapidGrads of generations become rankings of the samples that most influenced them (paper, Eq. 5)."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import ShardedIndex
from rapidin_vdb.query import Sketched
from rapidin_vdb.records import Aggregate, Scalar
from rapidin_vdb.results import GroupInfluence, RankedSample, Ranking, Seconds, StoredSample
from rapidin_vdb.store import Snapshot

SCORE_UNIT = "epochs * learning_rate * inner product of RapidGrads (Eq. 5)"


def rank(
    snapshot: Snapshot,
    index: ShardedIndex,
    sketched: Sketched,
    *,
    top_k: int = 10,
    where: str | None = None,
    harmful: bool = False,
    both: bool = False,
    group_by: str | None = None,
    aggregate: Aggregate = "sum",
) -> list[Ranking]:
    """Return each query's samples of largest influence, or of most negative influence where `harmful`.

    With `both`, one pass finds both. The filter is applied first: results are the best of the samples that match it.
    With `group_by`, the influence of all of these, summed or averaged by their value in a column, comes beside.

    Raises:
        FilterError: the filter cannot be understood, or there is no such column.
        SpecError: `top_k` is not positive, or both ends are asked for twice.
    """
    if top_k < 1:
        raise SpecError(f"--top-k is {top_k}; wanted 1 or more")
    if harmful and both:
        raise SpecError("give one of --harmful and --both")
    started = time.monotonic()
    among = None if where is None else snapshot.row_ids(where)
    searched = index.samples if among is None else len(among)
    factor = snapshot.fingerprint.epochs * snapshot.fingerprint.learning_rate
    groups = None
    if group_by is not None:
        groups = _groups(snapshot, index, sketched.vectors, among, group_by, aggregate, factor)
    # Harmful is helpful of the negated query: there is no second search.
    sign = -1.0 if harmful else 1.0
    ends = (
        index.search_both(sketched.vectors, top_k, among=among)
        if both
        else (index.search(np.float32(sign) * sketched.vectors, top_k, among=among), None)
    )
    names = [name for end in ends if end is not None for ranked in end for name, _ in ranked]
    samples = snapshot.samples(names)
    search = (time.monotonic() - started) / max(len(sketched.query_ids), 1)
    rankings = []
    for number, (query_id, gradient) in enumerate(zip(sketched.query_ids, sketched.seconds, strict=True)):
        rankings.append(
            Ranking(
                query_id=query_id,
                score_unit=SCORE_UNIT,
                searched=searched,
                where=where,
                seconds=Seconds(gradient=gradient, search=search, tokens=0.0, total=gradient + search),
                results=_results(ends[0][number], samples, sign * factor),
                harmful=None if ends[1] is None else _results(ends[1][number], samples, factor),
                groups=None if groups is None else groups[number],
            )
        )
    return rankings


def _results(
    ranked: Sequence[tuple[str, float]], samples: Mapping[str, StoredSample], factor: float
) -> tuple[RankedSample, ...]:
    results = []
    for number, (sample_id, score) in enumerate(ranked, start=1):
        sample = samples[sample_id]
        results.append(
            RankedSample(
                rank=number,
                sample_id=sample_id,
                score=score * factor,
                exact_score=None,
                split=sample.split,
                source=sample.source,
                prompt=sample.prompt,
                response=sample.response,
                metadata=sample.metadata,
                tokens=None,
            )
        )
    return tuple(results)


def _groups(
    snapshot: Snapshot,
    index: ShardedIndex,
    vectors: np.ndarray,
    among: np.ndarray | None,
    column: str,
    aggregate: Aggregate,
    factor: float,
) -> list[tuple[GroupInfluence, ...]]:
    """Return for each query the influence of every value of a column, largest first."""
    row_ids, values = snapshot.group_of(column)
    if among is not None:
        mine = np.isin(row_ids, among)
        row_ids, values = row_ids[mine], [value for value, wanted in zip(values, mine, strict=True) if wanted]
    # Values as they are first met; True and 1 are two.
    places: dict[tuple[type, Scalar], int] = {}
    of_row = np.array([places.setdefault((type(value), value), len(places)) for value in values], dtype=np.int64)
    counts = np.bincount(of_row, minlength=len(places))
    sums = index.group_sums(vectors, row_ids, of_row, len(places))
    if aggregate == "mean":
        sums = sums / counts
    names = [value for _, value in places]
    return [
        tuple(
            GroupInfluence(value=names[place], samples=int(counts[place]), score=float(row[place]) * factor)
            for place in sorted(range(len(names)), key=lambda place: (-row[place], str(names[place])))
        )
        for row in sums
    ]
