"""What of a batch is compared with autograd in the self-check, and by what; tensors that differ are given up."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient.batch import LateGradientError
from rapidin_vdb.gradient.sample import stream_gradient
from rapidin_vdb.records import Encoded
from rapidin_vdb.sketch import Sketch, fold

if TYPE_CHECKING:
    from rapidin_vdb.gradient.rapidgrad import RapidGradMaker

T = TypeVar("T")

# How far a batched RapidGrad may be from that of the sample alone, relative to its norm: half of half precision for
# models computed in float32; what the order of additions does to a backward pass in 16 bits, at least.
TOLERANCE = {"float32": 2.0**-12, "bfloat16": 0.1, "float16": 0.02}

_ENOUGH_TOKENS = 8
_TOKENS = 64
_PROJECTIONS = 64


def kind_of(batch: Sequence[Encoded]) -> int:
    """Return 1 for a sample alone, 2 for several, which may disturb one another, 3 where padding may too."""
    lengths = {len(sample.input_ids) for sample in batch}
    return 3 if len(lengths) > 1 else min(len(batch), 2)


def tells_enough(batch: Sequence[Encoded]) -> bool:
    """Say whether a batch has a sample in which attention has much to choose from, see `to_compare`."""
    return max(len(sample.input_ids) for sample in batch) >= _ENOUGH_TOKENS


def to_compare(batch: Sequence[Encoded]) -> int:
    """Return the place of the shortest sample that is long enough, else of the longest.

    Behind a single token, attention has nothing to choose from: the gradients of queries and keys are zero but for
    rounding, and differ wherever that does.
    """
    lengths = [len(sample.input_ids) for sample in batch]
    enough = [place for place, length in enumerate(lengths) if length >= _ENOUGH_TOKENS]
    if enough:
        return min(enough, key=lengths.__getitem__)
    return max(range(len(batch)), key=lengths.__getitem__)


def first_to_compare(batch: Sequence[Encoded], work: Callable[[int], T]) -> T:
    """Return what comes of the place to compare; where that has no finite gradient, of the next to compare without it.

    Raises:
        GradientError: the work raised it for all.
    """
    left = list(range(len(batch)))
    while True:
        place = left.pop(to_compare([batch[number] for number in left]))
        try:
            return work(place)
        except GradientError:
            if not left:
                raise


def ends(batch: Sequence[Encoded]) -> list[Encoded]:
    """Return the last tokens of samples, so few that they fit any memory; of longer ones more."""
    longest = max(len(sample.input_ids) for sample in batch)
    if longest <= _TOKENS:
        return list(batch)
    found = []
    for sample in batch:
        keep = max(len(sample.input_ids) * _TOKENS // longest, min(len(sample.input_ids), _ENOUGH_TOKENS))
        cut = len(sample.input_ids) - keep
        # The last of all ids has a loss; the first that is left is predicted from nothing.
        places = [place - cut for place in map(sample.place, range(len(sample.offsets))) if place > cut]
        ids, offsets = sample.input_ids[cut:], sample.offsets[-len(places) :]
        between = None if sample.places is None else tuple(places)
        found.append(replace(sample, input_ids=ids, offsets=offsets, places=between, focus=None))
    return found


def near(one: Tensor, other: Tensor, allowed: float) -> bool:
    """Say whether two gradients, as `Prober.probe` tells them, are no further apart; what is not finite is from all."""
    norms, projections = (one - other).abs().split([1, len(one) - 1])
    return float(norms) <= allowed and float(projections.norm()) <= allowed


class Prober:
    """Keeps the norm and some random projections of each tensor's gradient, of one sample.

    A single projection of a wrong gradient of the right norm would be right now and then; so many are as far from those
    of the right one as the gradients are from each other.
    """

    def __init__(self, sketch: Sketch, place: int) -> None:
        self._sketch = sketch
        self._place = place
        self.count = min(_PROJECTIONS, sketch.spec.width)
        """How many projections there are."""
        self.found: dict[int, Tensor] = {}

    def probe(self, number: int, grads: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the norm and the projections of a gradient, or of some rows of one, float32 [1 + projections]."""
        sketched = torch.zeros(self._sketch.spec.width, device=grads.device)
        if rows is None:
            self._sketch.add(sketched, number, grads.reshape(-1))
        else:
            self._sketch.add_rows(sketched, number, rows, grads, normalize=False)
        norm = torch.linalg.vector_norm(grads).reshape(1)
        return torch.cat([norm, fold(sketched, self.count)]).cpu()

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Keep those of the sample, if it is among these."""
        if first <= self._place < first + len(grads):
            self.found[number] = self.probe(number, grads[self._place - first].unsqueeze(0).float())

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Keep those of the sample, if it is this."""
        if sample == self._place:
            self.found[number] = self.probe(number, grads, ids)


def give_up_wrong_tensors(
    maker: "RapidGradMaker",
    batch: Sequence[Encoded],
    place: int,
    *,
    among: Sequence[Encoded] | None,
    rounding: float = 0.0,
) -> None:
    """Find the tensors whose batched gradient is not that of autograd, by norm and by random projections.

    What differs by less than `rounding`, relative to the norm of all tensors, is let pass, unless nothing came at all.

    Raises:
        GradientError: the sample's gradient is not finite.
    """
    gradients = maker.gradients
    alone: dict[int, Tensor] = {}
    projection = Prober(maker.sketch, place)

    def receive(number: int, grad: Tensor) -> None:
        alone[number] = projection.probe(number, grad.reshape(1, -1).float())

    with gradients.plainly():
        stream_gradient(maker.loaded, batch[place], receive, among=among, checkpointing=maker.checkpointing)
        if not all(one.isfinite().all() for one in alone.values()):
            raise GradientError(f"sample {batch[place].sample_id}: the gradient is not finite")
        while True:
            try:
                gradients.stream(batch, projection)
                break
            except LateGradientError:
                projection.found.clear()  # there is one tensor less each time
    tolerance = TOLERANCE.get(maker.loaded.dtype, 0.1)
    passed = rounding * math.hypot(*(float(one[0]) for one in alone.values()))
    nothing = torch.zeros(1 + projection.count)
    for number in range(len(maker.loaded.theta)):
        one, other = alone.get(number, nothing), projection.found.get(number, nothing)
        allowed = tolerance * float(one[0].clamp(min=1e-30)) + (passed if number in projection.found else 0.0)
        if number not in gradients.unruled and not near(one, other, allowed):
            gradients.give_up(number, "its batched gradient differs from autograd's")
