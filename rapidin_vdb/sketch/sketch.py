"""The sketch of one database: gradients in, tensor by tensor; RapidGrads out."""

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from rapidin_vdb.errors import SpecError
from rapidin_vdb.machine import free_bytes
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch import scatter_gpu
from rapidin_vdb.sketch.bucket_map import BucketMap
from rapidin_vdb.sketch.lanes import Buckets
from rapidin_vdb.sketch.scatter import scatter_batch, scatter_rows
from rapidin_vdb.sketch.scatter_torch import numbers, scatter_batch_torch, scatter_rows_torch, signed_view, unpacked

logger = logging.getLogger(__name__)

# Coordinates that are added at a time in plain torch, which takes some 20 bytes for each; signs are bits of bytes.
_ADDED = 1 << 24

Keep = Literal["device", "host", "nowhere"]
"""Where the composed map is kept; `nowhere` computes it again for every batch."""

_Map = tuple[Integer[Tensor, " grad"], UInt8[Tensor, " bytes"]]


def map_bytes(coordinates: int, width: int) -> int:
    """Return the bytes of a map of so many coordinates, where it is kept: their buckets, and signs as bits."""
    return coordinates * (2 if width <= 1 << 16 else 4) + coordinates // 8


def fold(grad: Float[Tensor, "*batch grad"], width: int) -> Float[Tensor, "*batch {width}"]:
    """Sum consecutive groups of `grad / width` coordinates (the paper's last step; also narrows a RapidGrad).

    >>> import torch
    >>> fold(torch.arange(1.0, 9.0), width=2)
    tensor([10., 26.])

    Raises:
        SpecError: the width does not divide the length.
    """
    if width < 1 or grad.shape[-1] % width:
        raise SpecError(f"cannot fold {grad.shape[-1]} coordinates to width {width}: not a multiple")
    return grad.unflatten(-1, (width, -1)).sum(-1)


class Sketch:
    """Sends the gradient of each parameter tensor to its buckets; the whole gradient never exists.

    A bucket takes 2 bytes a coordinate for widths up to 65536, 4 above; a sign takes a bit.
    """

    def __init__(
        self, spec: SketchSpec, lengths: Sequence[int], *, device: str = "cpu", keep: Keep | None = None
    ) -> None:
        """Compose the map for parameter tensors of these lengths, in theta's order; memory decides where to keep it.

        Raises:
            SpecError: the spec cannot be honoured for this many coordinates.
        """
        self.spec = spec
        self.device = device
        self._map = BucketMap(spec, sum(lengths))
        self._starts = [0, *np.cumsum(lengths).tolist()]
        self._bytes = map_bytes(sum(lengths), spec.width)
        self.keep: Keep = keep if keep is not None else self._choose()
        self._kept: list[_Map] | None = None
        self._at_hand: tuple[int, _Map] | None = None
        if self.keep != "nowhere":
            place = self._keeper()
            composed = map(self._compose, range(len(lengths)))
            self._kept = [(place(buckets), place(signs)) for buckets, signs in composed]
            self._map.leave_devices()

    def narrowed(self, width: int) -> "Sketch":
        """Return the sketch that has fewer buckets but shares this one's map: it folds what this one would give.

        Raises:
            SpecError: the width is no power of two, or beyond this one's.
        """
        if not 1 <= width <= self.spec.width or width & (width - 1):
            raise SpecError(f"width is {width}; wanted a power of two, at most {self.spec.width}")
        narrow = copy(self)
        narrow.spec, narrow._at_hand = replace(self.spec, width=width), None
        return narrow

    def _choose(self) -> Keep:
        places: tuple[Keep, ...] = ("device",) if self.device == "cpu" else ("device", "host")
        # Half of what is free: the model's activations need room too.
        chosen: Keep = next(
            (p for p in places if self._bytes < free_bytes(self.device if p == "device" else "cpu") // 2), "nowhere"
        )
        where = {
            "device": f"is kept in the memory of {self.device}",
            "host": f"is kept in host memory: that of {self.device} has no room",
            "nowhere": "is computed again for every batch: no memory has room",
        }
        # Where it belongs is no news: on the command line, whose level is info, a query has nothing to say.
        level = logging.DEBUG if chosen == "device" else logging.INFO
        logger.log(level, "the sketch's map of %d MiB %s", -(-self._bytes >> 20), where[chosen])
        return chosen

    def _keeper(self) -> Callable[[Tensor], Tensor]:
        """Return what brings a part of the map to where it is kept."""
        if self.keep == "device":
            return lambda part: part.to(self.device)
        # A GPU reads pinned memory several times as fast, and nobody waits. Torch rounds its size up to a power of two.
        if self.device != "cpu" and 4 * self._bytes < free_bytes("cpu"):
            return lambda part: part.to("cpu").pin_memory()
        return lambda part: part.to("cpu")

    def _compose(self, number: int) -> _Map:
        start, stop = self._starts[number], self._starts[number + 1]
        return self._map.buckets(start, stop, device=self.device), self._map.signs(start, stop)

    def _tensor(self, number: int) -> _Map:
        """Return buckets and signs of a tensor, on the device."""
        folding = self.spec.width < self._map.spec.width
        if self._kept is not None and self.keep == "device" and not folding:
            return self._kept[number]
        # A batch may come in parts, and embedding rows come sample by sample: the last map is likely asked for again.
        if self._at_hand is None or self._at_hand[0] != number:
            self._at_hand = None  # first: two of the largest might not fit
            buckets, signs = self._kept[number] if self._kept is not None else self._compose(number)
            buckets, signs = buckets.to(self.device, non_blocking=True), signs.to(self.device, non_blocking=True)
            self._at_hand = number, (self._folded(buckets) if folding else buckets, signs)
        return self._at_hand[1]

    def _folded(self, buckets: Integer[Tensor, " grad"]) -> Integer[Tensor, " grad"]:
        """Return the buckets of the map's width as those of this one's, of the type that `BucketMap.buckets` has."""
        shift = (self._map.spec.width // self.spec.width).bit_length() - 1
        folded = signed_view(buckets) >> shift
        folded &= self.spec.width - 1  # sixteen bits come as signed numbers: what the sign has filled in is cut off
        return folded if self.spec.width > 1 << 16 else folded.to(torch.int16).view(torch.uint16)

    def add(self, rapidgrad: Float[Tensor, " sketch"], number: int, grad: Float[Tensor, " grad"]) -> None:
        """Add the gradient of parameter tensor `number` to a RapidGrad as it is, in place, in plain torch.

        The sketch is linear: adding all tensors, in any order, gives the sketch of the whole gradient.
        """
        buckets, signs = self._tensor(number)
        for first in range(0, len(grad), _ADDED):
            part = grad[first : first + _ADDED]
            bits = unpacked(signs[first // 8 : (first + _ADDED) // 8], len(part))
            rapidgrad.index_add_(0, numbers(buckets[first : first + _ADDED]), part * bits)

    def add_batch(
        self,
        rapidgrads: Float[Tensor, "batch sketch"],
        number: int,
        grads: Float[Tensor, "batch grad"],
        *,
        normalize: bool,
        lanes: Sequence[Buckets] = (),
    ) -> None:
        """Add the gradients of a batch's samples of parameter tensor `number` to their RapidGrads, in place.

        With `normalize`, each sample's gradient is scaled to L2 norm 1 first; one that is exactly zero stays zero.
        Gradients may be of any floating type. On a CPU, small tensors go to `lanes`, as far as there are any: see
        `BatchLanes`.
        """
        buckets, signs = self._tensor(number)
        if self.device == "cpu":
            scatter_batch(rapidgrads, grads.float(), buckets=buckets, signs=signs, normalize=normalize, lanes=lanes)
        elif scatter_gpu.available(self.device):
            scatter_gpu.scatter_batch_gpu(rapidgrads, grads, buckets=buckets, signs=signs, normalize=normalize)
        else:
            scatter_batch_torch(rapidgrads, grads, buckets=buckets, signs=signs, normalize=normalize)

    def add_rows(
        self,
        rapidgrad: Float[Tensor, " sketch"],
        number: int,
        rows: Integer[Tensor, " rows"],
        grads: Float[Tensor, "rows columns"],
        *,
        normalize: bool,
    ) -> None:
        """Add some rows of one sample's gradient of an embedding, whose others are zero, to its RapidGrad, in place."""
        buckets, signs = self._tensor(number)
        scatter = scatter_rows if self.device == "cpu" else scatter_rows_torch
        scatter(rapidgrad, grads, rows=rows, buckets=buckets, signs=signs, normalize=normalize)
