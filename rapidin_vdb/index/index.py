"""Exact top-k over any number of shards: candidates in single precision, order and scores in double."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index.coarse import folded, looked_at, narrowed
from rapidin_vdb.index.exact import exact_scores
from rapidin_vdb.index.faiss_shard import GPU_MOST, FaissShard
from rapidin_vdb.index.groups import add_up, members_of
from rapidin_vdb.index.keys import Keys, joined
from rapidin_vdb.index.making import make_shard
from rapidin_vdb.index.shard import Found, ScanShard, Shard, best_of, of_shards
from rapidin_vdb.index.source import ArraySource, Rows, RowSource, TableSource, norm_of
from rapidin_vdb.recipe import IndexRecipe

# Candidates beyond top_k, at least, so that rounding and ties rarely need a second pass.
_SLACK = 16

Queries = Float32[np.ndarray, "queries sketch"]
T = TypeVar("T")
Ranked = list[tuple[str, float]]
"""Sample ids and scores, best first."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows on their way into an index."""

    keys: Keys
    """Their keys."""
    rows: Rows
    """The bits of their float16 RapidGrads."""


@dataclass(frozen=True, eq=False)
class ShardedIndex:
    """The RapidGrads of one version of a table, spread over the devices of a recipe; never changed, but replaced."""

    recipe: IndexRecipe
    """How it is laid out."""
    width: int
    """Length of a RapidGrad."""
    keys: Keys
    """Which samples it holds, in the order of their numbers."""
    shards: tuple[Shard, ...]
    """Shares of the rows; of the folded rows where the recipe is coarse."""
    numbers: tuple[Int64[np.ndarray, " _"], ...]
    """For each shard the numbers of its rows, ascending."""
    largest_norm: float | None
    """No row is longer; None where the rows have not been read yet."""
    full: RowSource | None = None
    """Rows at full width, in the order of their numbers, where the shards hold folded ones."""
    parts: frozenset[str] = frozenset()
    """Names of the parts on disk of which it was loaded; none where it came of the table alone."""
    recall: Mapping[str, Any] | None = None
    """What was measured of a coarse one, as its manifest has it."""

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return self.keys.count

    @property
    def grows(self) -> bool:
        """Whether rows can be added by `updated` beside searches: not to what is streamed, nor in place, to FAISS."""
        sources = [*self._sources(), *([self.full] if self.full else [])]
        return all(isinstance(source, ArraySource) for source in sources) and not any(
            isinstance(shard, FaissShard) for shard in self.shards
        )

    def search(
        self, queries: Queries, top_k: int, *, among: Int64[np.ndarray, " row_ids"] | None = None
    ) -> list[Ranked]:
        """Return the `top_k` samples of largest inner product with each query, best first, ties by sample id.

        `among` restricts the search to rows of those ids; ids that the index does not hold are passed over. Fewer
        samples than `top_k` return them all. Scores are inner products in float64 of the stored vectors with the query,
        so that neither shards, nor the other queries of a batch change them; where torch adds them up on a GPU, they
        may differ from those of a CPU in the last digits.

        Where the recipe is coarse, candidates come from folded vectors (see `looked_at`), and a sample may be missed.

        Raises:
            SpecError: `top_k` is not positive.
        """
        return self._search(queries, top_k, among, both=False)[0]

    def search_both(
        self, queries: Queries, top_k: int, *, among: Int64[np.ndarray, " row_ids"] | None = None
    ) -> tuple[list[Ranked], list[Ranked]]:
        """Return what `search` does, and the `top_k` of lowest inner product, lowest first, from one pass."""
        highest, lowest = self._search(queries, top_k, among, both=True)
        return highest, [[(sample_id, -score) for sample_id, score in ranked] for ranked in lowest]

    def group_sums(
        self,
        queries: Queries,
        row_ids: Int64[np.ndarray, " samples"],
        groups: Int64[np.ndarray, " samples"],
        count: int,
    ) -> Float64[np.ndarray, "queries groups"]:
        """Return the sum of each query's scores over each of `count` groups of rows.

        `groups` says for each of `row_ids` which group it belongs to. Scores are taken in float32 and added in float64.
        """
        members = members_of(self.keys, row_ids, groups)
        sums = np.zeros((len(queries), count))
        for shard, owned in zip(self.full_shards, self.full_numbers, strict=True):
            wanted = np.flatnonzero(members[owned] >= 0)
            if not len(wanted):
                continue
            for local, scores in shard.scores(queries, wanted):
                add_up(sums, members[owned[local]], scores)
        return sums

    def scores(
        self, queries: Queries, *, among: Int64[np.ndarray, " row_ids"] | None = None
    ) -> Float32[np.ndarray, "queries samples"]:
        """Return the scores of all samples, or of those among some row ids, in float32 and in no particular order."""
        wanted = self.keys.alive if among is None else np.zeros(len(self.keys), dtype=bool)
        if among is not None:
            wanted[self.keys.numbers_of(among)] = True
        found = [np.zeros((len(queries), 0), dtype=np.float32)]
        for shard, owned in zip(self.full_shards, self.full_numbers, strict=True):
            rows = np.flatnonzero(wanted[owned])
            if len(rows):
                found += [scores for _, scores in shard.scores(queries, rows)]
        return np.concatenate(found, axis=1)

    def updated(self, keys: Keys, batches: Iterable[Batch]) -> "ShardedIndex":
        """Return this index with other rows alive, and with further rows; this one may no longer be used."""
        shards, numbers, largest, full = list(self.shards), list(self.numbers), self.largest_norm, self.full
        parts, count = [keys], len(keys)
        for batch in batches:
            # To the smallest shard, so that they stay of like size.
            place = min(range(len(shards)), key=lambda shard: len(numbers[shard]))
            rows = batch.rows if not self.recipe.coarse_width else folded(batch.rows, self.recipe.coarse_width)
            shards[place] = shards[place].added(rows)
            numbers[place] = np.concatenate([numbers[place], np.arange(count, count + len(batch.rows))])
            largest = max(largest or 0.0, norm_of(batch.rows))
            if full is not None:
                assert isinstance(full, ArraySource)
                full = full.added(batch.rows)
            parts.append(batch.keys)
            count += len(batch.rows)
        return replace(
            self, keys=joined(parts), shards=tuple(shards), numbers=tuple(numbers), largest_norm=largest, full=full
        )

    def _search(self, queries: Queries, top_k: int, among: np.ndarray | None, *, both: bool) -> list[list[Ranked]]:
        check_top_k(top_k)
        rows = self.rows_among(among)
        count = len(self.keys) if rows is None else len(rows)
        signs = (1.0, -1.0) if both else (1.0,)
        if count == 0 or len(queries) == 0:
            return [[[] for _ in queries] for _ in signs]
        few = looked_at(self.recipe.refine, top_k) if self.recipe.coarse_width else top_k + self.slack(top_k)
        wanted = min(count, few)
        found = self.candidates(queries, wanted, rows, both=both)
        asked = np.concatenate([np.float32(sign) * queries for sign in signs])
        scores, numbers = (np.concatenate([end[kind] for end in found]) for kind in range(2))
        ranked = self.settled(asked, (scores, numbers), top_k, rows)
        return [ranked[first : first + len(queries)] for first in range(0, len(asked), len(queries))]

    def rows_among(self, among: np.ndarray | None) -> np.ndarray | None:
        """Return the numbers of the rows to be searched, ascending; None for all that there are."""
        if among is not None:
            return self.keys.numbers_of(among)
        return self.keys.numbers if self.keys.count < len(self.keys) else None

    def settled(self, queries: Queries, found: Found, top_k: int, rows: np.ndarray | None) -> list[Ranked]:
        """Return the `top_k` best for each query, by exact scores, from candidates: no other row has a larger score.

        At least so many as `slack` says beyond `top_k`, if there are. Where rounding leaves open whether a row that was
        left out is better than one of them, rows are passed over once more.
        """
        scores, numbers = found
        count = len(self.keys) if rows is None else len(rows)
        # Of more, those are looked at that rounding leaves open: a row may have to come from a disk.
        first = scores.shape[1] if self.full is not None else min(scores.shape[1], top_k + self.slack(top_k))
        candidates = [some[some >= 0] for some in numbers[:, :first]]
        ranked = self._ranked(queries, candidates, top_k)
        if first == count or self.full is not None:
            return ranked
        # Whatever was left out scored at most the last candidate, give or take rounding.
        least = np.array([best[-1][1] for best in ranked])
        rounding = max(shard.rounding for shard in self.shards)
        margin = rounding * np.linalg.norm(queries.astype(np.float64), axis=1) * self._norm_bound()
        near = scores >= (least - margin)[:, None]
        more = {query: numbers[query, : near[query].sum()] for query in np.flatnonzero(near[:, first - 1]).tolist()}
        far = [query for query in more if near[query, -1] and scores.shape[1] < count]
        if far:
            more |= zip(far, self._reaching(queries[far], least[far], rows), strict=True)
        if more:
            again = [np.union1d(candidates[query], some) for query, some in more.items()]
            for query, best in zip(more, self._ranked(queries[list(more)], again, top_k), strict=True):
                ranked[query] = best
        return ranked

    def slack(self, top_k: int) -> int:
        """Return how many candidates beyond `top_k` to ask for: of more, more lie within rounding of the last."""
        by_faiss = [shard for shard in self.shards if isinstance(shard, FaissShard)]
        # The bound of its sums on a CPU is four times as wide, and four times as many rows lie within it.
        slack = max(_SLACK, top_k if any(shard.gpu is None for shard in by_faiss) else top_k // 4)
        return _SLACK if any(shard.gpu is not None for shard in by_faiss) and top_k + slack > GPU_MOST else slack

    def candidates(self, queries: Queries, wanted: int, rows: np.ndarray | None, *, both: bool) -> list[Found]:
        """Return the best `wanted` rows of all shards with their scores in float32, best first."""
        if self.recipe.coarse_width:
            queries = narrowed(queries, self.recipe.coarse_width)
        queries = np.ascontiguousarray(queries)

        def search(number: int, local: np.ndarray | None) -> list[Found]:
            found, owned = self.shards[number].search(queries, wanted, local, both=both), self.numbers[number]
            return [(scores, np.where(places >= 0, owned[places], -1)) for scores, places in found]

        parts = self._of_shards(search, len(queries), rows)
        return [best_of([part[end] for part in parts], wanted) for end in range(1 + both)]

    def _reaching(
        self, queries: Queries, least: Float64[np.ndarray, " queries"], rows: np.ndarray | None
    ) -> list[np.ndarray]:
        """Return for each query the rows whose exact score may reach `least`."""
        queries = np.ascontiguousarray(queries)

        def search(number: int, local: np.ndarray | None) -> list[np.ndarray]:
            found = self.shards[number].reaching(queries, least, self._norm_bound(), local)
            return [self.numbers[number][places] for places in found]

        parts = self._of_shards(search, len(queries), rows)
        return [np.concatenate(of_query) for of_query in zip(*parts, strict=True)]

    def _of_shards(
        self, search: Callable[[int, np.ndarray | None], T], queries: int, rows: np.ndarray | None
    ) -> list[T]:
        """Return what a search says of each shard that holds rows, or any of `rows`."""
        wanted = None if rows is None else np.zeros(len(self.keys), bool)
        if wanted is not None:
            wanted[rows] = True
        together = all(shard.side_by_side(queries) for shard in self.shards)
        return of_shards(search, self.numbers, wanted, together=together)

    def _norm_bound(self) -> float:
        """Return what no row that was searched is longer than."""
        if self.largest_norm is not None:
            return self.largest_norm
        return max(source.largest_norm for source in self._sources() if isinstance(source, TableSource))

    def _sources(self) -> list[RowSource]:
        return [shard.source for shard in self.shards if isinstance(shard, ScanShard)]

    def _ranked(self, queries: Queries, numbers: Sequence[np.ndarray], top_k: int) -> list[Ranked]:
        """Return the best of some rows for each query, by exact scores."""
        exact = exact_scores(queries, numbers, self.full_shards, self.full_numbers)
        names = self.keys.sample_ids
        ranked = []
        for rows, scores in zip(numbers, exact, strict=True):
            found = zip((names[number] for number in rows.tolist()), scores.tolist(), strict=True)
            ranked.append(sorted(found, key=lambda pair: (-pair[1], pair[0]))[:top_k])
        return ranked

    @property
    def full_shards(self) -> Sequence[Shard]:
        """Shards of rows at full width."""
        return self.shards if self.full is None else (ScanShard(self.full, width=self.width),)

    @property
    def full_numbers(self) -> Sequence[np.ndarray]:
        """For each of them the numbers of its rows, ascending."""
        return self.numbers if self.full is None else (np.arange(len(self.keys)),)


def check_top_k(top_k: int) -> None:
    """Refuse what is no number of samples.

    Raises:
        SpecError: it is not positive.
    """
    if top_k < 1:
        raise SpecError(f"top_k is {top_k}; wanted 1 or more")


def empty_index(recipe: IndexRecipe, *, width: int) -> ShardedIndex:
    """Return an index of no rows, in memory, to which rows are added by `updated`."""
    inner = recipe.coarse_width or width
    shards = tuple(make_shard(device, ArraySource([], inner), recipe, width=inner) for device in recipe.shard_devices)
    return ShardedIndex(
        recipe=recipe,
        width=width,
        keys=joined([]),
        shards=shards,
        numbers=tuple(np.empty(0, np.int64) for _ in shards),
        largest_norm=0.0,
        full=ArraySource([], width) if recipe.coarse_width else None,
    )
