"""The sketch of one database: gradients in, tensor by tensor; RapidGrads out."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from rapidin_vdb.errors import SpecError
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch import scatter_gpu
from rapidin_vdb.sketch.bucket_map import BucketMap
from rapidin_vdb.sketch.memory import free_bytes
from rapidin_vdb.sketch.scatter import scatter_batch, scatter_rows

logger = logging.getLogger(__name__)

Keep = Literal["device", "host", "nowhere"]
"""Where the composed map is kept; `nowhere` computes it again for every batch."""


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
        self._small = spec.width <= 1 << 16
        self.keep: Keep = keep if keep is not None else self._choose(sum(lengths))
        self._kept = None
        if self.keep != "nowhere":
            place = device if self.keep == "device" else "cpu"
            self._kept = [tuple(part.to(place) for part in self._compose(n)) for n in range(len(lengths))]

    def _choose(self, coordinates: int) -> Keep:
        needed = coordinates * (2 if self._small else 4) + coordinates // 8
        places: tuple[Keep, ...] = ("device",) if self.device == "cpu" else ("device", "host")
        # Half of what is free: the model's activations need room too.
        chosen: Keep = next(
            (p for p in places if needed < free_bytes(self.device if p == "device" else "cpu") // 2), "nowhere"
        )
        if chosen != "device":
            what = "kept in host memory" if chosen == "host" else "computed again for every batch"
            logger.info("the sketch's map of %d MiB does not fit the device's memory: %s", needed >> 20, what)
        return chosen

    def _compose(self, number: int) -> tuple[Integer[Tensor, " grad"], UInt8[Tensor, " bytes"]]:
        start, stop = self._starts[number], self._starts[number + 1]
        buckets = self._map.buckets(start, stop, device=self.device)
        signs = np.packbits(self._map.negative(start, stop).numpy(), bitorder="little")
        return buckets, torch.from_numpy(signs)

    def _tensor(self, number: int) -> tuple[Integer[Tensor, " grad"], UInt8[Tensor, " bytes"]]:
        buckets, signs = self._kept[number] if self._kept is not None else self._compose(number)
        return buckets.to(self.device, non_blocking=True), signs.to(self.device, non_blocking=True)

    def add(self, rapidgrad: Float[Tensor, " sketch"], number: int, grad: Float[Tensor, " grad"]) -> None:
        """Add the gradient of parameter tensor `number` to a RapidGrad as it is, in place, in plain torch.

        The sketch is linear: adding all tensors, in any order, gives the sketch of the whole gradient.
        """
        buckets, signs = self._tensor(number)
        rapidgrad.index_add_(0, buckets.to(torch.int32), grad * _unpacked(signs, len(grad)))

    def add_batch(
        self,
        rapidgrads: Float[Tensor, "batch sketch"],
        number: int,
        grads: Float[Tensor, "batch grad"],
        *,
        normalize: bool,
    ) -> None:
        """Add the gradients of a batch's samples of parameter tensor `number` to their RapidGrads, in place.

        With `normalize`, each sample's gradient is scaled to L2 norm 1 first; one that is exactly zero stays zero.
        """
        buckets, signs = self._tensor(number)
        if self.device == "cpu":
            scatter_batch(rapidgrads, grads, buckets=buckets, signs=signs, normalize=normalize)
            return
        scales = _inverse_norms(grads) if normalize else torch.ones(len(grads), 1, device=grads.device)
        if scatter_gpu.available():
            scatter_gpu.scatter_batch_gpu(rapidgrads, grads, scales.squeeze(1), buckets=buckets, signs=signs)
        else:
            rapidgrads.index_add_(1, buckets.to(torch.int32), grads * scales * _unpacked(signs, grads.shape[1]))

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
        if self.device == "cpu":
            scatter_rows(rapidgrad, grads, rows=rows, buckets=buckets, signs=signs, normalize=normalize)
            return
        if normalize:
            grads = grads * _inverse_norms(grads.reshape(1, -1))
        columns = torch.arange(grads.shape[1], device=grads.device)
        places = (rows.unsqueeze(1) * grads.shape[1] + columns).reshape(-1)
        negative = (signs[places >> 3] >> (places & 7).to(torch.uint8)) & 1
        signed = grads.reshape(-1) * (1 - 2 * negative.to(grads.dtype))
        rapidgrad.index_add_(0, buckets.to(torch.int32)[places], signed)


def _unpacked(signs: UInt8[Tensor, " bytes"], length: int) -> Float[Tensor, " grad"]:
    """Return signs as +1.0 and -1.0."""
    bits = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return 1.0 - 2.0 * ((signs.unsqueeze(1) >> bits) & 1).reshape(-1)[:length].float()


def _inverse_norms(grads: Float[Tensor, "batch grad"]) -> Float[Tensor, "batch 1"]:
    """Return 1 / L2 norm of each row, 0 for one that is exactly zero."""
    largest = grads.abs().amax(1, keepdim=True)
    # Squares of very small gradients would vanish.
    scaled = grads / largest.clamp(min=torch.finfo(grads.dtype).tiny)
    # In float32, torch's sum of millions of squares is off by 1e-4 on a CPU.
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True, dtype=torch.float64).to(grads.dtype)
    return torch.where(largest == 0, torch.zeros_like(largest), 1 / (norms * largest))
