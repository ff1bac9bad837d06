"""Whether batched gradients of a model can be believed: one sample of a batch is compared with autograd.

Where a model is computed in float32, with the sample alone. In 16 bits that tells little: any other order of additions
changes all roundings behind it, and in a deep model two computations of one gradient may differ by a tenth. So there
each tensor's rule is held against autograd in the very batch, where all roundings are the same; that samples do not
disturb one another shows in derivatives that are zero; and what is left to see beside the sample alone is measured by
what rounding alone does to it.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient.batch import LateGradientError
from rapidin_vdb.gradient.forward import batch_losses
from rapidin_vdb.gradient.sample import stream_gradient
from rapidin_vdb.records import Encoded
from rapidin_vdb.sketch import Sketch

if TYPE_CHECKING:
    from rapidin_vdb.gradient.rapidgrad import RapidGradMaker

logger = logging.getLogger(__name__)

# How far a batched RapidGrad may be from that of the sample alone, relative to its norm: half of half precision for
# models computed in float32; what the order of additions does to a backward pass in 16 bits, at least.
_TOLERANCE = {"float32": 2.0**-12, "bfloat16": 0.1, "float16": 0.02}
# How many times the distance that rounding alone makes.
_ROUNDINGS = 3
_DEPENDENT = "in a batch, its samples are not independent of one another"
_ENOUGH_TOKENS = 8
_TOKENS = 64


def kind_of(batch: Sequence[Encoded]) -> int:
    """Return 1 for a sample alone, 2 for several, which may disturb one another, 3 where padding may too."""
    lengths = {len(sample.input_ids) for sample in batch}
    return 3 if len(lengths) > 1 else min(len(batch), 2)


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


def ends(batch: Sequence[Encoded]) -> list[Encoded]:
    """Return the last tokens of samples, so few that they fit any memory; of longer ones more."""
    longest = max(len(sample.input_ids) for sample in batch)
    if longest <= _TOKENS:
        return list(batch)
    found = []
    for sample in batch:
        keep = max(len(sample.input_ids) * _TOKENS // longest, min(len(sample.input_ids), _ENOUGH_TOKENS))
        offsets = sample.offsets[-(keep - 1) :]
        found.append(replace(sample, input_ids=sample.input_ids[-keep:], offsets=offsets, focus=None))
    return found


class Prober:
    """Keeps the norm and one random projection of each tensor's gradient, of one sample."""

    def __init__(self, sketch: Sketch, place: int) -> None:
        self._sketch = sketch
        self._place = place
        self.found: dict[int, Tensor] = {}

    def probe(self, number: int, grads: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the norm and the projection of a gradient, or of some rows of one, float32 [2]."""
        sketched = torch.zeros(self._sketch.spec.width, device=grads.device)
        if rows is None:
            self._sketch.add(sketched, number, grads.reshape(-1))
        else:
            self._sketch.add_rows(sketched, number, rows, grads, normalize=False)
        weights = torch.linspace(-1, 1, len(sketched), device=grads.device)
        return torch.stack([torch.linalg.vector_norm(grads), sketched @ weights]).cpu()

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Keep those of the sample, if it is among these."""
        if first <= self._place < first + len(grads):
            self.found[number] = self.probe(number, grads[self._place - first].unsqueeze(0).float())

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Keep those of the sample, if it is this."""
        if sample == self._place:
            self.found[number] = self.probe(number, grads, ids)


def check(maker: "RapidGradMaker", batch: Sequence[Encoded]) -> bool:
    """Compare a much padded sample of a batch with autograd, give up what differs, and say whether it could be done."""
    gradients, loaded = maker._gradients, maker.loaded
    if gradients.checkpointing:
        # Alone, activations are kept, for which there is no memory.
        batch = ends(batch)
    place = to_compare(batch)
    alone = torch.zeros(maker.spec.width, device=loaded.device)
    try:
        loss = maker._add_alone(alone, batch[place])
    except GradientError:
        return False  # not a sample to compare with; the next batch will do
    tolerance = _TOLERANCE.get(loaded.dtype, 0.1)
    exact = loaded.dtype == "float32"
    gradients.look(batch[place])
    if not exact:
        if not _independent(maker, batch, place):
            gradients.give_up_all(_DEPENDENT)
            return True
        _give_up_wrong_tensors(maker, batch, place, among=batch)
    if _agrees_somehow(maker, batch, place, alone, loss, tolerance):
        return True
    if exact:
        with gradients.without_output_layer():
            _give_up_wrong_tensors(maker, batch, place, among=None)
    else:
        rounding = _rounding(maker, batch, place, alone)
        logger.info(
            "%s: computed in %s, a RapidGrad is off by some %.0f %% by rounding alone; --dtype float32 takes it away",
            loaded.spec.model, loaded.dtype, 100 * rounding,
        )  # fmt: skip
        tolerance = max(tolerance, _ROUNDINGS * rounding)
    if not _agrees_somehow(maker, batch, place, alone, loss, tolerance):
        gradients.give_up_all(_DEPENDENT)
    # Not before: where memory ended within, smaller batches are to be compared.
    return True


def _independent(maker: "RapidGradMaker", batch: Sequence[Encoded], place: int) -> bool:
    """Say whether a sample's loss depends on its own tokens alone: not on other samples', nor on padding behind it.

    Its derivative by what the embedding says of any other token is zero, exactly: what a mask hides has no weight.
    """
    wrote: list[Tensor] = []

    def watch(module: torch.nn.Module, read: object, output: Tensor) -> Tensor:
        # A copy, for some models go on to multiply it in place.
        wrote.append(output.detach().requires_grad_(True))
        return wrote[-1].clone()

    handle = maker.loaded.model.get_input_embeddings().register_forward_hook(watch, prepend=True)
    try:
        with torch.enable_grad():
            loss = batch_losses(maker.loaded, batch).means()[place]
            grads = torch.autograd.grad(loss, wrote, allow_unused=True)
    finally:
        handle.remove()
    longest = max(len(sample.input_ids) for sample in batch)
    for grad in grads:
        if grad is None or grad.shape[:2] != (len(batch), longest):
            continue  # embeds something else
        grad[place, : len(batch[place].input_ids)] = 0
        if (grad.abs() > 0).any():
            return False
    return True


def _rounding(maker: "RapidGradMaker", batch: Sequence[Encoded], place: int, alone: Tensor) -> float:
    """Return how far autograd's RapidGrad of a sample is from that in a batch of its copies, relative to its norm.

    By arithmetic they are the same, and no sample is there that could disturb it, nor padding.
    """
    copies = [replace(batch[place]) for _ in batch]
    among = torch.zeros_like(alone)
    maker._add_alone(among, copies[0], among=copies)
    return float(torch.linalg.vector_norm(among - alone) / torch.linalg.vector_norm(alone))


def _agrees_somehow(
    maker: "RapidGradMaker", batch: Sequence[Encoded], place: int, alone: Tensor, loss: float, tolerance: float
) -> bool:
    """Say whether a batch agrees as it is, or with all logits from the model, which are taken from then on."""
    gradients, given_up = maker._gradients, -1
    while given_up < len(gradients.unruled):  # what is given up on the way may have been all that was wrong
        given_up = len(gradients.unruled)
        if agrees(maker, batch, place, alone, loss, tolerance):
            return True
    if gradients.output is None:
        return False
    with gradients.without_output_layer():
        agreed = agrees(maker, batch, place, alone, loss, tolerance)
    if agreed:
        gradients.leave_output_layer("gradients differ from autograd's in a batch")
    return agreed


def agrees(
    maker: "RapidGradMaker", batch: Sequence[Encoded], place: int, alone: Tensor, loss: float, tolerance: float
) -> bool:
    """Say whether one sample's RapidGrad and loss are in a batch what they are alone, within a tolerance."""
    sketcher = maker.sketcher(len(batch))
    try:
        losses = maker._stream(batch, sketcher)
    except LateGradientError:
        return False
    together = sketcher.rapidgrads[place]
    # It is the output layer's, if anything. In 16 bits a loss is off by what the logits are rounded by.
    if maker._gradients.output is not None and maker.loaded.dtype == "float32":
        if not abs(float(losses[place]) - loss) <= tolerance * max(loss, 1.0):
            return False
    return float(torch.linalg.vector_norm(together - alone)) <= tolerance * float(torch.linalg.vector_norm(alone))


def _give_up_wrong_tensors(
    maker: "RapidGradMaker", batch: Sequence[Encoded], place: int, *, among: Sequence[Encoded] | None
) -> None:
    """Find the tensors whose batched gradient is not that of autograd, by norm and by one random projection."""
    gradients = maker._gradients
    alone: dict[int, Tensor] = {}
    projection = Prober(maker.sketch, place)

    def receive(number: int, grad: Tensor) -> None:
        alone[number] = projection.probe(number, grad.reshape(1, -1).float())

    with gradients.plainly():
        stream_gradient(maker.loaded, batch[place], receive, among=among)
        while True:
            try:
                gradients.stream(batch, projection)
                break
            except LateGradientError:
                projection.found.clear()  # there is one tensor less each time
    tolerance = _TOLERANCE.get(maker.loaded.dtype, 0.1)
    for number in range(len(maker.loaded.theta)):
        one = alone.get(number, torch.zeros(2))
        other = projection.found.get(number, torch.zeros(2))
        if number not in gradients.unruled and (one - other).abs().max() > tolerance * one[0].clamp(min=1e-30):
            gradients.give_up(number, "its batched gradient differs from autograd's")
