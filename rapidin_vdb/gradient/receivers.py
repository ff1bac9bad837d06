"""What takes the gradients of a batch as they come: sums them into RapidGrads, or measures them."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rapidin_vdb.sketch import BatchLanes, Sketch

_BLOCK = 4096
_SMALL, _LARGE = 1e-12, 1e12


@runtime_checkable
class Receiver(Protocol):
    """Takes per-sample gradients as they come; each tensor of theta comes once for every sample that it touches."""

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Take tensor `number` for the samples from `first` on, [samples, coordinates], in whatever type they come."""
        ...

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Take some rows of tensor `number` for one sample, [rows] and float32 [rows, columns]; all others are zero."""
        ...


class Sketcher:
    """Adds the gradients of a batch to its RapidGrads, float32 [batch, width], normalised or not."""

    def __init__(self, sketch: Sketch, rapidgrads: Tensor, normalize: bool) -> None:
        self._sketch = sketch
        self._rapidgrads = rapidgrads
        self._normalize = normalize
        self._lanes = BatchLanes(rapidgrads) if rapidgrads.device.type == "cpu" else None

    @property
    def rapidgrads(self) -> Float[Tensor, "batch sketch"]:
        """The sums of what came so far."""
        if self._lanes is not None:
            self._lanes.give()
        return self._rapidgrads

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Take dense gradients."""
        part = self._rapidgrads[first : first + len(grads)]
        lanes = self._lanes.of(first, len(grads)) if self._lanes is not None else ()
        self._sketch.add_batch(part, number, grads, normalize=self._normalize, lanes=lanes)

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Take rows of an embedding, whose others are zero."""
        self._sketch.add_rows(self._rapidgrads[sample], number, ids, grads, normalize=self._normalize)


class Measuring:
    """Hands gradients on, and keeps the L2 norm of each sample's gradient of each tensor."""

    def __init__(self, receiver: Receiver, batch: int, tensors: int) -> None:
        self._receiver = receiver
        self.norms = np.zeros((batch, tensors))
        """float64 [batch, tensors]."""

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Measure dense gradients."""
        self.norms[first : first + len(grads), number] = norms_of(grads)
        self._receiver.dense(number, first, grads)

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Measure rows of an embedding, whose others are zero."""
        self.norms[sample, number] = norms_of(grads.reshape(1, -1))[0]
        self._receiver.rows(number, sample, ids, grads)


def norms_of(grads: Float[Tensor, "batch grad"]) -> Float64[np.ndarray, " batch"]:
    """Return the L2 norm of each sample's gradient."""
    # In single precision block by block: over millions at once it is off by 1e-4, and in double it costs twice as much;
    # of 16 bits it takes a copy of four times the memory.
    if grads.dtype == torch.float64:
        return torch.linalg.vector_norm(grads, dim=1).cpu().numpy()
    whole, single = grads.shape[1] // _BLOCK * _BLOCK, {"dtype": torch.float32}
    blocks = torch.linalg.vector_norm(grads[:, :whole].unflatten(1, (-1, _BLOCK)), dim=2, **single)
    rest = torch.linalg.vector_norm(grads[:, whole:], dim=1, **single)
    norms = torch.sqrt(blocks.double().square().sum(1) + rest.double().square())
    # Squares of very small or very large numbers leave single precision.
    if not bool(((norms > _SMALL) & (norms < _LARGE)).all()):
        norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64)
    return norms.cpu().numpy()


class Scaler:
    """Adds scaled gradients to the RapidGrads of tokens."""

    def __init__(self, sketch: Sketch, rapidgrads: Tensor, factors: Tensor) -> None:
        self._sketch = sketch
        self._rapidgrads = rapidgrads
        self._factors = factors

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Take dense gradients."""
        part = slice(first, first + len(grads))
        scaled = grads.float() * self._factors[part, number].unsqueeze(1)
        self._sketch.add_batch(self._rapidgrads[part], number, scaled, normalize=False)

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Take rows of an embedding, whose others are zero."""
        scaled = grads * self._factors[sample, number]
        self._sketch.add_rows(self._rapidgrads[sample], number, ids, scaled, normalize=False)


class Dots:
    """Takes the gradients of a batch, and keeps their inner products with a direction."""

    def __init__(self, grads: dict[int, Tensor], batch: int, tensors: int) -> None:
        self._grads = grads
        self.dots = np.zeros((batch, tensors))
        """float64 [batch, tensors]."""

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Take dense gradients."""
        if number in self._grads:
            products = grads.float() @ self._grads[number].reshape(-1)
            self.dots[first : first + len(grads), number] = products.double().cpu().numpy()

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Take rows of an embedding, whose others are zero."""
        if number in self._grads:
            self.dots[sample, number] = float((grads * self._grads[number][ids]).sum(dtype=torch.float64))
