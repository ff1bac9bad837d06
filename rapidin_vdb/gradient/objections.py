"""Which RapidGrads cannot be stored, and what is said of them: what is wrong, and what to do about it."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rapidin_vdb.errors import GradientError

_CHECKPOINT = "look at the weights, or make the database with --dtype float32"
# Below this, half precision has fewer digits than above, and may be too coarse for most entries; above, it is for none.
_SMALL, _MOST_LOST = 2.0**-12, 0.1


def judged(
    rapidgrads: Float[Tensor, "batch sketch"],
    losses: Float[Tensor, " batch"],
    sample_ids: Sequence[str],
    *,
    half: bool,
) -> list[tuple[np.ndarray, float] | GradientError]:
    """Return RapidGrads, in half precision where asked for, with their losses; an error for each that cannot be stored.

    They are looked at, and rounded, where they are: a GPU does it in no time, and has half as much to send.
    """
    vectors = rapidgrads.half() if half else rapidgrads
    # The largest entry tells it all: what is not finite spreads to it, and rounding keeps it the largest.
    largest = torch.linalg.vector_norm(rapidgrads, ord=float("inf"), dim=1)
    facts = torch.stack([losses.float(), largest, largest.to(vectors.dtype).float()], 1).tolist()
    for place, (_, entry, _) in enumerate(facts):
        lost = 0.0
        if half and 0 < entry < _SMALL:
            exact = rapidgrads[place].double()
            lost = float(torch.linalg.vector_norm(vectors[place].double() - exact) / torch.linalg.vector_norm(exact))
        facts[place].append(lost)
    return [
        GradientError(f"sample {sample_id}: {objection}") if (objection := _objection(*fact)) else (vector, fact[0])
        for vector, fact, sample_id in zip(vectors.cpu().numpy(), facts, sample_ids, strict=True)
    ]


def _objection(loss: float, largest: float, rounded: float, lost: float) -> str | None:
    """Say what is wrong with a RapidGrad; None for nothing.

    Told by its largest entry before and after it was rounded, and by what share of its length rounding took.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}; {_CHECKPOINT}"
    if not math.isfinite(largest):
        return f"the gradient is not finite (loss {loss:.4g}); {_CHECKPOINT}"
    if largest == 0:
        return (
            f"the gradient is zero (loss {loss:.4g}); where those of many samples are, make the database with other "
            "--parameters, or with --dtype float32"
        )
    if not math.isfinite(rounded):
        return (
            f"the RapidGrad reaches {largest:.3g}, beyond half precision (65504); "
            "make the database with --normalize layer"
        )
    if rounded == 0:
        return (
            f"the RapidGrad reaches only {largest:.3g} and vanishes in half precision; "
            "make the database with --normalize layer"
        )
    if lost > _MOST_LOST:
        return (
            f"the RapidGrad reaches only {largest:.3g}, and half precision takes {lost:.0%} of it; "
            "make the database with --normalize layer"
        )
    return None
