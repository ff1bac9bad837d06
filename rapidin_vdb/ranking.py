"""RapidGrads of generations become rankings of the samples that most influenced them (paper, Eq. 5)."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from rapidin_vdb.coarse_notes import coarse_note
from rapidin_vdb.index import End, Grouping, Searchable
from rapidin_vdb.query import Sketched
from rapidin_vdb.question import Question
from rapidin_vdb.records import Scalar
from rapidin_vdb.results import GroupInfluence, Histogram, RankedSample, Ranking, Seconds, StoredSample
from rapidin_vdb.store import Snapshot
from rapidin_vdb.uncertainty import chance, score_errors, surveyed


def rank(
    snapshot: Snapshot, index: Searchable, sketched: Sketched, question: Question, *, itself: str | None = None
) -> list[Ranking]:
    """Return each query's samples of largest influence, or of most negative influence where `harmful`.

    With `both`, one pass finds both. The filter is applied first: results are the best of the samples that match it.
    With `group_by`, the influence of all of these, summed or averaged by their value in a column, comes beside. Where
    the first results are to be ranked again, there are as many as that takes. Of the sample that is asked about
    `itself`, its own score says nothing of whether others stand out.

    Raises:
        FilterError: the filter cannot be understood, or there is no such column.
    """
    started = time.monotonic()
    among = None if question.where is None else snapshot.row_ids(question.where)
    factor = snapshot.fingerprint.epochs * snapshot.fingerprint.learning_rate
    grouping, names = (None, []) if question.group_by is None else _grouping(snapshot, among, question.group_by)
    found, errors_of_sums = surveyed(
        index, sketched.vectors, max(question.top_k, question.refine), snapshot.fingerprint, ends=ends_of(question),
        among=among, grouping=grouping, bins=question.histogram,
    )  # fmt: skip
    ends, groups = found.ends, None
    if grouping is not None:
        groups = _groups(grouping, names, found.sums, errors_of_sums, question, factor)
    samples = snapshot.samples([name for end in ends for ranked in end for name, _ in ranked])
    seconds = (time.monotonic() - started) / max(len(sketched.query_ids), 1)
    searched = index.samples if among is None else len(among)
    errors = score_errors(sketched.vectors, snapshot.fingerprint)
    missed = coarse_note(index, question, searched)
    said: list[float | None] = [None] * len(sketched.query_ids) if errors is None else errors.tolist()
    scored = [[[(name, s * factor) for name, s in ranked if name != itself] for ranked in end] for end in ends]
    return [
        Ranking(
            query_id=query_id,
            score_unit=score_unit(sketched, number),
            searched=searched,
            where=question.where,
            seconds=seconds_of(sketched, number, seconds),
            results=_results(ends[0][number], samples, factor),
            harmful=_results(ends[1][number], samples, factor) if question.both else None,
            groups=None if groups is None else groups[0][number],
            groups_left_out=None if groups is None else groups[1] or None,
            histogram=_histogram(*found.histograms[number], factor) if question.histogram else None,
            focus=sketched.focus[number] or None,
            score_error=said[number],
            note=_note(sketched, number, missed, [end[number] for end in scored], said[number], searched, question),
            table_version=snapshot.version,
            identity=snapshot.identity,
        )
        for number, query_id in enumerate(sketched.query_ids)
    ]


def _note(
    sketched: Sketched, number: int, missed: str | None, ends: Sequence[Sequence[tuple[str, float]]],
    error: float | None, searched: int, question: Question,
) -> str | None:  # fmt: skip
    """Say that a generation was cut, that samples may be missing, that no score is larger than chance makes some."""
    notes = [cut_note(sketched, number), missed]
    # Where all are ranked again, none was left out for its score.
    if error and question.refine < searched and any(ends):
        bound = chance(error, searched * len(ends))
        signs = [-1 if question.harmful else 1, -1]
        if all(sign * end[0][1] < bound for sign, end in zip(signs, ends, strict=False) if end):
            which = "" if question.both else "negative " if question.harmful else "positive "
            said = f"no {which}score stands out: {by_chance(searched * len(ends), bound)}"
            # Of what was not found nothing is known; how to find it was said.
            notes.append(f"of what was found, {said}" if missed else f"{said}; {_mend(question)}")
    return "; ".join(note for note in notes if note) or None


def by_chance(scores: int, bound: float) -> str:
    """Say what the largest of so many scores would be by chance."""
    return f"by chance alone the largest of {scores:,} stays below {bound:.3g} nine times in ten"


def _mend(question: Question) -> str:
    """Say how to tell what is real where no score stands out."""
    if not question.refine:
        return "exact scores (refine) would tell what is real, and so would a wider sketch (width at init)"
    return (
        f"the {question.refine:,} that are ranked again were chosen by these: refine more, or make a wider sketch "
        "(width at init)"
    )


def score_unit(sketched: Sketched, number: int) -> str:
    """Say what a score is."""
    focused = bool(sketched.focus[number])
    return f"epochs * learning_rate * inner product of RapidGrads ({'Eq. 7' if focused else 'Eq. 5'})"


def cut_note(sketched: Sketched, number: int) -> str | None:
    """Say that a generation was cut, where it was."""
    tokens = sketched.looked_at[number] if sketched.looked_at else None
    if tokens is None:
        return None
    return (
        f"the generation was cut to the database's --max-tokens: what stands behind its first {tokens:,} tokens has no "
        "part in the scores"
    )


def seconds_of(sketched: Sketched, number: int, search: float) -> Seconds:
    """Return where a query's time went."""
    gradient = sketched.seconds[number]
    return Seconds(gradient=gradient, search=search, tokens=0.0, total=gradient + search)


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
                truncated=sample.truncated,
            )
        )
    return tuple(results)


def ends_of(question: Question) -> tuple[End, ...]:
    """Return which ends are asked for, in the order of `Ranking`: of most positive influence, and of most negative."""
    return ("highest", "lowest") if question.both else ("lowest",) if question.harmful else ("highest",)


def _histogram(counts: np.ndarray, edges: np.ndarray, factor: float) -> Histogram:
    return Histogram(edges=tuple((edges * factor).tolist()), counts=tuple(counts.tolist()))


def _grouping(snapshot: Snapshot, among: np.ndarray | None, column: str) -> tuple[Grouping, list[Scalar]]:
    """Return which value of a column each row has, of those that match, and these values."""
    row_ids, values = snapshot.group_of(column)
    if among is not None:
        mine = np.isin(row_ids, among)
        row_ids, values = row_ids[mine], [value for value, wanted in zip(values, mine, strict=True) if wanted]
    # Values as they are first met; True and 1 are two.
    places: dict[tuple[type, Scalar], int] = {}
    of_row = np.array([places.setdefault((type(value), value), len(places)) for value in values], dtype=np.int64)
    return Grouping(row_ids=row_ids, groups=of_row, count=len(places)), [value for _, value in places]


def _groups(
    grouping: Grouping, names: Sequence[Scalar], sums: np.ndarray, errors: np.ndarray, question: Question, factor: float
) -> tuple[list[tuple[GroupInfluence, ...]], int]:
    """Return for each query the influence of a column's values, largest first, and how many are left out of each."""
    counts = np.bincount(grouping.groups, minlength=grouping.count)
    if question.aggregate == "mean":
        sums, errors = sums / counts, errors / counts
    most = question.most_groups or len(names)
    return [
        tuple(
            GroupInfluence(
                value=names[place],
                samples=int(counts[place]),
                score=float(row[place]) * factor,
                error=float(error[place]),
            )
            for place in sorted(_largest(row, most), key=lambda place: (-row[place], str(names[place])))
        )
        for row, error in zip(sums, errors, strict=True)
    ], max(0, len(names) - most)


def _largest(row: np.ndarray, most: int) -> list[int]:
    """Return the places of the values that are farthest from zero; of equal ones the first."""
    return np.argsort(-np.abs(row), kind="stable")[:most].tolist()
