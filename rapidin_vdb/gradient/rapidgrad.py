"""From a sample to its RapidGrad: gradient, layer-wise normalisation, sketch, half precision."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.sample import stream_gradient
from rapidin_vdb.records import Encoded, Normalize, SketchSpec
from rapidin_vdb.sketch import Sketch


def normalized(grad: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Scale a parameter tensor's gradient to L2 norm 1; one that is exactly zero stays zero (paper, section 3.1).

    >>> normalized(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    # Scaled by its largest entry first: squares of very small gradients would vanish.
    largest = grad.abs().max()
    if largest == 0:
        return grad
    scaled = grad / largest
    return scaled / torch.linalg.vector_norm(scaled)


class RapidGradMaker:
    """Makes RapidGrads with one model and one sketch."""

    def __init__(self, loaded: LoadedModel, *, spec: SketchSpec, normalize: Normalize) -> None:
        """Compose the sketch for the model's theta.

        Raises:
            SpecError: the sketch cannot be honoured for this model.
        """
        self.loaded = loaded
        self.spec = spec
        self.normalize = normalize
        self._sketch = Sketch(spec, [shape.count for shape in loaded.shapes]).to(loaded.device)

    def make(self, encoded: Encoded) -> tuple[np.ndarray, float]:
        """Return the RapidGrad of a sample, float32 [width], and its loss.

        Raises:
            GradientError: the loss or the gradient is not finite, or the gradient is zero.
        """
        rapidgrad = torch.zeros(self.spec.width, device=self.loaded.device)

        def receive(number: int, grad: Tensor) -> None:
            flat = grad.reshape(-1).float()
            self._sketch.add(rapidgrad, number, normalized(flat) if self.normalize == "layer" else flat)

        loss = stream_gradient(self.loaded, encoded, receive)
        vector = rapidgrad.cpu().numpy()
        if not np.isfinite(vector).all():
            raise GradientError(f"sample {encoded.sample_id}: the gradient is not finite (loss {loss:.4g})")
        if not vector.any():
            raise GradientError(f"sample {encoded.sample_id}: the gradient is zero (loss {loss:.4g})")
        return vector, loss


def to_half(rapidgrad: Float[np.ndarray, " sketch"], *, sample_id: str) -> np.ndarray:
    """Return a RapidGrad in half precision, as it is stored.

    Raises:
        GradientError: an entry is beyond half precision, or all of them vanish in it.
    """
    with np.errstate(over="ignore"):
        half = rapidgrad.astype(np.float16)
    if not np.isfinite(half).all():
        raise GradientError(
            f"sample {sample_id}: the RapidGrad reaches {np.abs(rapidgrad).max():.3g}, beyond half precision (65504); "
            "make the database with --normalize layer"
        )
    if not half.any():
        raise GradientError(
            f"sample {sample_id}: the RapidGrad reaches only {np.abs(rapidgrad).max():.3g} and vanishes in half "
            "precision; make the database with --normalize layer"
        )
    return half
