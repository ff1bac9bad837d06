"""Exact top-k over any number of shards: candidates in single precision, order and scores in double."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rapidin_vdb.compiled import side_by_side
from rapidin_vdb.errors import SpecError
from rapidin_vdb.index.coarse import folded
from rapidin_vdb.index.half import exact_inner_products
from rapidin_vdb.index.keys import Keys, joined
from rapidin_vdb.index.shard import FaissShard, Found, ScanShard, Shard, best_of, gpu_of
from rapidin_vdb.index.source import ArraySource, Rows, RowSource, TableSource, norm_of
from rapidin_vdb.recipe import IndexRecipe

# Candidates beyond top_k that are asked of each shard, so that rounding and ties rarely need a second search.
_SLACK = 16
_RESCORE_ROWS = 64

Queries = Float32[np.ndarray, "queries sketch"]
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
        so that neither shards, nor devices, nor the other queries of a batch change them.

        Where the recipe is coarse, candidates come from folded vectors, and a sample may be missed.

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
        order = np.argsort(row_ids)
        numbers = self.keys.numbers_of(row_ids)
        members = np.full(len(self.keys), -1)
        members[numbers] = groups[order[np.searchsorted(row_ids, self.keys.row_ids[numbers], sorter=order)]]
        sums = np.zeros((len(queries), count))
        for shard, owned in zip(self._full_shards(), self._full_numbers(), strict=True):
            wanted = np.flatnonzero(members[owned] >= 0)
            if not len(wanted):
                continue
            for local, scores in shard.scores(queries, wanted):
                for query in range(len(queries)):
                    sums[query] += np.bincount(members[owned[local]], weights=scores[query], minlength=count)
        return sums

    def scores(
        self, queries: Queries, *, among: Int64[np.ndarray, " row_ids"] | None = None
    ) -> Float32[np.ndarray, "queries samples"]:
        """Return the scores of all samples, or of those among some row ids, in float32 and in no particular order."""
        wanted = self.keys.alive if among is None else np.zeros(len(self.keys), dtype=bool)
        if among is not None:
            wanted[self.keys.numbers_of(among)] = True
        found = [np.zeros((len(queries), 0), dtype=np.float32)]
        for shard, owned in zip(self._full_shards(), self._full_numbers(), strict=True):
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
                full = ArraySource([*full.arrays, batch.rows], self.width)
            parts.append(batch.keys)
            count += len(batch.rows)
        return replace(
            self, keys=joined(parts), shards=tuple(shards), numbers=tuple(numbers), largest_norm=largest, full=full
        )

    def _search(self, queries: Queries, top_k: int, among: np.ndarray | None, *, both: bool) -> list[list[Ranked]]:
        if top_k < 1:
            raise SpecError(f"top_k is {top_k}; wanted 1 or more")
        rows = None if among is None else self.keys.numbers_of(among)
        if rows is None and self.keys.count < len(self.keys):
            rows = self.keys.numbers
        count = len(self.keys) if rows is None else len(rows)
        signs = (1.0, -1.0) if both else (1.0,)
        if count == 0 or len(queries) == 0:
            return [[[] for _ in queries] for _ in signs]
        wanted = min(count, self.recipe.refine * top_k if self.recipe.coarse_width else top_k + _SLACK)
        found = self._candidates(queries, wanted, rows, both=both)
        return [
            self._ranked(np.float32(sign) * queries, candidates, top_k, wanted, rows, count)
            for sign, candidates in zip(signs, found, strict=True)
        ]

    def _ranked(
        self, queries: Queries, found: Found, top_k: int, wanted: int, rows: np.ndarray | None, count: int
    ) -> list[Ranked]:
        """Rank candidates exactly, and ask for more where rounding or ties leave open whether one is missing."""
        results: dict[int, Ranked] = {}
        pending = list(range(len(queries)))
        while True:
            everything = wanted >= count or self.full is not None
            answers = self._settle_all(queries[pending], found, top_k, everything)
            results |= {query: ranked for query, (ranked, _) in zip(pending, answers, strict=True)}
            pending = [query for query, (_, settled) in zip(pending, answers, strict=True) if not settled]
            if not pending:
                return [results[query] for query in range(len(queries))]
            wanted = min(count, 2 * wanted)
            found = self._candidates(queries[pending], wanted, rows, both=False)[0]

    def _candidates(self, queries: Queries, wanted: int, rows: np.ndarray | None, *, both: bool) -> list[Found]:
        """Return the best `wanted` rows of all shards with their scores in float32, best first."""
        if self.recipe.coarse_width:
            queries = queries.reshape(len(queries), self.recipe.coarse_width, -1).sum(2)
        queries = np.ascontiguousarray(queries)
        wanted_rows = None if rows is None else np.zeros(len(self.keys), bool)
        if wanted_rows is not None:
            wanted_rows[rows] = True

        def search(number: int) -> list[Found] | None:
            shard, owned = self.shards[number], self.numbers[number]
            local = None if wanted_rows is None else np.flatnonzero(wanted_rows[owned])
            if not len(owned) or (local is not None and not len(local)):
                return None
            found = shard.search(queries, wanted, local, both=both)
            return [(scores, np.where(places >= 0, owned[places], -1)) for scores, places in found]

        places = range(len(self.shards))
        if all(shard.side_by_side(len(queries)) for shard in self.shards):
            with ThreadPoolExecutor(max_workers=len(self.shards)) as pool:
                parts = [part for part in pool.map(search, places) if part is not None]
        else:
            parts = [part for part in map(search, places) if part is not None]
        return [best_of([part[end] for part in parts], wanted) for end in range(1 + both)]

    def _settle_all(self, queries: Queries, found: Found, top_k: int, everything: bool) -> list[tuple[Ranked, bool]]:
        answers: dict[int, tuple[Ranked, bool]] = {}

        def settle(query: int) -> None:
            answers[query] = self._settle(queries[query], found[0][query], found[1][query], top_k, everything)

        side_by_side(settle, len(queries))
        return [answers[query] for query in range(len(queries))]

    def _settle(
        self,
        query: Float32[np.ndarray, " sketch"],
        scores: Float32[np.ndarray, " found"],
        numbers: Int64[np.ndarray, " found"],
        top_k: int,
        everything: bool,
    ) -> tuple[Ranked, bool]:
        """Rank candidates exactly; say whether a row beyond them could still belong to the first `top_k`."""
        numbers = numbers[numbers >= 0]
        exact = self._exact_scores(query, numbers)
        found = zip((self.keys.sample_ids[number] for number in numbers.tolist()), exact.tolist(), strict=True)
        ranked = sorted(found, key=lambda pair: (-pair[1], pair[0]))[:top_k]
        # Whatever was left out scored at most the last candidate, give or take rounding.
        rounding = max(shard.rounding for shard in self.shards)
        margin = 2 * rounding * float(np.linalg.norm(query)) * self._norm_bound()
        settled = everything or ranked[-1][1] > float(scores[len(numbers) - 1]) + margin
        return ranked, settled

    def _norm_bound(self) -> float:
        """Return what no row that was searched is longer than."""
        if self.largest_norm is not None:
            return self.largest_norm
        return max(source.largest_norm for source in self._sources() if isinstance(source, TableSource))

    def _sources(self) -> list[RowSource]:
        return [shard.source for shard in self.shards if isinstance(shard, ScanShard)]

    def _exact_scores(
        self, query: Float32[np.ndarray, " sketch"], numbers: Int64[np.ndarray, " found"]
    ) -> Float64[np.ndarray, " found"]:
        """Return inner products with the query in float64."""
        exact = np.empty(len(numbers))
        wide = query.astype(np.float64)
        for places, rows in self._rows(numbers):
            exact[places] = exact_inner_products(rows, wide)
        return exact

    def _rows(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield some rows at full width, and where each stands among them."""
        for shard, owned in zip(self._full_shards(), self._full_numbers(), strict=True):
            if not len(owned):
                continue
            local = np.minimum(np.searchsorted(owned, numbers), len(owned) - 1)
            mine = np.flatnonzero(owned[local] == numbers)
            local = local[mine]
            for begin in range(0, len(mine), _RESCORE_ROWS):
                part = slice(begin, begin + _RESCORE_ROWS)
                yield mine[part], shard.take(local[part])

    def _full_shards(self) -> Sequence[Shard]:
        return self.shards if self.full is None else (ScanShard(self.full, width=self.width),)

    def _full_numbers(self) -> Sequence[np.ndarray]:
        return self.numbers if self.full is None else (np.arange(len(self.keys)),)


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


def make_shard(device: str, source: RowSource, recipe: IndexRecipe, *, width: int) -> Shard:
    """Return a shard of some rows; on a GPU, or in single precision, it is FAISS's."""
    if gpu_of(device) is None and recipe.element_type == "float16":
        return ScanShard(source, width=width)
    shard = FaissShard(device, width=width, recipe=recipe)
    for chunk in source.chunks(None):
        shard.added(chunk.rows)
    return shard
