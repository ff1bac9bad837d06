"""Algorithm 1, the signs and the fold composed into one map: coordinate i goes to one bucket with one sign."""

from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Integer, UInt8
from torch import Tensor

from rapidin_vdb.compiled import compiled, side_by_side
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch.shuffle import draw_packed_signs, draw_shuffle, draw_signs, padded_length

# Coordinates mapped at a time, and those of them that one thread takes.
_RUN = 1 << 24
_SHARE = 1 << 20


@cache
def _follow() -> Any:
    """Compile the loop that follows positions through all permutations."""

    def follow(positions, tables, starts, shifts):  # type: ignore[no-untyped-def]
        # So many at a time that reading a permutation is nothing, so few that both stay in a core's cache.
        run = 65536
        for begin in range(0, len(positions), run):
            part = positions[begin : begin + run]
            for step in range(len(shifts)):
                rows = tables[starts[2 * step] : starts[2 * step + 1]]
                columns = tables[starts[2 * step + 1] : starts[2 * step + 2]]
                shift = positions.dtype.type(shifts[step])
                below = positions.dtype.type((1 << shifts[step]) - 1)
                low = positions.dtype.type(len(columns) - 1)
                for number in range(len(part)):
                    position = part[number]
                    position = (positions.dtype.type(rows[position >> shift]) << shift) | (position & below)
                    part[number] = (position & ~low) | columns[position & low]

    return compiled(follow)


class BucketMap:
    """The composed map of one sketch; any range of coordinates can be asked for, none is kept."""

    def __init__(self, spec: SketchSpec, grad_length: int) -> None:
        self.spec = spec
        self.length = padded_length(grad_length, width=spec.width)
        self._log_length = self.length.bit_length() - 1
        # "Row r of the result is row permutation[r]" sends row p to where the permutation names it: to its inverse.
        self._steps = [
            (_inverse(step.row_permutation), _inverse(step.column_permutation))
            for step in draw_shuffle(spec, self.length)
        ]
        self._moved: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def positions(self, start: int, stop: int, *, device: str = "cpu") -> Integer[Tensor, " grad"]:
        """Return where the shuffle puts coordinates [start, stop) of the padded gradient, as int64.

        A coordinate's position is followed through all permutations: for a row permutation its high bits are looked up,
        for a column permutation its low bits. The cost per coordinate does not depend on the gradient's length.
        """
        result = torch.empty(stop - start, dtype=torch.int64, device=device)
        for begin, positions in self._runs(start, stop, device):
            result[begin - start : begin - start + len(positions)] = positions
        return result

    def buckets(self, start: int, stop: int, *, device: str = "cpu") -> Integer[Tensor, " grad"]:
        """Return the bucket of each of the coordinates [start, stop): uint16 for widths up to 65536, else int32."""
        shift = self._log_length - (self.spec.width.bit_length() - 1)
        dtype = torch.uint16 if self.spec.width <= 1 << 16 else torch.int32
        result = torch.empty(stop - start, dtype=dtype, device=device)
        for begin, positions in self._runs(start, stop, device):
            result[begin - start : begin - start + len(positions)] = (positions >> shift).to(dtype)
        return result

    def _runs(self, start: int, stop: int, device: str) -> Iterator[tuple[int, Integer[Tensor, " run"]]]:
        """Yield the positions of runs of coordinates, and where each run begins."""
        # int32 halves the memory traffic and suffices below 2^31 coordinates.
        dtype = torch.int32 if self._log_length < 31 else torch.int64
        for begin in range(start, stop, _RUN):
            end = min(begin + _RUN, stop)
            if device == "cpu":
                yield begin, self._followed(begin, end, dtype)
            else:
                yield begin, self._followed_by_torch(begin, end, dtype, device)

    def _followed(self, begin: int, end: int, dtype: torch.dtype) -> Integer[Tensor, " run"]:
        positions = torch.arange(begin, end, dtype=dtype)
        flat, tables, starts, shifts = positions.numpy(), *self._flat_steps
        parts = range(0, len(flat), _SHARE)
        side_by_side(
            lambda number: _follow()(flat[parts[number] : parts[number] + _SHARE], tables, starts, shifts), len(parts)
        )
        return positions

    @cached_property
    def _flat_steps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All permutations behind one another, where each begins, and by how far row permutations shift."""
        tables = [table.numpy() for step in self._steps for table in step] or [np.zeros(1, np.int32)]
        starts = np.cumsum([0, *(len(table) for table in tables)])
        shifts = [self._log_length - (len(rows).bit_length() - 1) for rows, _ in self._steps]
        return np.concatenate(tables), starts, np.array(shifts, np.int64)

    def _followed_by_torch(self, begin: int, end: int, dtype: torch.dtype, device: str) -> Integer[Tensor, " run"]:
        position = torch.arange(begin, end, dtype=dtype, device=device)
        for rows, columns in self._steps_on(device):
            shift = self._log_length - (len(rows).bit_length() - 1)
            position = (rows[position >> shift].to(dtype) << shift) | (position & ((1 << shift) - 1))
            low = len(columns) - 1
            position = (position & ~low) | columns[position & low]
        return position

    def _steps_on(self, device: str) -> list[tuple[Tensor, Tensor]]:
        if device not in self._moved:
            self._moved[device] = [(rows.to(device), columns.to(device)) for rows, columns in self._steps]
        return self._moved[device]

    def leave_devices(self) -> None:
        """Drop the permutations' copies on GPUs; what is asked for later brings them there again."""
        self._moved.clear()

    def negative(self, start: int, stop: int) -> Bool[Tensor, " grad"]:
        """Return which of the coordinates [start, stop) have sign -1.

        The signs are drawn per coordinate of the unshuffled gradient; that rho of the paper's step 4 stands in another
        order changes nothing, its entries being independent of the shuffle.
        """
        return torch.from_numpy(draw_signs(self.spec, start, stop))

    def signs(self, start: int, stop: int) -> UInt8[Tensor, " bytes"]:
        """Return the same eight to a byte, the first in the lowest bit."""
        return torch.from_numpy(draw_packed_signs(self.spec, start, stop))


def _inverse(permutation: np.ndarray) -> Tensor:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    return torch.from_numpy(inverse)
