"""Algorithm 1, the signs and the fold composed into one map: coordinate i goes to one bucket with one sign."""

import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch.shuffle import draw_shuffle, draw_signs, padded_length

# Coordinates mapped at a time: their positions then stay in a core's cache through all 2 * lambda look-ups.
_CHUNK = 1 << 15


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

    def positions(self, start: int, stop: int, *, device: str = "cpu") -> Integer[Tensor, " grad"]:
        """Return where the shuffle puts coordinates [start, stop) of the padded gradient.

        A coordinate's position is followed through all permutations: for a row permutation its high bits are looked up,
        for a column permutation its low bits. The cost per coordinate does not depend on the gradient's length.
        """
        result = torch.empty(stop - start, dtype=torch.int64, device=device)
        steps = [(rows.to(device), columns.to(device)) for rows, columns in self._steps]
        chunk = _CHUNK if device == "cpu" else 1 << 24
        # int32 halves the memory traffic and suffices below 2^31 coordinates.
        dtype = torch.int32 if self._log_length < 31 else torch.int64
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            position = torch.arange(begin, end, dtype=dtype, device=device)
            for rows, columns in steps:
                shift = self._log_length - (len(rows).bit_length() - 1)
                position = (rows[position >> shift].to(position.dtype) << shift) | (position & ((1 << shift) - 1))
                low = len(columns) - 1
                position = (position & ~low) | columns[position & low]
            result[begin - start : end - start] = position
        return result

    def buckets(self, start: int, stop: int, *, device: str = "cpu") -> Integer[Tensor, " grad"]:
        """Return the bucket of each of the coordinates [start, stop), as int32."""
        shift = self._log_length - (self.spec.width.bit_length() - 1)
        return (self.positions(start, stop, device=device) >> shift).to(torch.int32)

    def negative(self, start: int, stop: int) -> Bool[Tensor, " grad"]:
        """Return which of the coordinates [start, stop) have sign -1.

        The signs are drawn per coordinate of the unshuffled gradient; that rho of the paper's step 4 stands in another
        order changes nothing, its entries being independent of the shuffle.
        """
        return torch.from_numpy(draw_signs(self.spec, start, stop))


def _inverse(permutation: np.ndarray) -> Tensor:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    return torch.from_numpy(inverse)
