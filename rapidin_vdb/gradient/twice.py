"""Double differentiation: token scores where an operation of the model has no forward mode.

With a weight w_i for each token's loss, d/dw_i < grad_theta sum_j w_j L_j, u > = < dL_i/dtheta, u >.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapidin_vdb.gradient.loss_scale import loss_scale
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.sample import token_losses
from rapidin_vdb.records import Encoded


def token_scores_twice(
    loaded: LoadedModel, encoded: Encoded, direction: dict[int, Tensor], scales: Float[Tensor, " tensors"]
) -> Float[Tensor, " tokens"]:
    """Return the scores of a sample's tokens that carry loss, as `TangentPass.token_scores` does."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        losses = token_losses(loaded, encoded)
        weights = torch.ones_like(losses, requires_grad=True)
        theta = list(loaded.theta.values())
        scale = 1.0 if loaded.dtype != "float16" else float(loss_scale(losses, divisor=1))
        grads = torch.autograd.grad((weights * losses).sum() * scale, theta, create_graph=True, allow_unused=True)
        moved = [
            scales[number] / scale * (grad.float() * direction[number]).sum()
            for number, grad in enumerate(grads)
            if grad is not None and number in direction
        ]
        if not moved:
            return torch.zeros_like(losses)
        (scores,) = torch.autograd.grad(torch.stack(moved).sum(), weights)
    return scores.detach()
