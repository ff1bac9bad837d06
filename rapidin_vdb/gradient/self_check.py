"""Whether batched gradients of a model can be believed: one sample of a batch is compared with autograd.

Where a model is computed in float32, with the sample alone. In 16 bits that tells little: any other order of additions
changes all roundings behind it, and in a deep model two computations of one gradient may differ by a tenth or more. So
there each tensor's rule, and the output layer, are held against autograd in one and the same batch, where all roundings
are the same; that samples do not disturb one another shows in derivatives that are zero; and beside the sample alone,
only what rounding does not explain counts: how far autograd is from itself among copies of the sample, one of them
padded as the batch is, or our way from itself without TF32 and output layer.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient.batch import LateGradientError
from rapidin_vdb.gradient.checkpoint import checkpointed_layers
from rapidin_vdb.gradient.forward import OutputError, batch_losses
from rapidin_vdb.gradient.head import OutputLayer
from rapidin_vdb.gradient.probe import TOLERANCE, ends, first_to_compare, give_up_wrong_tensors, to_compare
from rapidin_vdb.records import Encoded

if TYPE_CHECKING:
    from rapidin_vdb.gradient.rapidgrad import RapidGradMaker

logger = logging.getLogger(__name__)

# What rounding may do to the gradient of a tensor, relative to the norm of them all: some cancel to nothing else, as a
# bias of all keys alike.
_WHOLE_ROUNDING = 2.0**-22
# How many times the distance that rounding alone makes, and how far at the most.
_ROUNDINGS = 3
_MOST = 0.5
_DEPENDENT = "in a batch, its samples are not independent of one another"


def check(maker: "RapidGradMaker", batch: Sequence[Encoded]) -> bool:
    """Compare a much padded sample of a batch with autograd, give up what differs, and say whether it could be done."""
    gradients, loaded = maker.gradients, maker.loaded
    if len(gradients.unruled) == len(loaded.theta):
        return True
    gradients.look(batch[0])
    try:
        if loaded.dtype != "float32" and not _check_within(maker, ends(batch)):
            return True
        if gradients.checkpointing:
            # Comparing takes more than a batch does, and there was no memory for that.
            batch = ends(batch)
        place, alone, loss = _alone(maker, batch)
        if loaded.dtype == "float32":
            _check_exactly(maker, batch, place, alone, loss)
        else:
            _check_beyond_rounding(maker, batch, place, alone, loss)
    except GradientError:
        return False  # not a sample to compare with; the next batch will do
    # Not before: where memory ended within, smaller batches are to be compared.
    return True


def _alone(maker: "RapidGradMaker", batch: Sequence[Encoded]) -> tuple[int, Tensor, float]:
    """Return the place of the sample to compare, and its RapidGrad and loss by autograd, alone.

    Raises:
        GradientError: no sample has a gradient that is finite.
    """

    def made(place: int) -> tuple[int, Tensor, float]:
        alone = torch.zeros(maker.spec.width, device=maker.loaded.device)
        return place, alone, maker.add_alone(alone, batch[place])

    return first_to_compare(batch, made)


def _check_exactly(maker: "RapidGradMaker", batch: Sequence[Encoded], place: int, alone: Tensor, loss: float) -> None:
    """Give up what makes a batch differ from the sample alone in float32."""
    tolerance = TOLERANCE["float32"]
    if _agrees_somehow(maker, batch, place, alone, loss, tolerance):
        # A tensor with a small part in this sample's gradient may have a large one in another's; and normalised, one
        # that is wrong by a factor is as it should be, but its norm, which token scores are divided by, is not.
        give_up_wrong_tensors(maker, batch, place, among=None, rounding=_WHOLE_ROUNDING)
        return
    with maker.gradients.without_output_layer():
        give_up_wrong_tensors(maker, batch, place, among=None)
    if not _agrees_somehow(maker, batch, place, alone, loss, tolerance):
        maker.gradients.give_up_all(_DEPENDENT)


def _check_within(maker: "RapidGradMaker", batch: Sequence[Encoded]) -> bool:
    """Give up what differs from autograd in the batch itself; return whether anything is left to be compared.

    Raises:
        GradientError: there is no sample to compare with.
    """
    gradients = maker.gradients
    place = to_compare(batch)
    # What is not finite of one sample would make others' derivatives so, by which nothing could be told.
    finite = [n for n, loss in enumerate(_losses_of(maker, batch)) if math.isfinite(loss)]
    if place not in finite:
        if math.isfinite(_losses_of(maker, [batch[place]])[0]):
            gradients.give_up_all(_DEPENDENT)
            return False
        if not finite:
            raise GradientError("no sample of the batch has a finite loss")
        place = finite[to_compare([batch[n] for n in finite])]
    batch, place = [batch[n] for n in finite], finite.index(place)
    if not _independent(maker, batch, place):
        gradients.give_up_all(_DEPENDENT)
        return False
    try:
        first_to_compare(batch, lambda place: give_up_wrong_tensors(maker, batch, place, among=batch))
    except GradientError:
        # In one batch with what is not finite, autograd's gradients of others are not either.
        batch = [sample for sample in batch if _has_gradient(maker, sample)]
        if not batch:
            raise
        first_to_compare(batch, lambda place: give_up_wrong_tensors(maker, batch, place, among=batch))
    if gradients.output is not None and not _output_layer_agrees(maker, batch, gradients.output):
        gradients.leave_output_layer("its gradients differ from autograd's")
    return len(gradients.unruled) < len(maker.loaded.theta)


def _check_beyond_rounding(
    maker: "RapidGradMaker", batch: Sequence[Encoded], place: int, alone: Tensor, loss: float
) -> None:
    """Give all up where a batch differs from the sample alone by more than rounding can do."""
    gradients, loaded = maker.gradients, maker.loaded
    tolerance = TOLERANCE.get(loaded.dtype, 0.1)
    if agrees(maker, batch, place, alone, loss, tolerance):
        return
    rounding = _rounding(maker, batch, place, alone)
    logger.info(
        "%s: computed in %s, a RapidGrad is off by some %.0f %% by rounding alone; --dtype float32 takes it away",
        loaded.spec.model, loaded.dtype, 100 * rounding,
    )  # fmt: skip
    if not _agrees_somehow(maker, batch, place, alone, loss, max(tolerance, min(_ROUNDINGS * rounding, _MOST))):
        gradients.give_up_all("in a batch, its gradients differ from those of a sample alone by more than rounding")


def _has_gradient(maker: "RapidGradMaker", sample: Encoded) -> bool:
    """Say whether a sample, alone, has a finite gradient."""
    try:
        maker.add_alone(torch.zeros(maker.spec.width, device=maker.loaded.device), sample)
    except GradientError:
        return False
    return True


@torch.no_grad()
def _losses_of(maker: "RapidGradMaker", batch: Sequence[Encoded]) -> list[float]:
    found: list[float] = batch_losses(maker.loaded, batch).means().tolist()
    return found


def _output_layer_agrees(maker: "RapidGradMaker", batch: Sequence[Encoded], output: OutputLayer) -> bool:
    """Say whether losses, and their derivatives by what the output layer reads, are those that the model itself has."""
    try:
        ours, theirs = (_at_output(maker, batch, used) for used in (output, None))
    except OutputError:
        return True  # it will be left with the first batch
    if ours is None or theirs is None:
        return True  # nothing is asked of it
    (losses, grad), (expected, wanted) = ours, theirs
    tolerance = TOLERANCE.get(maker.loaded.dtype, 0.1)
    return bool(
        (grad - wanted).norm() <= tolerance * wanted.norm()
        and ((losses - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)).all()
    )


def _at_output(
    maker: "RapidGradMaker", batch: Sequence[Encoded], output: OutputLayer | None
) -> tuple[Tensor, Tensor] | None:
    """Return a batch's losses, and their derivative by what the output layer reads; None where there is none."""
    read: list[Tensor] = []
    layer = maker.loaded.inner.get_output_embeddings()
    handle = layer.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    try:
        # The derivative is wanted of what it reads, whatever else asks for one.
        with maker.gradients.plainly(), _recorded(maker):
            found = batch_losses(maker.loaded, batch, output=output)
            losses, scales = found.means(), found.scales(maker.loaded.dtype)
            if not read or not losses.requires_grad:
                return None
            (grad,) = torch.autograd.grad((losses if scales is None else losses * scales).sum(), read)
    finally:
        handle.remove()
    return losses.detach(), grad.float() if scales is None else grad.float() / scales.view(-1, 1, 1)


@contextmanager
def _recorded(maker: "RapidGradMaker") -> Iterator[None]:
    """Let autograd record, with gradient checkpointing where the model needs it."""
    checkpointing = maker.gradients.checkpointing
    with checkpointed_layers(maker.loaded.model, hooks=False) if checkpointing else nullcontext(), torch.enable_grad():
        yield


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
        with _recorded(maker):
            found = batch_losses(maker.loaded, batch)
            losses, scales = found.means(), found.scales(maker.loaded.dtype)
            loss = (losses if scales is None else losses * scales)[place]
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
    """Return how far a sample's RapidGrad is off by rounding alone, relative to its norm.

    Measured are autograd alone and in a batch of copies, one of them padded as the batch is, which by arithmetic are
    the same; and the batched way as it is and computing all as the model does.
    """
    sample, longest = batch[place], max(len(one.input_ids) for one in batch)
    copies = [replace(sample) for _ in batch]
    ids = sample.input_ids + sample.input_ids[-1:] * (longest - len(sample.input_ids))
    padded = replace(sample, input_ids=ids)  # its own loss is not looked at
    among = torch.zeros_like(alone)
    if len(batch) > 1:
        maker.add_alone(among, copies[0], among=[*copies[:-1], padded])
    else:
        among += alone
    found = []
    for plainly in (False, True):
        sketcher = maker.sketcher(len(batch))
        with maker.gradients.plainly() if plainly else nullcontext():
            maker.stream_unchecked(batch, sketcher)
        found.append(sketcher.rapidgrads[place])
    norm = torch.linalg.vector_norm
    return float(torch.maximum(norm(among - alone), norm(found[0] - found[1])) / norm(alone))


def _agrees_somehow(
    maker: "RapidGradMaker", batch: Sequence[Encoded], place: int, alone: Tensor, loss: float, tolerance: float
) -> bool:
    """Say whether a batch agrees as it is, or with all logits from the model, which are taken from then on."""
    gradients, given_up = maker.gradients, -1
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
        losses = maker.stream_unchecked(batch, sketcher)
    except LateGradientError:
        return False
    together = sketcher.rapidgrads[place]
    # It is the output layer's, if anything. In 16 bits a loss is off by what the logits are rounded by.
    if maker.gradients.output is not None and maker.loaded.dtype == "float32":
        if not abs(float(losses[place]) - loss) <= tolerance * max(loss, 1.0):
            return False
    return float(torch.linalg.vector_norm(together - alone)) <= tolerance * float(torch.linalg.vector_norm(alone))
