"""From samples to their RapidGrads: gradients, layer-wise normalisation, sketch, half precision."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rapidin_vdb.errors import GradientError, MemoryTakenError
from rapidin_vdb.gradient.batch import BatchedGradients, LateGradientError
from rapidin_vdb.gradient.memory import if_it_fits
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.objections import judged
from rapidin_vdb.gradient.probe import kind_of, tells_enough
from rapidin_vdb.gradient.receivers import Measuring, Receiver, Sketcher
from rapidin_vdb.gradient.sample import cut_behind_loss, stream_gradient
from rapidin_vdb.gradient.self_check import check
from rapidin_vdb.records import Encoded, Normalize, SketchSpec
from rapidin_vdb.sketch import Sketch

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A context of one token, and one that it predicts.
_STUB_TOKENS = 2
_SHORT_CHECKS = 3


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
    # In float32, torch's sum of millions of squares is off by 1e-4 on a CPU.
    return scaled / torch.linalg.vector_norm(scaled, dtype=torch.float64).to(grad.dtype)


class RapidGradMaker:
    """Makes RapidGrads with one model and one sketch, many samples at a time."""

    def __init__(self, loaded: LoadedModel, *, spec: SketchSpec, normalize: Normalize) -> None:
        """Compose the sketch for the model's theta.

        Raises:
            SpecError: the sketch cannot be honoured for this model.
        """
        self.loaded = loaded
        self.spec = spec
        self.normalize = normalize
        self.sketch = Sketch(spec, [shape.count for shape in loaded.shapes], device=loaded.device)
        """What folds gradients into RapidGrads; `Sketch.narrowed` shares its map."""
        self._gradients = BatchedGradients(loaded)
        self._fitted: dict[str, int] = {}  # tokens of the longest sample, by what was made of it
        self._checked = 0  # with what kind of batch, see `kind_of`
        self._short_checks = 0  # so many more, on samples too short to tell much

    def save_memory(self) -> bool:
        """Compute layers twice instead of keeping their activations, from now on; return False where that is done."""
        if self._gradients.checkpointing:
            return False
        self._gradients.checkpointing = True
        self._checked = 0
        return True

    @property
    def gradients(self) -> BatchedGradients:
        """What takes gradients in batches: which tensors are given up there, and whether layers are computed twice."""
        return self._gradients

    @property
    def checkpointing(self) -> bool:
        """Whether layers are computed twice; see `save_memory`."""
        return self._gradients.checkpointing

    def within_memory(self, work: Callable[[], T], what: str, longest: Encoded) -> T:
        """Return what `work` gives; where that does not fit the memory, what it gives once `save_memory` was called.

        `what` it is goes before the id of its `longest` sample in messages.

        Raises:
            MemoryTakenError: it does not fit then either, where one that is no shorter did before.
            GradientError: it does not, and none did.
        """
        made, whose = if_it_fits(work), f"{what} {longest.sample_id}"
        tokens = len(cut_behind_loss(longest).input_ids)  # what stands behind them was never computed
        if made is not None:
            self._fitted[what] = max(self._fitted.get(what, 0), tokens)
            return made
        if not self.save_memory():
            if tokens <= self._fitted.get(what, 0):
                raise MemoryTakenError(
                    f"{whose} does not fit the memory, where one that is no shorter did before: something else "
                    "takes it up. Ask again once that is done"
                )
            raise GradientError(
                f"{whose} does not fit the memory, even with gradient checkpointing: it takes another device, or a "
                "database with a smaller --max-tokens"
            )
        logger.warning("%s does not fit the memory: going on with gradient checkpointing", whose)
        try:
            return self.within_memory(work, what, longest)
        except GradientError:
            self._gradients.checkpointing = False  # it was of no use
            raise

    def make(self, encoded: Encoded) -> tuple[np.ndarray, float]:
        """Return the RapidGrad of a sample, float32 [width], and its loss.

        Raises:
            GradientError: the loss or the gradient is not finite, or the gradient is zero.
        """
        (result,) = self.make_batch([encoded])
        if isinstance(result, GradientError):
            raise result
        return result

    def make_batch(
        self, batch: Sequence[Encoded], *, half: bool = False, norms: dict[str, np.ndarray] | None = None
    ) -> list[tuple[np.ndarray, float] | GradientError]:
        """Return each sample's RapidGrad, float32 [width], and its loss; an error in the place of one that has none.

        With `half`, RapidGrads are float16, as they are stored; one that is beyond that is an error too. `norms` is
        filled with the L2 norms of each sample's gradient of each tensor, float64 [tensors], by sample id.

        A RapidGrad does not depend on the batch that its sample is in, but for rounding. The first batch is checked
        against autograd (see `self_check`); a tensor whose rule turns out wrong for this model falls back to that.
        """
        known = self.loaded.known_tokens
        fitting = {id(sample): cut_behind_loss(sample) for sample in batch if max(sample.input_ids) < known}
        made: dict[int, tuple[np.ndarray, float] | GradientError] = {}
        keys, samples = list(fitting), list(fitting.values())
        for places in apart(samples, self.loaded.rotary_limit):
            part = self._make_fitting([samples[place] for place in places], half, norms)
            made |= zip([keys[place] for place in places], part, strict=True)
        return [
            made.get(id(sample))
            or GradientError(
                f"sample {sample.sample_id}: token id {max(sample.input_ids)}, but the model knows only {known} tokens"
            )
            for sample in batch
        ]

    def _make_fitting(
        self, batch: Sequence[Encoded], half: bool, norms: dict[str, np.ndarray] | None
    ) -> list[tuple[np.ndarray, float] | GradientError]:
        while True:
            sketcher = self.sketcher(len(batch))
            measuring = None if norms is None else Measuring(sketcher, len(batch), len(self.loaded.theta))
            try:
                losses = self.stream(batch, measuring or sketcher)
                break
            except LateGradientError as error:
                # Its tensor has been given up: every time there is one less that can be late.
                logger.warning("%s; the batch is done again", error)
        if norms is not None and measuring is not None:
            norms |= dict(zip([sample.sample_id for sample in batch], measuring.norms, strict=True))
        return judged(sketcher.rapidgrads, losses, [sample.sample_id for sample in batch], half=half)

    def stream(self, batch: Sequence[Encoded], receiver: Receiver) -> Tensor:
        """Hand each sample's gradient of every tensor of theta to a receiver; return the losses, [batch].

        A sample whose loss is not finite has a loss of NaN. The first batch is checked, as `make_batch` says.
        """
        if self._checked < kind_of(batch):
            self._check(batch)
        return self.stream_unchecked(batch, receiver)

    def _check(self, batch: Sequence[Encoded]) -> None:
        """Check a batch; where that does not fit the memory, which it takes more of than the batch, fewer samples."""
        compared = if_it_fits(partial(check, self, batch)) if len(batch) > 2 else check(self, batch)
        if compared is not None:
            if compared and (self._short_checks >= _SHORT_CHECKS or tells_enough(batch)):
                self._checked = kind_of(batch)
            elif compared:
                self._short_checks += 1  # where all samples are so short, an end must be
            return
        fewer = max(2, len(batch) // 2)
        # From both ends: batches are sorted by length, and padding is to be looked at too.
        self._check([*batch[: fewer - fewer // 2], *batch[-(fewer // 2) :]])

    def stream_unchecked(self, batch: Sequence[Encoded], receiver: Receiver) -> Tensor:
        """Do what `stream` does, without a check of the batch: what the check itself looks at."""
        unruled = self._gradients.unruled
        if len(unruled) < len(self.loaded.theta):
            losses = self._gradients.stream(batch, receiver)
        else:
            losses = torch.full((len(batch),), float("nan"), device=self.loaded.device)
        if unruled:
            for place, sample in enumerate(batch):

                def alone(number: int, grad: Tensor, place: int = place) -> None:
                    receiver.dense(number, place, grad.reshape(1, -1))

                try:
                    losses[place] = stream_gradient(
                        self.loaded, sample, alone, only=set(unruled), checkpointing=self._gradients.checkpointing
                    )
                except GradientError:
                    losses[place] = float("nan")
        return losses

    def scales(self, norms: Float64[np.ndarray, "batch tensors"]) -> Float64[np.ndarray, "batch tensors"]:
        """Return what normalises gradients of these L2 norms; one whose gradient is zero has no part."""
        if self.normalize == "none":
            return (norms > 0).astype(float)
        return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)

    def sketcher(self, batch: int) -> Sketcher:
        """Return what sums the gradients of so many samples into their RapidGrads."""
        rapidgrads = torch.zeros(batch, self.spec.width, device=self.loaded.device)
        return Sketcher(self.sketch, rapidgrads, self.normalize == "layer")

    def add_alone(self, rapidgrad: Tensor, sample: Encoded, *, among: Sequence[Encoded] | None = None) -> float:
        """Add the gradients of all tensors by autograd on the sample, alone or in a batch, and return its loss.

        Raises:
            GradientError: the loss or the gradient is not finite.
        """

        def receive(number: int, grad: Tensor) -> None:
            flat = grad.reshape(-1).float()
            self.sketch.add(rapidgrad, number, normalized(flat) if self.normalize == "layer" else flat)

        loss = stream_gradient(self.loaded, sample, receive, among=among, checkpointing=self.checkpointing)
        if not rapidgrad.isfinite().all():
            raise GradientError(f"sample {sample.sample_id}: the gradient is not finite (loss {loss:.4g})")
        return loss


def apart(batch: Sequence[Encoded], rotary_limit: int | None = None) -> list[list[int]]:
    """Return the places of the samples of a batch that may go through the model together.

    Behind a single token, attention has nothing to choose from: without padding, the gradients of queries and keys are
    exactly zero, and with it rounding noise, which normalisation would make as long as others. And where a model turns
    a whole batch by other angles once one sample is longer than a limit, shorter ones must not be among those.
    """
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for place, sample in enumerate(batch):
        length = len(sample.input_ids)
        parts[1 if length <= _STUB_TOKENS else 2 if rotary_limit and length > rotary_limit else 0].append(place)
    return [part for part in parts if part]
