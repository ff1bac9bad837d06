"""From a question to its rankings: which versions, which index, and what is explained."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from rapidin_vdb.corpus import as_written
from rapidin_vdb.engine import Engine
from rapidin_vdb.errors import SampleNotFoundError, SpecError, UnfitError
from rapidin_vdb.explanation import explain
from rapidin_vdb.focus import focus_of
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.gradient import default_batch_tokens
from rapidin_vdb.index import Searchable
from rapidin_vdb.pooling import pool
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import Sketched, encode_queries, sketch_queries
from rapidin_vdb.question import Question
from rapidin_vdb.ranking import rank
from rapidin_vdb.records import Encoded, Sample
from rapidin_vdb.results import Pool, Ranking
from rapidin_vdb.store import SampleTable, Snapshot, TableVersion, TokenSnapshot
from rapidin_vdb.token_ranking import rank_tokens

Versions = tuple[Snapshot, TokenSnapshot | None]
"""The samples to answer from, and their tokens where these are ranked."""


@runtime_checkable
class Keeper(Protocol):
    """What keeps indexes fresh, on this machine or on several."""

    def check(self, name: str | None) -> None:
        """Refuse the name of an index that it has not.

        Raises:
            SpecError: there is none of that name.
        """
        ...

    def fresh(self, snapshot: TableVersion, *, name: str | None = None, progress: Progress = silent) -> Searchable:
        """Return an index of exactly this version of the table."""
        ...


def versions_for(table: SampleTable, question: Question) -> Versions:
    """Return the versions of the tables to answer from; what they cannot answer is said before a model is loaded.

    Raises:
        UnfitError: there is no such version, it is empty, or has no RapidGrads of tokens.
        FilterError: the filter cannot be understood, or there is no such column.
    """
    snapshot, place = table.snapshot(question.as_of), table.uri
    if not snapshot.count():
        if question.as_of is not None:
            raise UnfitError(f"version {question.as_of} of the database {place} is empty; `info --versions` lists them")
        raise UnfitError(f"the database {place} is empty; add samples first: rapidin-vdb ingest {place} FILE")
    if question.group_by is not None:
        snapshot.group_column(question.group_by)
    if question.where is not None:
        snapshot.count(question.where)
    if question.level == "sample":
        return snapshot, None
    tokens = table.tokens.snapshot()
    if tokens is None or not tokens.rows():
        raise UnfitError(
            f"the database {place} has no RapidGrads of single tokens; make them with: rapidin-vdb ingest {place} FILE "
            "--token-gradients"
        )
    return snapshot, tokens


def answer(
    question: Question,
    queries: Sequence[Sample],
    *,
    versions: Versions,
    keeper: Keeper,
    engine: Engine,
    progress: Progress = silent,
) -> Iterator[Ranking]:
    """Yield a ranking for each query, with what the question asks for besides, each as soon as it is ready.

    Raises:
        CorpusError: a query cannot be encoded.
        GradientError: a query gives no finite gradient.
        SpecError: a focus is not in its generation, or there is no such index.
    """
    if not queries:
        return
    keeper.check(question.index)
    snapshot, tokens = versions
    queries, encoded, sketched = _sketched(question, queries, snapshot, engine, progress)
    index = keeper.fresh(tokens or snapshot, name=question.index, progress=progress)
    if tokens is not None:
        yield from rank_tokens(snapshot, tokens, index, sketched, question)
        return
    rankings = rank(snapshot, index, sketched, question)
    if not question.exact:
        yield from rankings
        return
    loaded = engine.loaded
    batch_tokens = default_batch_tokens(loaded.model.config, dtype=snapshot.fingerprint.dtype, device=loaded.device)
    explained = explain(
        rankings, list(zip(queries, encoded, strict=True)), snapshot=snapshot, influence=engine.influence,
        question=question, batch_tokens=batch_tokens, progress=progress,
    )  # fmt: skip
    while True:
        # Not held while whoever asked makes use of one.
        with engine.alone:
            ranking = next(explained, None)
        if ranking is None:
            return
        yield ranking


def pooled(
    question: Question,
    queries: Sequence[Sample],
    *,
    versions: Versions,
    keeper: Keeper,
    engine: Engine,
    progress: Progress = silent,
) -> Pool:
    """Return the samples of largest influence on any of the queries' generations.

    Raises:
        CorpusError: a query cannot be encoded.
        GradientError: a query gives no finite gradient.
        SpecError: a focus is not in its generation, or there is no such index.
    """
    keeper.check(question.index)
    snapshot, _ = versions
    _, _, sketched = _sketched(question, queries, snapshot, engine, progress)
    return pool(snapshot, keeper.fresh(snapshot, name=question.index, progress=progress), sketched, question)


def _sketched(
    question: Question, queries: Sequence[Sample], snapshot: Snapshot, engine: Engine, progress: Progress
) -> tuple[list[Sample], list[Encoded], Sketched]:
    """Return queries as their tokens are of them, these tokens, and their RapidGrads."""
    encoded = encode_queries(
        queries,
        tokenizer=engine.loaded.tokenizer,
        template=engine.template,
        max_tokens=snapshot.fingerprint.max_tokens,
        focus=question.focus,
    )
    written = [as_written(query, one) for query, one in zip(queries, encoded, strict=True)]
    focus = [focus_of(query, question.focus) for query in written]
    with engine.alone:
        return written, encoded, sketch_queries(engine.maker, encoded, focus=focus, progress=progress)


def nearest(
    question: Question, sample_id: str, *, snapshot: Snapshot, keeper: IndexKeeper, progress: Progress = silent
) -> Ranking:
    """Return the samples that most influence what a sample teaches, by its stored RapidGrad; it is among them itself.

    Raises:
        TableError: there is no sample of that id.
        SpecError: the question asks for what takes a generation.
    """
    if question.exact or question.focus or question.level != "sample":
        raise SpecError(
            "a sample is compared by its stored RapidGrad: leave out focus, tokens, matrix, refine and level"
        )
    vector = snapshot.vector_of(sample_id)
    if vector is None:
        raise SampleNotFoundError(f"no sample {sample_id!r} in the database")
    sketched = Sketched(query_ids=(sample_id,), vectors=vector[None].astype(np.float32), seconds=(0.0,), focus=((),))
    index = keeper.fresh(snapshot, name=question.index, progress=progress)
    return rank(snapshot, index, sketched, question, itself=sample_id)[0]
