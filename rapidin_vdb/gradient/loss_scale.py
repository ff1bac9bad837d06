"""Loss scaling of models in float16, whose gradients would else vanish where a sample has been learned well.

A token that the model is all but sure of has a loss whose derivative by the logits is (p - y) / G: below 6e-8, half
precision has nothing, and normalisation would blow up what little of a layer's gradient is left. Each sample's loss is
therefore multiplied by a power of two, which is divided out of its gradients in float32. As in mixed-precision training
(Micikevicius et al., 2018, section 3.2), but sample by sample, for samples of one batch may be learned or not.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from rapidin_vdb.gradient.receivers import Receiver

# What the largest derivative of a sample's loss by a logit is brought up to. A sample of one token that comes as a
# surprise has one of 1 already, so that nothing here is larger than what a model has to bear anyhow.
_LARGEST = 2.0**-4
_MOST_DOUBLINGS = 30


def loss_scales(
    losses: Float[Tensor, " tokens"], rows: Int64[Tensor, " tokens"], counts: Int64[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return what each sample's mean loss is to be multiplied by, powers of two, 1 or more.

    `losses` are those at each token in nats, `rows` the sample that each belongs to, `counts` how many a sample has.
    """
    # The derivative by the logit of the token that was wanted, which is the largest: 1 - p = 1 - exp(-loss).
    peaks = -torch.expm1(-losses.detach().float()) / counts[rows]
    largest = torch.zeros(len(counts), device=losses.device).scatter_reduce(0, rows, peaks, "amax")
    doublings = torch.log2(_LARGEST / largest.clamp(min=1e-30)).floor()
    # Where a loss is not finite, nothing helps: that is found out later.
    return torch.exp2(doublings.nan_to_num(nan=0.0).clamp(0, _MOST_DOUBLINGS))


def loss_scale(losses: Float[Tensor, " tokens"], *, divisor: int) -> Float[Tensor, ""]:
    """Return what the sum of one sample's token losses, divided by that, is to be multiplied by: a power of two."""
    count = torch.tensor([divisor], device=losses.device)
    return loss_scales(losses, torch.zeros_like(losses, dtype=torch.int64), count)[0]


class Unscaled:
    """Hands gradients on as they are without loss scaling, in float32."""

    def __init__(self, receiver: "Receiver", scales: Float[Tensor, " batch"]) -> None:
        self._receiver = receiver
        self._factors = 1 / scales

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Take dense gradients."""
        factors = self._factors[first : first + len(grads)]
        self._receiver.dense(number, first, grads.float() * factors.unsqueeze(1))

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Take rows of an embedding, whose others are zero."""
        self._receiver.rows(number, sample, ids, grads.float() * self._factors[sample])
