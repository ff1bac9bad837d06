"""The sketch's inner loop on the CPU for several samples at once, each in a lane of its own of the processor's vectors.

A bucket holds one number for each of eight samples, side by side: one look at the map, and one access to memory in no
order, serve them all. Gradients, which lie sample by sample, are turned round block by block in registers.
"""

from functools import cache
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rapidin_vdb.compiled import compiled, side_by_side
from rapidin_vdb.intrinsics import LANES, lane_adder, turner

_BLOCK = 256  # coordinates; eight rows of them stay in the innermost cache
_SPARE_BYTES = 64 << 20
WORTH_LANES = 3
"""Samples below which lanes cost more than one after the other."""


class Buckets:
    """Those of up to eight samples: zero in the beginning, and given to their RapidGrads in the end."""

    _spare: ClassVar[dict[int, list[np.ndarray]]] = {}  # all zero; new pages would have to be made so each time

    def __init__(self, width: int) -> None:
        """Take what is spare, or make it."""
        try:
            self._sums = self._spare.setdefault(width, []).pop()
        except IndexError:
            self._sums = np.zeros((width, LANES), np.float32)
        self.squares = np.zeros(LANES)
        """What was added, squared and summed, by sample."""

    def add(self, grads: np.ndarray, buckets: np.ndarray, signs: np.ndarray, begin: int, stop: int) -> None:
        """Add the coordinates from `begin`, a multiple of eight, to `stop` of up to eight rows, and their squares."""
        ones = np.ones(len(grads), np.float32)
        _loops()[0](self._sums, grads, buckets, signs, self.squares, ones, False, begin, stop)

    def add_scaled(self, grads: np.ndarray, buckets: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> None:
        """Add up to eight rows, each scaled by a number of its own; their squares are not asked for."""
        _loops()[0](self._sums, grads, buckets, signs, self.squares, scales, True, 0, grads.shape[1])

    def give(self, rapidgrads: np.ndarray, scales: np.ndarray) -> None:
        """Add all sums, scaled by sample, to the samples' RapidGrads; this object is done then."""
        _loops()[1](rapidgrads, self._sums, scales)
        if self._sums.nbytes <= _SPARE_BYTES:
            self._spare[len(self._sums)].append(self._sums)


class BatchLanes:
    """The sums of a batch's small tensors, eight samples side by side, until they are given to their RapidGrads.

    A small tensor reaches few buckets, each where the processor has none of its memory at hand: for eight samples at
    once that is waited for once.
    """

    def __init__(self, rapidgrads: Float[Tensor, "batch sketch"]) -> None:
        """Add to these in the end, which are on the CPU."""
        self._rapidgrads = rapidgrads.numpy()
        self._most = _SPARE_BYTES // (4 * LANES * rapidgrads.shape[1])
        self._held: dict[int, Buckets] = {}

    def of(self, first: int, count: int) -> list[Buckets]:
        """Return the buckets of so many samples from `first` on, eight after eight; of as many as are worth it."""
        samples, width = self._rapidgrads.shape
        # What is in lanes beyond the last of a few rows is no sum of anything: none of them may be another sample's.
        last = (
            first + count
            if first + count == samples and samples % LANES >= WORTH_LANES
            else (first + count) // LANES * LANES
        )
        groups = range(first // LANES, min(-(-last // LANES), self._most)) if first % LANES == 0 else ()
        for group in groups:
            if group not in self._held:
                self._held[group] = Buckets(width)
        return [self._held[group] for group in groups]

    def give(self) -> None:
        """Add all sums to the RapidGrads; more can be added afterwards."""
        held, self._held = self._held, {}

        def give_one(number: int) -> None:
            group, buckets = list(held.items())[number]
            mine = self._rapidgrads[group * LANES : (group + 1) * LANES]
            buckets.give(mine, np.ones(len(mine), np.float32))

        side_by_side(give_one, len(held))


@cache
def _loops() -> tuple[Any, Any]:
    """Compile the two loops; some seconds the first time in a process, and only where batches are sketched."""
    turned, turned_and_squared, add_lanes = turner(squares=False), turner(squares=True), lane_adder()

    def add(sums, grads, buckets, signs, squares, scales, scaled, begin, stop):  # type: ignore[no-untyped-def]
        rows, length = grads.shape
        tile, lane_scales = np.empty((_BLOCK, LANES), np.float32), np.ones(LANES, np.float32)
        # Loops, not slices that are set: numba takes longer to compile one of these than all the rest.
        for row in range(rows):
            lane_scales[row] = scales[row]
        # Sums of float32 squares over a block only: over millions, the small ones would be lost.
        partial = np.zeros((LANES, LANES), np.float32)
        for first in range(begin, stop - _BLOCK + 1, _BLOCK):
            for place in range(0, _BLOCK, LANES):
                source = grads.ctypes.data + 4 * (first + place)
                if scaled:
                    turned(source, length, rows, tile.ctypes.data + 4 * LANES * place, lane_scales.ctypes.data)
                else:
                    turned_and_squared(source, length, rows, tile.ctypes.data + 4 * LANES * place, partial.ctypes.data)
            if not scaled:
                for row in range(rows):
                    for lane in range(LANES):
                        squares[row] += np.float64(partial[row, lane])
                        partial[row, lane] = 0
            for byte in range(_BLOCK // 8):
                word = signs[(first >> 3) + byte]
                for bit in range(8):
                    place = 8 * byte + bit
                    # By arithmetic: a branch would be mispredicted half of the time.
                    sign = np.float32(1.0) - np.float32(2.0) * np.float32((word >> bit) & 1)
                    bucket = np.int64(buckets[first + place])
                    add_lanes(sums.ctypes.data + 4 * LANES * bucket, tile.ctypes.data + 4 * LANES * place, sign)
        for current in range(stop - (stop - begin) % _BLOCK, stop):
            sign = np.float32(1.0) - np.float32(2.0) * np.float32((signs[current >> 3] >> (current & 7)) & 1)
            for row in range(rows):
                value = scales[row] * grads[row, current]
                if not scaled:
                    squares[row] += np.float64(value * value)
                sums[buckets[current], row] += sign * value

    def give(rapidgrads, sums, scales):  # type: ignore[no-untyped-def]
        rows, width = rapidgrads.shape
        tile, ones = np.empty((LANES, LANES), np.float32), np.ones(LANES, np.float32)
        for first in range(0, width - LANES + 1, LANES):
            turned(sums.ctypes.data + 4 * LANES * first, LANES, LANES, tile.ctypes.data, ones.ctypes.data)
            for row in range(rows):
                for place in range(LANES):
                    rapidgrads[row, first + place] += scales[row] * tile[row, place]
        for bucket in range(width - width % LANES, width):
            for row in range(rows):
                rapidgrads[row, bucket] += scales[row] * sums[bucket, row]
        for bucket in range(width):
            for lane in range(LANES):
                sums[bucket, lane] = 0

    return compiled(add), compiled(give)
