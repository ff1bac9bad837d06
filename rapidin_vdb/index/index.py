"""Exact top-k over any number of shards: candidates from FAISS, order and scores from float64."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index.shard import Shard
from rapidin_vdb.recipe import IndexRecipe

# Candidates beyond top_k that are asked of each shard, so that rounding and ties rarely need a second search.
_SLACK = 16
_RESCORE_ROWS = 64


class ShardedIndex:
    """The RapidGrads of one table version, spread over the devices of a recipe."""

    def __init__(
        self,
        recipe: IndexRecipe,
        *,
        width: int,
        sample_ids: Sequence[str],
        shards: Sequence[Shard],
        largest_norm: float,
    ) -> None:
        """Hold shards whose rows, one shard after the other, are these samples, none longer than `largest_norm`."""
        self.recipe = recipe
        self.width = width
        self.sample_ids = list(sample_ids)
        self.shards = list(shards)
        self.largest_norm = largest_norm
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._numbers = {sample_id: number for number, sample_id in enumerate(self.sample_ids)}

    def search(
        self, queries: Float32[np.ndarray, "queries sketch"], top_k: int, *, among: Iterable[str] | None = None
    ) -> list[list[tuple[str, float]]]:
        """Return the `top_k` samples of largest inner product with each query, best first, ties by sample id.

        `among` restricts the search to those samples; ids that the index does not hold are passed over. Fewer samples
        than `top_k` return them all. Scores are inner products in float64 of the stored vectors with the query, so that
        neither shards, nor devices, nor the other queries of a batch change them.

        Raises:
            SpecError: `top_k` is not positive.
        """
        if top_k < 1:
            raise SpecError(f"top_k is {top_k}; wanted 1 or more")
        rows = None
        if among is not None:
            rows = np.array(sorted(self._numbers[name] for name in set(among) if name in self._numbers), dtype=np.int64)
        count = len(self.sample_ids) if rows is None else len(rows)
        if count == 0 or len(queries) == 0:
            return [[] for _ in queries]
        results: list[list[tuple[str, float]]] = [[] for _ in queries]
        pending, wanted = list(range(len(queries))), min(count, top_k + _SLACK)
        while pending:
            scores, numbers = self._candidates(queries[pending], wanted, rows)
            unsettled = []
            for place, query in enumerate(pending):
                ranked, settled = self._settle(queries[query], scores[place], numbers[place], top_k, wanted >= count)
                if settled:
                    results[query] = ranked
                else:
                    unsettled.append(query)
            pending, wanted = unsettled, min(count, 2 * wanted)
        return results

    def _candidates(
        self, queries: Float32[np.ndarray, "queries sketch"], wanted: int, rows: Int64[np.ndarray, " samples"] | None
    ) -> tuple[Float32[np.ndarray, "queries found"], Int64[np.ndarray, "queries found"]]:
        """Return the best `wanted` rows of all shards with their scores in float32, best first."""

        def search(number: int) -> tuple[np.ndarray, np.ndarray] | None:
            shard, start, stop = self.shards[number], self._starts[number], self._starts[number + 1]
            local = None if rows is None else rows[(rows >= start) & (rows < stop)] - start
            if start == stop or (local is not None and not len(local)):
                return None
            scores, places = shard.search(np.ascontiguousarray(queries), wanted, local)
            return scores, np.where(places >= 0, places + start, -1)

        with ThreadPoolExecutor(max_workers=len(self.shards)) as pool:
            found = [part for part in pool.map(search, range(len(self.shards))) if part is not None]
        scores = np.concatenate([part[0] for part in found], axis=1)
        numbers = np.concatenate([part[1] for part in found], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(numbers, order, axis=1)

    def _settle(
        self,
        query: Float32[np.ndarray, " sketch"],
        scores: Float32[np.ndarray, " found"],
        numbers: Int64[np.ndarray, " found"],
        top_k: int,
        everything: bool,
    ) -> tuple[list[tuple[str, float]], bool]:
        """Rank candidates exactly; say whether a row beyond them could still belong to the first `top_k`."""
        numbers = numbers[numbers >= 0]
        exact = self._exact_scores(query, numbers)
        ranked = sorted(
            ((self.sample_ids[number], float(score)) for number, score in zip(numbers, exact, strict=True)),
            key=lambda pair: (-pair[1], pair[0]),
        )[:top_k]
        # Whatever was left out scored at most the last candidate, give or take rounding.
        rounding = max(shard.rounding for shard in self.shards)
        margin = 2 * rounding * float(np.linalg.norm(query)) * self.largest_norm
        settled = everything or ranked[-1][1] > float(scores[len(numbers) - 1]) + margin
        return ranked, settled

    def _exact_scores(
        self, query: Float32[np.ndarray, " sketch"], numbers: Int64[np.ndarray, " found"]
    ) -> Float64[np.ndarray, " found"]:
        """Return inner products with the query in float64."""
        exact = np.empty(len(numbers))
        wide = query.astype(np.float64)
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            for begin in range(0, len(places), _RESCORE_ROWS):
                part = places[begin : begin + _RESCORE_ROWS]
                vectors = self.shards[owner].vectors(numbers[part] - self._starts[owner]).astype(np.float64)
                # einsum, not BLAS: the same order of additions for every row, wherever it stands, so that equal
                # vectors have equal scores.
                exact[part] = np.einsum("ij,j->i", vectors, wide)
        return exact


def build_index(
    recipe: IndexRecipe, batches: Iterable[tuple[list[str], np.ndarray]], *, width: int, count: int
) -> ShardedIndex:
    """Return an index of `count` rows that arrive in batches of ids and float16 [samples, width]."""
    devices = recipe.shard_devices
    shards = [Shard(device, width=width, element_type=recipe.element_type) for device in devices]
    # Runs of equal length, the first ones longer by a row where it does not come out even.
    ends = np.cumsum([count // len(shards) + (number < count % len(shards)) for number in range(len(shards))])
    sample_ids: list[str] = []
    largest_norm = 0.0
    for ids, vectors in batches:
        wide = vectors.astype(np.float32)
        largest_norm = max(largest_norm, float(np.sqrt(np.einsum("ij,ij->i", wide, wide).max(initial=0.0))))
        begin = 0
        while begin < len(ids):
            number = int(np.searchsorted(ends, len(sample_ids), side="right"))
            end = min(len(ids), begin + int(ends[number]) - len(sample_ids))
            shards[number].add(vectors[begin:end])
            sample_ids += ids[begin:end]
            begin = end
    # A little more than was computed in float32.
    return ShardedIndex(
        recipe, width=width, sample_ids=sample_ids, shards=shards, largest_norm=largest_norm * (1 + 1e-4)
    )
