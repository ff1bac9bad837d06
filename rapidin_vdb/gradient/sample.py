"""The gradient of one sample's loss, handed on tensor by tensor as backward reaches it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient.checkpoint import checkpointed_layers
from rapidin_vdb.gradient.cross_entropy import plain_cross_entropy
from rapidin_vdb.gradient.forward import batch_losses
from rapidin_vdb.gradient.loss_scale import loss_scale
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.records import Encoded


def token_losses(loaded: LoadedModel, encoded: Encoded) -> Tensor:
    """Return the cross-entropy at each token that carries loss, in nats: logits at i - 1 predict token i."""
    ids = torch.tensor([encoded.input_ids], device=loaded.device)
    logits = loaded.model(input_ids=ids, use_cache=False).logits
    places = torch.tensor(encoded.loss_places, device=loaded.device)
    return plain_cross_entropy(logits[0, places - 1], ids[0, places])


def cut_behind_loss(encoded: Encoded) -> Encoded:
    """Return a sample without what stands behind its last token that carries loss, which no causal model sees.

    >>> sample = Encoded(sample_id="a", input_ids=(1, 2, 3), offsets=((0, 1), (1, 2)), truncated=False, focus=(0,))
    >>> cut_behind_loss(sample).input_ids
    (1, 2)
    """
    kept = max(encoded.loss_tokens) + 1
    if kept == len(encoded.offsets):
        return encoded  # there is nothing behind the last token of a response
    return replace(
        encoded,
        input_ids=encoded.input_ids[: encoded.place(kept - 1) + 1],
        offsets=encoded.offsets[:kept],
        places=None if encoded.places is None else encoded.places[:kept],
    )


def stream_gradient(
    loaded: LoadedModel,
    encoded: Encoded,
    receive: Callable[[int, Tensor], None],
    *,
    only: set[int] | None = None,
    checkpointing: bool = False,
    among: Sequence[Encoded] | None = None,
) -> float:
    """Call `receive(number, gradient)` for each tensor of theta that the loss depends on, and return the loss.

    `only` restricts it to the tensors of those numbers. With `checkpointing`, layers are computed twice, so that their
    activations need not be kept. `among` is a batch that the sample goes through the model with, one of which it is.

    A gradient comes as soon as backward has it, whole (a tied tensor comes once) and of the parameter's shape, and is
    freed when `receive` returns: the gradients of all tensors are never held at once.

    Raises:
        GradientError: the loss is not finite.
    """

    def hook(number: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                receive(number, grad if scale is None else grad.float() / scale)

        return take

    chosen = [(n, tensor) for n, tensor in enumerate(loaded.theta.values()) if only is None or n in only]
    left_out = [tensor for n, tensor in enumerate(loaded.theta.values()) if only is not None and n not in only]
    scale: Tensor | None = None
    handles = [tensor.register_post_accumulate_grad_hook(hook(number)) for number, tensor in chosen]
    for tensor in left_out:
        tensor.requires_grad_(False)
    try:
        _clear(chosen)
        with checkpointed_layers(loaded.model, hooks=False) if checkpointing else nullcontext(), torch.enable_grad():
            losses = token_losses(loaded, encoded) if among is None else _losses_among(loaded, encoded, among)
            loss = losses.mean()
            scale = loss_scale(losses, divisor=len(losses)) if loaded.dtype == "float16" else None
            value = float(loss.detach())
            if not torch.isfinite(loss):
                raise GradientError(f"sample {encoded.sample_id}: the loss is {value}")
            if loss.requires_grad:  # else none of the tensors has a part in it
                (loss if scale is None else loss * scale).backward()
    finally:
        for handle in handles:
            handle.remove()
        _clear(chosen)
        for tensor in left_out:
            tensor.requires_grad_(True)
    return value


def _clear(chosen: Sequence[tuple[int, Tensor]]) -> None:
    """Forget gradients that an interruption left between torch and a hook: the next ones would be added to them."""
    for _, tensor in chosen:
        tensor.grad = None


def _losses_among(loaded: LoadedModel, encoded: Encoded, batch: Sequence[Encoded]) -> Tensor:
    """Return the losses at the tokens of a sample that goes through the model in a batch."""
    found = batch_losses(loaded, batch)
    return found.losses[found.rows == next(n for n, one in enumerate(batch) if one is encoded)]
