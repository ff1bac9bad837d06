"""The loss at a model's output layer, a few hundred tokens at a time: logits of a large batch are never all held."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from rapidin_vdb.gradient.cross_entropy import derivative_
from rapidin_vdb.gradient.model import LoadedModel

# Logits of so many bytes (float32) at a time: on a CPU, what its last cache may hold. But of no fewer tokens than it
# takes for the products to be bound by arithmetic, and not by reading the layer's weights once more.
_LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
_FEWEST_TOKENS = {"cpu": 256, "cuda": 1024}


class OutputLayer:
    """A frozen linear layer whose product is the model's logits, as it stands."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer

    @contextmanager
    def set_aside(self) -> Iterator[list[tuple[Tensor, int]]]:
        """Let the model give what the layer reads in the place of logits, and list it, with its version."""
        read: list[tuple[Tensor, int]] = []

        def forward(hidden: Tensor) -> Tensor:
            hidden = hidden.contiguous()  # as logits are: OPT asks for it, and gets what it has
            read.append((hidden, hidden._version))
            return hidden

        self._layer.forward = forward  # type: ignore[method-assign, assignment]
        try:
            yield read
        finally:
            del self._layer.forward  # the class's own comes to light again

    def losses(
        self, hidden: Float[Tensor, "tokens hidden"], wanted: Int64[Tensor, " tokens"], shares: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Return the cross-entropy at each token, float32, in nats.

        `shares`, none of them zero, is what backward is expected to bring for each: its part of what is summed.
        Gradients are formed with the losses, and rounded where those of a cross-entropy are; where something else
        comes, they are scaled to that. There is no forward mode, and no second derivative.
        """
        found: Tensor = _Losses.apply(hidden, self._layer, wanted, shares)
        return found


def find_output_layer(loaded: LoadedModel, ids: Sequence[int]) -> OutputLayer | None:
    """Return the model's output layer, None where its logits have to be had from the model itself.

    That is where the layer is in theta or adapted, and where the model goes on computing with what the layer wrote, as
    Gemma 2 and Cohere do. A pass over a few tokens tells whether it does.
    """
    layer = loaded.inner.get_output_embeddings()
    # A subclass, or a layer that something else has hooked, may compute anything.
    if type(layer) is not torch.nn.Linear or "forward" in vars(layer):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    if not layer.weight.is_floating_point() or any(
        mine is tensor for mine in layer.parameters() for tensor in loaded.theta.values()
    ):
        return None
    wrote: list[tuple[Tensor, int]] = []
    handle = layer.register_forward_hook(lambda module, read, output: wrote.append((output, output._version)))
    try:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device), use_cache=False).logits
    finally:
        handle.remove()
    return OutputLayer(layer) if is_untouched(wrote, logits) else None


def is_untouched(wrote: list[tuple[Tensor, int]], logits: Tensor) -> bool:
    """Say whether a model's logits are the one tensor that its output layer wrote, of the version that it had then."""
    return len(wrote) == 1 and wrote[0][0] is logits and wrote[0][1] == logits._version


class _Losses(torch.autograd.Function):
    """Cross-entropy of a linear layer's product, for a layer that stays as it is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: torch.nn.Linear, wanted: Tensor, shares: Tensor) -> Tensor:
        losses = torch.empty(len(hidden), device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kind = hidden.device.type
        half = hidden.dtype == torch.float16
        expected = shares.clone() if half else shares
        tokens = max(_FEWEST_TOKENS[kind], _LOGIT_BYTES[kind] // (4 * layer.out_features))
        for first in range(0, len(hidden), tokens):
            part = slice(first, first + tokens)
            # As cross_entropy does it: where a token is all but certain, its logit less the others' logarithm would be
            # nothing but rounding.
            logs = torch.log_softmax(F.linear(hidden[part], layer.weight, layer.bias).float(), 1)
            places = wanted[part].unsqueeze(1)
            losses[part] = -logs.gather(1, places).squeeze(1)
            if grads is None:
                continue
            delta = derivative_(logs, wanted[part]).mul_(shares[part].unsqueeze(1))
            if half:
                # Of a token that the model is all but sure of, half precision would have next to nothing.
                raised = torch.exp2(-torch.log2(delta.gather(1, places).abs().clamp(min=1e-30)).floor()).nan_to_num()
                delta.mul_(raised)
                expected[part] *= raised.squeeze(1)
            grads[part] = delta.to(hidden.dtype) @ layer.weight
        ctx.save_for_backward(grads, expected)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        grads, expected = ctx.saved_tensors
        # Exactly one, or a power of two, as a rule: nothing is rounded once more.
        return (grads * (delta / expected).unsqueeze(1)).to(grads.dtype), None, None, None
