"""Rows and queries that benchmarks of search make, and an index of them that needs no table."""

import itertools
from collections.abc import Iterator

import numpy as np

from rapidin_vdb.index import Keys, ShardedIndex, Texts, make_shard
from rapidin_vdb.index.source import ArraySource
from rapidin_vdb.recipe import IndexRecipe


def vectors_of(count: int, width: int, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield rows of normal numbers, float16, some at a time; rows are shifted copies of few."""
    base = np.random.default_rng(seed).standard_normal((64, width), dtype=np.float32).astype(np.float16)
    for number in range(0, count, 64):
        yield np.roll(base, 7919 * (number // 64) + seed, axis=1)[: count - number]


def queries_of(count: int, width: int) -> np.ndarray:
    """Return queries."""
    return np.random.default_rng(1).standard_normal((count, width), dtype=np.float32)


def in_memory_index(rows: np.ndarray, recipe: IndexRecipe) -> ShardedIndex:
    """Return an index of some rows, dealt to the recipe's shards without a copy."""
    devices, count, width = recipe.shard_devices, len(rows), rows.shape[1]
    cuts = np.linspace(0, count, len(devices) + 1).astype(int)
    shares = list(itertools.pairwise(cuts))
    return ShardedIndex(
        recipe=recipe,
        width=width,
        keys=Keys(
            Texts.of(f"s{n:08d}" for n in range(count)),
            np.arange(count),
            np.ones(count, np.int64),
            np.ones(count, bool),
        ),
        shards=tuple(
            make_shard(device, ArraySource([rows[begin:end]], width), recipe, width=width)
            for device, (begin, end) in zip(devices, shares, strict=True)
        ),
        numbers=tuple(np.arange(begin, end) for begin, end in shares),
        largest_norm=2 * float(np.sqrt(width)),
    )
