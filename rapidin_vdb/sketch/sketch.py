"""The sketch of one database: gradients in, tensor by tensor; RapidGrads out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rapidin_vdb.errors import SpecError
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch.bucket_map import BucketMap


def fold(grad: Float[Tensor, "*batch grad"], width: int) -> Float[Tensor, "*batch {width}"]:
    """Sum consecutive groups of `grad / width` coordinates (the paper's last step; also narrows a RapidGrad).

    >>> fold(torch.arange(1.0, 9.0), width=2)
    tensor([10., 26.])

    Raises:
        SpecError: the width does not divide the length.
    """
    if width < 1 or grad.shape[-1] % width:
        raise SpecError(f"cannot fold {grad.shape[-1]} coordinates to width {width}: not a multiple")
    return grad.unflatten(-1, (width, -1)).sum(-1)


class Sketch:
    """Sends the gradient of each parameter tensor to its buckets; the whole gradient never exists."""

    def __init__(self, spec: SketchSpec, lengths: Sequence[int]) -> None:
        """Compose the map for parameter tensors of these lengths, in theta's order.

        Raises:
            SpecError: the spec cannot be honoured for this many coordinates.
        """
        self.spec = spec
        bucket_map = BucketMap(spec, sum(lengths))
        self._buckets: list[Tensor] = []
        self._signs: list[Tensor] = []
        start = 0
        for length in lengths:
            self._buckets.append(bucket_map.buckets(start, start + length))
            self._signs.append(1 - 2 * bucket_map.negative(start, start + length).to(torch.int8))
            start += length

    def add(self, rapidgrad: Float[Tensor, " sketch"], tensor: int, grad: Float[Tensor, " grad"]) -> None:
        """Add the part of parameter tensor number `tensor` to a RapidGrad, in place.

        The sketch is linear: adding all tensors, in any order, gives the sketch of the whole gradient.
        """
        rapidgrad.index_add_(0, self._buckets[tensor], grad * self._signs[tensor])

    def to(self, device: str) -> "Sketch":
        """Move the map to a device, in place, and return it."""
        self._buckets = [buckets.to(device) for buckets in self._buckets]
        self._signs = [signs.to(device) for signs in self._signs]
        return self
