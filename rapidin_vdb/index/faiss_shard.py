"""One shard that FAISS searches, on a GPU or in single precision on the CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from threading import RLock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from rapidin_vdb.index.half import UNIT, products_in_pieces
from rapidin_vdb.index.library import faiss
from rapidin_vdb.index.shard import (
    SCORES,
    Found,
    Least,
    Picked,
    Queries,
    Reached,
    all_of,
    best_of,
    reaching,
    sum_rounding,
)
from rapidin_vdb.index.source import Rows
from rapidin_vdb.index.torch_shard import CUT_OFF
from rapidin_vdb.recipe import IndexRecipe

# A GPU also rounds the query to half precision.
_HALF_ROUNDING = 2.0**-11
# What FAISS can return of a GPU.
GPU_MOST = 2048
# Rows in single precision that are fetched at a time: from a GPU's memory to its memory, and to the host's.
_GPU_BYTES = 1 << 30
_HOST_BYTES = 64 << 20
# FAISS adds products up in as many sums as a register has numbers, 16 with AVX-512, 8 with AVX2, and then these: each
# rounds as a sum so many times shorter (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). For
# processors without AVX2, which have 4, this is no proof: of constant rows, which lose most, the worst of some hundred
# scores lost 0.062 * `UNIT` * the width there (0.031 with AVX2, 0.016 with AVX-512; FAISS 1.15.1), half of the bound.
# The matrix products by which it answers many queries lost less.
_LANES = 8
# Of longer ones that bound would leave open which rows are the best, each time: torch adds them up, in pieces.
_LONGEST_SUM = 1 << 16
# Beyond so many queries, rows gathered and multiplied are faster than FAISS with a selector.
_SELECTOR_QUERIES = 8


class FaissShard:
    """Rows in a FAISS flat inner-product index, on a GPU, or in single precision on the CPU."""

    def __init__(self, gpu: int | None, *, width: int, recipe: IndexRecipe) -> None:
        """Make an empty shard on a GPU, by its number, or on the CPU."""
        module = faiss()
        self._half = recipe.element_type == "float16"
        self.gpu = gpu
        self.index: Any
        self._resources: Any = None
        # FAISS on a GPU is not made for several threads, not even to read; and nobody may read what is being added to.
        self._lock = RLock()
        if self.gpu is not None:
            torch.cuda.empty_cache()  # FAISS cannot use what torch keeps for itself, and its scratch space comes first
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
        rounding, width = sum_rounding(self.index.d), self.index.d
        if self.gpu is None:
            return max(rounding, UNIT * (width / _LANES + 8)) if self._sums_itself else rounding
        # In single precision too, whose products may be taken under TF32 while a gradient is made. How a GPU adds these
        # up is not known, so that every addition counts.
        return rounding + _HALF_ROUNDING + (self._cut_off() if self._half else UNIT) * width

    @property
    def _sums_itself(self) -> bool:
        """Whether FAISS may take the inner products."""
        return self.gpu is not None or self.index.d <= _LONGEST_SUM

    def _cut_off(self) -> float:
        """Return what tensor cores lose of a running sum, a product; see `torch_shard`. From Hopper on, less."""
        new = self._near.type != "cpu" and torch.cuda.get_device_capability(self._near)[0] >= 9
        return CUT_OFF / 8 if new else CUT_OFF

    def side_by_side(self, queries: int) -> bool:
        """Whether so many queries keep one core busy only."""
        return self.gpu is not None or (self._sums_itself and queries <= _SELECTOR_QUERIES)

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
        if rows is None and (wanted <= GPU_MOST if self.gpu is not None else self._sums_itself):
            found = self._asked(queries, wanted)
        elif self.gpu is None and self._sums_itself and len(queries) <= _SELECTOR_QUERIES:
            module = faiss()
            selector = module.IDSelectorBatch(rows)
            found = self.index.search(queries, wanted, params=module.SearchParameters(sel=selector))
        elif self.gpu is not None and rows is not None and wanted + self.rows - count <= GPU_MOST:
            # FAISS's flat GPU index knows no selectors: ask for as many more as are to be left out.
            found = _only(self._asked(queries, wanted + self.rows - count), rows, wanted)
        else:
            best: list[Found] = []
            for numbers, scores in self.scores(queries, rows):
                best = [best_of([*best, all_of(scores, numbers)], wanted)]
            found = best[0]
        if not both:
            return [found]
        half = len(queries) // 2
        return [(found[0][:half], found[1][:half]), (found[0][half:], found[1][half:])]

    def _asked(self, queries: Queries, wanted: int) -> Found:
        if self.gpu is None or not self._half:
            return self.index.search(queries, wanted)
        # A GPU rounds queries to half precision, whose range is small. Powers of two round nothing.
        largest = np.abs(queries).max(axis=1, keepdims=True)
        scales = np.exp2(np.frexp(np.where(largest > 0, largest, 1))[1].clip(-113, 128) - 13.0).astype(np.float32)
        scores, numbers = self.index.search(queries / scales, wanted)
        return scores * scales, numbers

    def scores(self, queries: Queries, rows: Picked | None) -> Iterator[tuple[Picked, Queries]]:
        """Yield the scores of all rows, or of some."""
        for part, scores, _ in self._scored(queries, rows):
            yield part, scores

    def _scored(
        self, queries: Queries, rows: Picked | None
    ) -> Iterator[tuple[Picked, Queries, Callable[[Picked], np.ndarray]]]:
        """Yield what `scores` does, and what returns the lengths of some of these rows."""
        place = self._near
        asked = torch.tensor(queries, device=place)
        fetched = _HOST_BYTES if place.type == "cpu" else _GPU_BYTES
        step = max(1, min(SCORES // len(queries), fetched // (4 * self.index.d)))
        numbers = np.arange(self.rows) if rows is None else rows
        for first in range(0, len(numbers), step):
            part = numbers[first : first + step]
            block = self._rows(part)
            scores = products_in_pieces(asked, block).float().cpu().numpy()
            yield part, scores, partial(_norms, block)

    def reaching(self, queries: Queries, least: Least, longest: float, rows: Picked | None) -> Reached:
        """Return the rows whose exact score may reach `least`; see `Shard`."""
        if self.gpu is not None:
            # As many as a GPU returns may be enough, which takes no row from there.
            (scores, numbers), *_ = self.search(queries, GPU_MOST, rows, both=False)
            slack = self.rounding * longest * np.linalg.norm(queries.astype(np.float64), axis=1)
            near = scores >= (least - slack)[:, None]
            if scores.shape[1] < GPU_MOST or not near[:, -1].any():
                return [found[mine] for found, mine in zip(numbers, near, strict=True)]
        return reaching(self._scored(queries, rows), queries, least, longest, self.rounding)

    def take(self, rows: Picked) -> Rows:
        """Return some rows."""
        # They were half precision before.
        return self._rows(rows).half().cpu().numpy().view(np.uint16)

    @property
    def _near(self) -> torch.device:
        """Where rows are fetched to: on a GPU they stay, if torch has it too."""
        return torch.device(f"cuda:{self.gpu}" if self.gpu is not None and torch.cuda.is_available() else "cpu")

    def _rows(self, rows: Picked) -> Float32[Tensor, "rows sketch"]:
        """Return some rows in single precision."""
        place = self._near
        if place.type == "cpu":
            with self._lock:
                return torch.from_numpy(self.index.reconstruct_batch(rows))
        module, keys = faiss(), torch.from_numpy(rows).to(place)
        found = torch.empty(len(rows), self.index.d, device=place)
        with self._lock:
            # Both work in streams of their own: neither may touch this memory before the other is done with it.
            torch.cuda.synchronize(place)
            self.index.reconstruct_batch_c(
                len(rows), module.cast_integer_to_idx_t_ptr(keys.data_ptr()),
                module.cast_integer_to_float_ptr(found.data_ptr()),
            )  # fmt: skip
            torch.cuda.synchronize(place)
        return found

    def added(self, vectors: Rows) -> "FaissShard":
        """Return a shard with further rows."""
        place = self._near
        if place.type != "cpu":
            torch.cuda.empty_cache()  # FAISS cannot use what torch keeps for itself
        step = max(1, (_HOST_BYTES if place.type == "cpu" else _GPU_BYTES) // (4 * self.index.d))
        for first in range(0, len(vectors), step):
            part = vectors[first : first + step].view(np.float16)
            if place.type == "cpu":
                with self._lock:
                    self.index.add(part.astype(np.float32))
                continue
            # Half as much to send, and no core has to widen it. A copy, for torch complains of what cannot be written.
            wide = torch.from_numpy(part if part.flags.writeable else part.copy()).to(place).float()
            with self._lock:
                torch.cuda.synchronize(place)
                self.index.add_c(len(part), faiss().cast_integer_to_float_ptr(wide.data_ptr()))
                torch.cuda.synchronize(place)
            del wide
        if place.type != "cpu":
            torch.cuda.empty_cache()
        return self


def _only(found: Found, rows: np.ndarray, wanted: int) -> Found:
    """Leave out what is not among `rows`; at least `wanted` are."""
    scores, numbers = found
    kept = np.isin(numbers, rows)
    order = np.argsort(~kept, axis=1, kind="stable")[:, :wanted]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def _norms(block: Float32[Tensor, "rows sketch"], some: Picked) -> np.ndarray:
    return block[torch.from_numpy(some).to(block.device)].double().norm(dim=1).cpu().numpy()
