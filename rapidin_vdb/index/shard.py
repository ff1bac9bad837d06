"""One shard: a share of the rows, searched on one device; here by our scan of half-precision rows."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from rapidin_vdb.index.half import FEW_QUERIES, PIECE, UNIT, by_loops, inner_products, row_norms
from rapidin_vdb.index.source import ArraySource, Rows, RowSource

# Held at a time.
SCORES = 1 << 24

Queries = Float32[np.ndarray, "queries sketch"]
Found = tuple[np.ndarray, np.ndarray]
"""Scores in float32 and row numbers, [queries, found] each, best first; -1 where there are fewer rows."""
Picked = Int64[np.ndarray, " picked"]
Least = Float64[np.ndarray, " queries"]
Reached = list[Int64[np.ndarray, " _"]]
T = TypeVar("T")


@runtime_checkable
class Shard(Protocol):
    """A share of an index's rows, known by number from 0."""

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        ...

    @property
    def rounding(self) -> float:
        """Bound of a score's rounding error, relative to the product of the two norms."""
        ...

    def side_by_side(self, queries: int) -> bool:
        """Whether so many queries keep one core busy only, so that shards are best searched at the same time."""
        ...

    def search(self, queries: Queries, wanted: int, rows: Picked | None, *, both: bool) -> list[Found]:
        """Return the best rows for each query, among `rows` (ascending) where given.

        With `both`, also those with the lowest scores, as a second entry, with scores negated.
        """
        ...

    def scores(self, queries: Queries, rows: Picked | None) -> Iterator[tuple[Picked, Queries]]:
        """Yield the scores of all rows, or of `rows`: their numbers, and [queries, numbers]."""
        ...

    def reaching(self, queries: Queries, least: Least, longest: float, rows: Picked | None) -> Reached:
        """Return for each query the rows whose exact score may reach `least`, give or take rounding, in one pass.

        No row is longer than `longest`.
        """
        ...

    def take(self, rows: Picked) -> Rows:
        """Return some rows, as they were added."""
        ...

    def added(self, vectors: Rows) -> "Shard":
        """Return a shard with further rows; this one may no longer be used."""
        ...


class ScanShard:
    """Rows in half precision on the CPU, read once from wherever they are."""

    def __init__(self, source: RowSource, *, width: int) -> None:
        self.source = source
        self._width = width

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self.source.count

    @property
    def rounding(self) -> float:
        """Bound of a score's rounding error, relative to the product of the two norms."""
        return sum_rounding(self._width)

    def side_by_side(self, queries: int) -> bool:
        """Whether so many queries keep one core busy only."""
        return by_loops(queries, self._width)

    def search(self, queries: Queries, wanted: int, rows: Picked | None, *, both: bool) -> list[Found]:
        """Return the best rows, and the worst; see `Shard`."""
        signs = (1, -1) if both else (1,)
        best: list[list[Found]] = [[] for _ in signs]
        for numbers, scores in self.scores(queries, rows):
            for end, sign in enumerate(signs):
                best[end] = [best_of([*best[end], all_of(sign * scores, numbers)], wanted)]
        nothing = (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        return [found[0] if found else nothing for found in best]

    def scores(self, queries: Queries, rows: Picked | None) -> Iterator[tuple[Picked, Queries]]:
        """Yield the scores of all rows, or of some."""
        for numbers, (scores,) in self.scores_of([queries], rows):
            yield numbers, scores

    def scores_of(
        self, several: Sequence[Float32[np.ndarray, "_ sketch"]], rows: Picked | None
    ) -> Iterator[tuple[Picked, list[Queries]]]:
        """Yield the scores of several batches of queries, each as if it came alone, from one pass over the rows."""
        # However many come along with few queries, sums over their scores are then added up in the same order.
        for numbers, block, picks in self._blocks(max(FEW_QUERIES, sum(map(len, several))), rows):
            yield numbers, [inner_products(block, queries, picks) for queries in several]

    def _scored(
        self, queries: Queries, rows: Picked | None
    ) -> Iterator[tuple[Picked, Queries, Callable[[Picked], np.ndarray]]]:
        """Yield what `scores` does, and what returns the lengths of some of these rows."""
        for numbers, block, picks in self._blocks(len(queries), rows):
            yield numbers, inner_products(block, queries, picks), partial(_norms, block, picks)

    def _blocks(self, queries: int, rows: Picked | None) -> Iterator[tuple[Picked, Rows, Picked | None]]:
        """Yield rows with their numbers, and which of them are wanted, if not all; as fits so many queries."""
        step = max(1, SCORES // queries)
        for chunk in self.source.chunks(rows):
            for first in range(0, len(chunk.numbers), step):
                numbers, block = chunk.numbers[first : first + step], chunk.rows
                picks = None if chunk.picks is None else chunk.picks[first : first + step]
                if picks is None:
                    block = block[first : first + step]
                yield numbers, block, picks

    def reaching(self, queries: Queries, least: Least, longest: float, rows: Picked | None) -> Reached:
        """Return the rows whose exact score may reach `least`; see `Shard`."""
        return reaching(self._scored(queries, rows), queries, least, longest, self.rounding)

    def take(self, rows: Picked) -> Rows:
        """Return some rows."""
        return self.source.take(rows)

    def added(self, vectors: Rows) -> "ScanShard":
        """Return a shard with further rows."""
        if not isinstance(self.source, ArraySource):
            raise TypeError("rows are added to the files of a streamed shard, not to the shard")
        return ScanShard(self.source.added(vectors), width=self._width)


def sum_rounding(width: int) -> float:
    """Return a bound of the error of `inner_products` and `products_in_pieces`, relative to the product of the norms.

    Summed in any order, n products err by at most n * `UNIT` of the sum of their sizes (Higham, Accuracy and Stability
    of Numerical Algorithms, sections 3.1 and 4.2; without a term in the square of `UNIT`: Jeannerod and Rump, SIAM J.
    Matrix Anal. Appl. 34, 2013), and by Cauchy and Schwarz that sum is no more than the product of the norms. So it is
    for each piece, and for all of them together, whose sums are added in float64. One `UNIT` more is for the total in
    single precision, and one for all that is smaller. Numbers so small that they underflow are not looked at.

    >>> 1.2e-4 < sum_rounding(1 << 16) == sum_rounding(1 << 24) < 1.23e-4
    True
    """
    return UNIT * (min(width, PIECE) + 2)


def best_of(found: list[Found], wanted: int) -> Found:
    """Return the best of several findings for the same queries, best first."""
    scores = np.concatenate([part[0] for part in found], axis=1)
    numbers = np.concatenate([part[1] for part in found], axis=1)
    if scores.shape[1] > wanted:
        places = np.argpartition(-scores, wanted - 1, axis=1)[:, :wanted]
        scores, numbers = np.take_along_axis(scores, places, axis=1), np.take_along_axis(numbers, places, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def of_shards(
    search: Callable[[int, Picked | None], T],
    owned: Sequence[Int64[np.ndarray, " _"]],
    wanted: Bool[np.ndarray, " samples"] | None,
    *,
    together: bool,
) -> list[T]:
    """Return what a search says of each shard, by its place, that holds rows, or any of those wanted.

    `owned` are the numbers of each shard's rows. A search is told which of its shard's rows are wanted, ascending; None
    for all. Searches run in threads of their own where `together`.
    """

    def ask(place: int) -> list[T]:
        local = None if wanted is None else np.flatnonzero(wanted[owned[place]])
        nothing = not len(owned[place]) or (local is not None and not len(local))
        return [] if nothing else [search(place, local)]

    if not together:
        return [found for place in range(len(owned)) for found in ask(place)]
    with ThreadPoolExecutor(max_workers=len(owned)) as pool:
        return [found for part in pool.map(ask, range(len(owned))) for found in part]


def reaching(
    scored: Iterator[tuple[Picked, Queries, Callable[[Picked], np.ndarray]]],
    queries: Queries,
    least: Least,
    longest: float,
    rounding: float,
) -> Reached:
    """Return for each query the rows whose exact score may reach `least`, of those that are scored.

    With their scores comes what returns the lengths of some of them: the longest of all may be much longer than they.
    """
    slack = rounding * np.linalg.norm(queries.astype(np.float64), axis=1)
    # As single numbers, rounded down: scores are compared as they are.
    far = np.nextafter((least - slack * longest).astype(np.float32), np.float32(-np.inf))[:, None]
    found: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in queries]
    for numbers, scores, norms in scored:
        some = np.flatnonzero((scores >= far).any(axis=0))
        near = scores[:, some] >= least[:, None] - slack[:, None] * norms(some)
        for query, mine in enumerate(near):
            found[query].append(numbers[some[mine]])
    return [np.concatenate(parts) for parts in found]


def _norms(block: np.ndarray, picks: np.ndarray | None, some: Picked) -> np.ndarray:
    return row_norms(block, some if picks is None else picks[some]).astype(np.float64)


def all_of(scores: np.ndarray, numbers: np.ndarray) -> Found:
    """Return scores that stand in the order of their rows' numbers as a finding."""
    return scores, np.broadcast_to(numbers, scores.shape)
