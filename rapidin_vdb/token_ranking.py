"""RapidGrads of generations become rankings of single training tokens (paper, Eq. 6, over the whole database)."""

import time
from collections.abc import Mapping, Sequence

from rapidin_vdb.coarse_notes import coarse_note
from rapidin_vdb.index import Searchable, narrowed, survey
from rapidin_vdb.query import Sketched
from rapidin_vdb.question import Question
from rapidin_vdb.ranking import cut_note, ends_of, seconds_of
from rapidin_vdb.results import RankedToken, Ranking, StoredSample
from rapidin_vdb.store import Snapshot, TokenSnapshot, token_of

_UNIT = "epochs * learning_rate * inner product of a token's RapidGrad with the generation's (Eq. {})"


def rank_tokens(
    snapshot: Snapshot, tokens: TokenSnapshot, index: Searchable, sketched: Sketched, question: Question
) -> list[Ranking]:
    """Return each query's training tokens of largest influence, or of most negative influence, or both.

    Those of samples that a filter lets through, and that have RapidGrads of their tokens; how many have none is said.

    Raises:
        FilterError: the filter cannot be understood.
    """
    started = time.monotonic()
    matching = snapshot.contents(question.where)
    among, having = tokens.matching(matching)
    factor = snapshot.fingerprint.epochs * snapshot.fingerprint.learning_rate
    vectors = narrowed(sketched.vectors, tokens.width)
    restricted = among if len(among) < tokens.rows() else None
    ends = survey(index, vectors, question.top_k, ends=ends_of(question), among=restricted).ends
    samples = snapshot.samples([token_of(key)[0] for end in ends for ranked in end for key, _ in ranked])
    missing = _note(len(matching) - having, len(matching))
    missed = coarse_note(index, question, len(among))
    seconds = (time.monotonic() - started) / max(len(sketched.query_ids), 1)
    return [
        Ranking(
            query_id=query_id,
            score_unit=_UNIT.format(8 if sketched.focus[number] else 6),
            searched=len(among),
            where=question.where,
            seconds=seconds_of(sketched, number, seconds),
            results=_results(ends[0][number], samples, factor),
            harmful=_results(ends[1][number], samples, factor) if question.both else None,
            focus=sketched.focus[number] or None,
            matching=len(matching),
            without_tokens=len(matching) - having,
            note="; ".join(filter(None, (cut_note(sketched, number), missed, missing))) or None,
            table_version=snapshot.version,
            identity=snapshot.identity,
        )
        for number, query_id in enumerate(sketched.query_ids)
    ]


def _note(without: int, matching: int) -> str | None:
    if not without:
        return None
    return (
        f"{without:,} of the {matching:,} samples that match have no RapidGrads of their tokens, which are left out "
        "here; make them with: rapidin-vdb ingest DB FILE --token-gradients"
    )


def _results(
    ranked: Sequence[tuple[str, float]], samples: Mapping[str, StoredSample], factor: float
) -> tuple[RankedToken, ...]:
    results = []
    for rank, (key, score) in enumerate(ranked, start=1):
        sample_id, number = token_of(key)
        sample = samples[sample_id]
        start, end = sample.token_offsets[number]
        results.append(
            RankedToken(
                rank=rank,
                sample_id=sample_id,
                token_index=number,
                text=sample.response[start:end],
                start=start,
                end=end,
                score=score * factor,
                split=sample.split,
                source=sample.source,
                prompt=sample.prompt,
                response=sample.response,
                metadata=sample.metadata,
            )
        )
    return tuple(results)
