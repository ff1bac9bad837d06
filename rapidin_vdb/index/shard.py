"""One shard: a share of the rows, searched on one device; by our scan of half-precision rows, or by FAISS."""

import math
from collections.abc import Iterator
from threading import RLock
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from rapidin_vdb.index.half import FEW_QUERIES, inner_products
from rapidin_vdb.index.library import faiss, gpu_count
from rapidin_vdb.index.source import ArraySource, Rows, RowSource
from rapidin_vdb.recipe import IndexRecipe

# A float32 sum of `width` products errs by a random walk of width / 16 steps in each lane of a register: measured, up
# to 5e-6 of the product of the norms at width 65536, where this bound is 1.2e-4. A GPU also rounds the query to half
# precision.
_SUM_ROUNDING = 8 * 2.0**-24
_HALF_ROUNDING = 2.0**-11
# Scores held at a time, and what FAISS can return of a GPU at most.
_SCORES = 1 << 24
_GPU_MOST = 2048
# Beyond so many queries, rows gathered and multiplied are faster than FAISS with a selector.
_SELECTOR_QUERIES = 8

Queries = Float32[np.ndarray, "queries sketch"]
Found = tuple[np.ndarray, np.ndarray]
"""Scores in float32 and row numbers, [queries, found] each, best first; -1 where there are fewer rows."""
Picked = Int64[np.ndarray, " picked"]


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
        return _SUM_ROUNDING * math.sqrt(self._width)

    def side_by_side(self, queries: int) -> bool:
        """Whether so many queries keep one core busy only."""
        return queries <= FEW_QUERIES

    def search(self, queries: Queries, wanted: int, rows: Picked | None, *, both: bool) -> list[Found]:
        """Return the best rows, and the worst; see `Shard`."""
        signs = (1, -1) if both else (1,)
        best: list[list[Found]] = [[] for _ in signs]
        for numbers, scores in self.scores(queries, rows):
            for end, sign in enumerate(signs):
                best[end] = [best_of([*best[end], _all_of(sign * scores, numbers)], wanted)]
        nothing = (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        return [found[0] if found else nothing for found in best]

    def scores(self, queries: Queries, rows: Picked | None) -> Iterator[tuple[Picked, Queries]]:
        """Yield the scores of all rows, or of some."""
        step = max(1, _SCORES // len(queries))
        for chunk in self.source.chunks(rows):
            for first in range(0, len(chunk.numbers), step):
                numbers = chunk.numbers[first : first + step]
                if chunk.picks is None:
                    yield numbers, inner_products(chunk.rows[first : first + step], queries)
                else:
                    yield numbers, inner_products(chunk.rows, queries, chunk.picks[first : first + step])

    def take(self, rows: Picked) -> Rows:
        """Return some rows."""
        return self.source.take(rows)

    def added(self, vectors: Rows) -> "ScanShard":
        """Return a shard with further rows."""
        if not isinstance(self.source, ArraySource):
            raise TypeError("rows are added to the files of a streamed shard, not to the shard")
        return ScanShard(ArraySource([*self.source.arrays, vectors], self._width), width=self._width)


class FaissShard:
    """Rows in a FAISS flat inner-product index, on a GPU, or in single precision on the CPU."""

    def __init__(self, device: str, *, width: int, recipe: IndexRecipe) -> None:
        """Make an empty shard; a GPU that is not there is replaced by the CPU."""
        module = faiss()
        self._half = recipe.element_type == "float16"
        self.gpu = gpu_of(device)
        self.index: Any
        self._resources: Any = None
        # FAISS on a GPU is not made for several threads, not even to read; and nobody may read what is being added to.
        self._lock = RLock()
        if self.gpu is not None:
            self._resources = module.StandardGpuResources()
            config = module.GpuIndexFlatConfig()
            config.device = self.gpu
            config.useFloat16 = self._half
            self.index = module.GpuIndexFlatIP(self._resources, width, config)
        else:
            self.index = module.IndexFlatIP(width)

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return int(self.index.ntotal)

    @property
    def rounding(self) -> float:
        """Bound of a score's rounding error, relative to the product of the two norms."""
        rounding = _SUM_ROUNDING * math.sqrt(self.index.d)
        return rounding + _HALF_ROUNDING if self.gpu is not None and self._half else rounding

    def side_by_side(self, queries: int) -> bool:
        """Whether so many queries keep one core busy only."""
        return self.gpu is not None or queries <= _SELECTOR_QUERIES

    def search(self, queries: Queries, wanted: int, rows: Picked | None, *, both: bool) -> list[Found]:
        """Return the best rows, and the worst; see `Shard`."""
        with self._lock:
            return self._search(queries, wanted, rows, both=both)

    def _search(self, queries: Queries, wanted: int, rows: Picked | None, *, both: bool) -> list[Found]:
        count = self.rows if rows is None else len(rows)
        wanted = min(wanted, count)
        if both:
            queries = np.concatenate([queries, -queries])
        queries = np.ascontiguousarray(queries)
        if rows is None and (self.gpu is None or wanted <= _GPU_MOST):
            found = self.index.search(queries, wanted)
        elif self.gpu is None and len(queries) <= _SELECTOR_QUERIES:
            module = faiss()
            selector = module.IDSelectorBatch(rows)
            found = self.index.search(queries, wanted, params=module.SearchParameters(sel=selector))
        elif self.gpu is not None and rows is not None and wanted + self.rows - count <= _GPU_MOST:
            # FAISS's flat GPU index knows no selectors: ask for as many more as are to be left out.
            found = _only(self.index.search(queries, wanted + self.rows - count), rows, wanted)
        else:
            best: list[Found] = []
            for numbers, scores in self.scores(queries, rows):
                best = [best_of([*best, _all_of(scores, numbers)], wanted)]
            found = best[0]
        if not both:
            return [found]
        half = len(queries) // 2
        return [(found[0][:half], found[1][:half]), (found[0][half:], found[1][half:])]

    def scores(self, queries: Queries, rows: Picked | None) -> Iterator[tuple[Picked, Queries]]:
        """Yield the scores of all rows, or of some."""
        step = max(1, min(_SCORES // len(queries), (64 << 20) // (4 * self.index.d)))
        numbers = np.arange(self.rows) if rows is None else rows
        for first in range(0, len(numbers), step):
            part = numbers[first : first + step]
            yield part, queries @ self._rows(part).T

    def take(self, rows: Picked) -> Rows:
        """Return some rows."""
        # They were half precision before.
        return self._rows(rows).astype(np.float16).view(np.uint16)

    def _rows(self, rows: Picked) -> np.ndarray:
        with self._lock:
            return self.index.reconstruct_batch(rows)

    def added(self, vectors: Rows) -> "FaissShard":
        """Return a shard with further rows."""
        step = max(1, (64 << 20) // (4 * self.index.d))
        for first in range(0, len(vectors), step):
            with self._lock:
                self.index.add(vectors[first : first + step].view(np.float16).astype(np.float32))
        return self


def gpu_of(device: str) -> int | None:
    """Return the number of the GPU that a device of a recipe means here; None for the CPU."""
    if not device.startswith("cuda:"):
        return None
    number = int(device.removeprefix("cuda:"))
    return number if number < gpu_count() else None


def best_of(found: list[Found], wanted: int) -> Found:
    """Return the best of several findings for the same queries, best first."""
    scores = np.concatenate([part[0] for part in found], axis=1)
    numbers = np.concatenate([part[1] for part in found], axis=1)
    if scores.shape[1] > wanted:
        places = np.argpartition(-scores, wanted - 1, axis=1)[:, :wanted]
        scores, numbers = np.take_along_axis(scores, places, axis=1), np.take_along_axis(numbers, places, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def _all_of(scores: np.ndarray, numbers: np.ndarray) -> Found:
    return scores, np.broadcast_to(numbers, scores.shape)


def _only(found: Found, rows: np.ndarray, wanted: int) -> Found:
    """Leave out what is not among `rows`; at least `wanted` are."""
    scores, numbers = found
    kept = np.isin(numbers, rows)
    order = np.argsort(~kept, axis=1, kind="stable")[:, :wanted]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(numbers, order, axis=1)
