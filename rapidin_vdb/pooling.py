"""RapidGrads of several generations become one list of samples: those of largest influence on any of them."""

import time

import numpy as np

from rapidin_vdb.coarse_notes import coarse_note
from rapidin_vdb.index import Searchable
from rapidin_vdb.query import Sketched
from rapidin_vdb.question import Question
from rapidin_vdb.ranking import by_chance, cut_note, ends_of, score_unit
from rapidin_vdb.results import Pool, PooledSample, Seconds
from rapidin_vdb.store import Snapshot
from rapidin_vdb.uncertainty import chance, score_errors, surveyed

# Scores of all generations that are held before the largest are taken of them, some 140 bytes each.
_ENTRIES = 4_000_000


def pool(snapshot: Snapshot, index: Searchable, sketched: Sketched, question: Question) -> Pool:
    """Return the `top_k` samples of largest influence on any generation, or of most negative where `harmful`.

    With `both`, those of largest absolute influence. Where layers are not normalised, it is compared relative to the
    length of the generation's gradient. One pass answers for as many generations as memory allows, and
    the list is the one that all scores would give: who is among so many of all is among as many of the generation that
    it has its score from.

    Raises:
        FilterError: the filter cannot be understood, or there is no such column.
    """
    started = time.monotonic()
    among = None if question.where is None else snapshot.row_ids(question.where)
    factor = snapshot.fingerprint.epochs * snapshot.fingerprint.learning_rate
    sign = 0 if question.both else -1 if question.harmful else 1
    lengths = _lengths(sketched, snapshot)
    best: dict[str, tuple[float, float, int]] = {}
    step = max(1, _ENTRIES // (question.top_k * len(ends_of(question))))
    for first in range(0, len(sketched.vectors), step):
        found, _ = surveyed(
            index, sketched.vectors[first : first + step], question.top_k, snapshot.fingerprint,
            ends=ends_of(question), among=among,
        )  # fmt: skip
        for number, ranked in (pair for end in found.ends for pair in enumerate(end, start=first)):
            for name, score in ranked:
                strength = (sign * score if sign else abs(score)) / lengths[number]
                # Of equal scores, that of the first generation.
                if name not in best or (strength, -number) > (best[name][0], -best[name][2]):
                    best[name] = strength, score, number
    order = sorted(best, key=lambda name: (-best[name][0], name))[: question.top_k]
    samples = snapshot.samples(order)
    searched = index.samples if among is None else len(among)
    errors = score_errors(sketched.vectors, snapshot.fingerprint)
    error = None if errors is None or not len(errors) else float(errors.max())
    gradient, search = sum(sketched.seconds), time.monotonic() - started
    return Pool(
        queries=sketched.query_ids,
        score_unit=_unit(sketched),
        searched=searched,
        where=question.where,
        seconds=Seconds(gradient=gradient, search=search, tokens=0.0, total=gradient + search),
        results=tuple(
            PooledSample(
                rank=rank,
                sample_id=name,
                score=best[name][1] * factor,
                query_id=sketched.query_ids[best[name][2]],
                split=samples[name].split,
                source=samples[name].source,
                prompt=samples[name].prompt,
                response=samples[name].response,
                metadata=samples[name].metadata,
            )
            for rank, name in enumerate(order, start=1)
        ),
        focus=question.focus or None,
        score_error=error,
        note=_note(sketched, [best[name][0] * factor for name in order], error, searched, question, index, snapshot),
        table_version=snapshot.version,
        identity=snapshot.identity,
    )


def _lengths(sketched: Sketched, snapshot: Snapshot) -> list[float]:
    """Return by what scores are divided to be compared across generations.

    Where layers are normalised, all of their gradients are as long. Else the longest, that of the loss least expected,
    would have all places.
    """
    if snapshot.fingerprint.normalize == "layer":
        return [1.0] * len(sketched.query_ids)
    return [float(np.linalg.norm(vector.astype(np.float64))) or 1.0 for vector in sketched.vectors]


def _unit(sketched: Sketched) -> str:
    """Say what a score is, of generations of which some may have a focus."""
    units = {score_unit(sketched, number) for number in range(len(sketched.query_ids))}
    return min(units) if len(units) == 1 else min(units).replace("(Eq. 5)", "(Eq. 5; Eq. 7 of those with a focus)")


def _note(
    sketched: Sketched, strengths: list[float], error: float | None, searched: int, question: Question,
    index: Searchable, snapshot: Snapshot,
) -> str | None:  # fmt: skip
    """Say which generations were cut, that samples may be missing, and how many scores chance alone would make."""
    queries = len(sketched.query_ids)
    cut = [sketched.query_ids[number] for number in range(queries) if cut_note(sketched, number)]
    notes = []
    if cut:
        such = cut[0] if len(cut) == 1 else f"the first is {cut[0]}"
        notes.append(
            f"{len(cut):,} of {queries:,} {'generations' if queries > 1 else 'generation'} cut to the database's "
            f"--max-tokens ({such}): what stands behind that has no part in the scores"
        )
    if snapshot.fingerprint.normalize == "none":
        notes.append("layers are not normalised: ranked relative to the length of each generation's gradient")
    if missed := coarse_note(index, question, searched):
        notes.append(missed)
    if error:
        scores = searched * queries * len(ends_of(question))
        bound = chance(error, scores)
        if weak := sum(strength < bound for strength in strengths):
            which = "the last does not stand out" if weak == 1 else f"the last {weak:,} do not stand out"
            which = "none of these scores stands out" if weak == len(strengths) else which
            notes.append(f"{which}: {by_chance(scores, bound)}")
    return "; ".join(notes) or None
