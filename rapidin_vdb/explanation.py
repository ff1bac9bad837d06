"""Exact scores, token scores and matrices for the results of rankings, from full gradients (paper, Eq. 6 to 8)."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from rapidin_vdb.batches import cut
from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient import Exact, ExactInfluence
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.question import Question
from rapidin_vdb.records import Encoded, Sample
from rapidin_vdb.results import RankedSample, Ranking, Span, TokenScore
from rapidin_vdb.store import Snapshot

STAGES = ("exact scores", "tokens", "matrix")
"""What progress is told of: at each, nothing of the model or of an index is in use."""


def explain(
    rankings: Sequence[Ranking],
    queries: Sequence[tuple[Sample, Encoded]],
    *,
    snapshot: Snapshot,
    influence: ExactInfluence,
    question: Question,
    batch_tokens: int,
    progress: Progress = silent,
) -> Iterator[Ranking]:
    """Yield rankings whose results have the exact scores, the token scores and the matrices that were asked for.

    Where the first results are ranked again, each ranking is cut to `top_k` after that.

    Raises:
        GradientError: a gradient is not finite.
    """
    stage = "tokens" if question.tokens or question.matrix else "exact scores"

    def at(number: int) -> Callable[[], None]:
        return lambda: progress(stage, number, len(rankings))

    for number, (ranking, (sample, encoded)) in enumerate(zip(rankings, queries, strict=True)):
        started = time.monotonic()
        at(number)()
        one = _Explanation(snapshot, influence, sample, encoded, question, batch_tokens, at(number), progress)
        ranking = one.of(ranking)
        seconds = time.monotonic() - started
        ranking = dataclasses.replace(
            ranking,
            seconds=dataclasses.replace(ranking.seconds, tokens=seconds, total=ranking.seconds.total + seconds),
        )
        yield ranking
    at(len(rankings))()


@dataclasses.dataclass(frozen=True, eq=False)
class _Known:
    """What has been computed of one sample."""

    encoded: Encoded
    exact: Exact
    tokens: np.ndarray | None = None
    matrix: np.ndarray | None = None


class _Explanation:
    """The explanation of one ranking."""

    def __init__(
        self, snapshot: Snapshot, influence: ExactInfluence, sample: Sample, encoded: Encoded, question: Question,
        batch_tokens: int, still: Callable[[], None], progress: Progress,
    ) -> None:  # fmt: skip
        """Prepare it; `still` is called between its steps, and may raise to end it."""
        self._snapshot = snapshot
        self._influence = influence
        self._sample = sample
        self._encoded = encoded
        self._question = question
        self._batch_tokens = batch_tokens
        self._still = still
        self._progress = progress
        self._factor = snapshot.fingerprint.epochs * snapshot.fingerprint.learning_rate
        self._direction = influence.direction(encoded)
        self._known: dict[str, _Known] = {}

    def of(self, ranking: Ranking) -> Ranking:
        """Return a ranking with what was asked for."""
        question = self._question
        ends = [
            [result for result in end if isinstance(result, RankedSample)]
            for end in (ranking.results, ranking.harmful)
            if end is not None
        ]
        if question.refine:
            self._learn([result.sample_id for end in ends for result in end[: question.refine]])
            ends = [
                self._again(end, descending=number == 0 and not question.harmful) for number, end in enumerate(ends)
            ]
        ends = [end[: question.top_k] for end in ends]
        shown = [result.sample_id for end in ends for result in end]
        if question.matrix and question.most_numbers:
            self._check_size(shown)
        if question.tokens or question.matrix:
            self._learn(shown)
            self._learn_tokens(shown)
        filled = [tuple(self._filled(result, rank) for rank, result in enumerate(end, start=1)) for end in ends]
        columns = None
        if question.matrix or question.spans:
            columns = tuple(
                Span(text=self._sample.response[start:end], start=start, end=end)
                for start, end in self._encoded.offsets
            )
        # Who asked does not know, either, what a template wrote of an answer that says more than its content.
        told = columns is not None or self._encoded.response is not None
        return dataclasses.replace(
            ranking,
            score_unit=ranking.score_unit + self._again_unit(),
            results=filled[0],
            harmful=None if ranking.harmful is None else filled[1],
            prompt=self._sample.prompt if told else None,
            generation=self._sample.response if told else None,
            generation_tokens=columns,
        )

    def _again(self, results: list[RankedSample], *, descending: bool) -> list[RankedSample]:
        """Rank the first results by their exact scores; the others stay behind them."""
        first, rest = results[: self._question.refine], results[self._question.refine :]
        sign = -1.0 if descending else 1.0
        return sorted(first, key=lambda result: (sign * self._score(result.sample_id), result.sample_id)) + rest

    def _again_unit(self) -> str:
        if not self._question.refine:
            return ""
        return (
            f"; the first {self._question.refine} are ranked by exact_score, epochs * learning_rate * the inner "
            "product of full gradients"
        )

    def _score(self, sample_id: str) -> float:
        return float(self._known[sample_id].exact.scores[0]) * self._factor

    def _check_size(self, sample_ids: Sequence[str]) -> None:
        """Refuse matrices that are too large together.

        Raises:
            SpecError: they are.
        """
        lengths = [len(sample.offsets) for sample in self._snapshot.encoded(sample_ids).values()]
        numbers, most = sum(lengths) * len(self._encoded.offsets), self._question.most_numbers
        if numbers > most:
            raise SpecError(
                f"the matrices of {len(lengths)} results have {numbers:,} numbers together; wanted at most {most:,}: "
                "give a smaller top_k"
            )

    def _learn(self, sample_ids: Sequence[str]) -> None:
        """Compute the exact scores of those samples that have none yet."""
        wanted = sorted(set(sample_ids) - set(self._known))
        for batch in self._cut(self._snapshot.encoded(wanted).values()):
            self._still()
            exact = self._influence.exact(self._direction, batch)
            for place, encoded in enumerate(batch):
                one = Exact(exact.parts[place : place + 1], exact.norms[place : place + 1])
                self._known[encoded.sample_id] = _Known(encoded, one)

    def _learn_tokens(self, sample_ids: Sequence[str]) -> None:
        batches = list(self._cut({name: self._known[name].encoded for name in sample_ids}.values()))
        exacts = [_stacked([self._known[sample.sample_id].exact for sample in batch]) for batch in batches]
        if self._question.tokens:
            for batch, exact in zip(batches, exacts, strict=True):
                self._still()
                for sample, scores in zip(
                    batch, self._influence.token_scores(self._direction, batch, exact), strict=True
                ):
                    known = self._known[sample.sample_id]
                    self._known[sample.sample_id] = dataclasses.replace(known, tokens=scores * self._factor)
        if self._question.matrix:
            query, whole = self._encoded, self._direction
            if query.focus is not None:
                query = dataclasses.replace(query, focus=None)
                whole = self._influence.direction(query)
                exacts = []
                for batch in batches:
                    self._still()
                    exacts.append(self._influence.exact(whole, batch))
            matrices = self._influence.matrix(query, whole, batches, exacts, progress=self._progress)
            for batch, found in zip(batches, matrices, strict=True):
                for sample, matrix in zip(batch, found, strict=True):
                    known = self._known[sample.sample_id]
                    self._known[sample.sample_id] = dataclasses.replace(
                        known, matrix=(matrix * self._factor).astype(np.float32)
                    )

    def _cut(self, samples: Iterable[Encoded]) -> Iterator[list[Encoded]]:
        ordered = sorted(samples, key=lambda sample: sample.sample_id)
        return cut(ordered, lambda sample: len(sample.input_ids), tokens=self._batch_tokens)

    def _filled(self, result: RankedSample, rank: int) -> RankedSample:
        known = self._known.get(result.sample_id)
        if known is None:
            return dataclasses.replace(result, rank=rank)
        tokens = None
        if known.tokens is not None:
            tokens = tuple(
                TokenScore(text=result.response[start:end], start=start, end=end, score=float(score))
                for (start, end), score in zip(known.encoded.offsets, known.tokens, strict=True)
            )
        exact = self._score(result.sample_id)
        return dataclasses.replace(
            result, rank=rank, exact_score=exact, difference=result.score - exact, tokens=tokens, matrix=known.matrix
        )


def _stacked(exacts: Sequence[Exact]) -> Exact:
    return Exact(np.concatenate([one.parts for one in exacts]), np.concatenate([one.norms for one in exacts]))
