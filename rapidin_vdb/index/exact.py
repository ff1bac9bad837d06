"""Scores of candidates in float64, by which they are ordered."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rapidin_vdb.compiled import side_by_side
from rapidin_vdb.index.half import exact_inner_products
from rapidin_vdb.index.shard import Shard
from rapidin_vdb.index.torch_shard import TorchShard

_RESCORE_ROWS = 64


def exact_scores(
    queries: Float32[np.ndarray, "queries sketch"],
    numbers: Sequence[Int64[np.ndarray, " _"]],
    shards: Sequence[Shard],
    owned: Sequence[Int64[np.ndarray, " _"]],
) -> list[Float64[np.ndarray, " _"]]:
    """Return the inner products in float64 of each query with rows of its own.

    Each shard's rows have the numbers that `owned` says, ascending. Equal rows have equal scores, wherever they stand:
    where all shards are on GPUs that add up there, else all on the CPU.
    """
    exact = [np.empty(len(mine)) for mine in numbers]
    if all(isinstance(shard, TorchShard) for shard in shards):
        for shard, theirs in zip(shards, owned, strict=True):
            assert isinstance(shard, TorchShard)
            places, rows = zip(*(_owned(mine, theirs) for mine in numbers), strict=True)
            for into, where, scores in zip(exact, places, shard.exact(queries, rows), strict=True):
                into[where] = scores
        return exact

    def score(query: int) -> None:
        wide = queries[query].astype(np.float64)
        for places, rows in _rows(numbers[query], shards, owned):
            exact[query][places] = exact_inner_products(rows, wide)

    side_by_side(score, len(queries))
    return exact


def _owned(numbers: np.ndarray, owned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where those of some rows stand that a shard holds, and what numbers they have there."""
    if not len(owned):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    local = np.minimum(np.searchsorted(owned, numbers), len(owned) - 1)
    mine = np.flatnonzero(owned[local] == numbers)
    return mine, local[mine]


def _rows(
    numbers: np.ndarray, shards: Sequence[Shard], owned: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield some rows at full width, and where each stands among them."""
    for shard, theirs in zip(shards, owned, strict=True):
        mine, local = _owned(numbers, theirs)
        for begin in range(0, len(mine), _RESCORE_ROWS):
            part = slice(begin, begin + _RESCORE_ROWS)
            yield mine[part], shard.take(local[part])
