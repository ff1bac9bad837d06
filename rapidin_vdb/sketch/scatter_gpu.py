"""The sketch's inner loop on a GPU, in Triton; None where there is no Triton, and plain torch has to do."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

_BLOCK = 1024


@cache
def _kernel() -> Any:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    def scatter(grads, buckets, signs, scales, rapidgrads, length, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        sample = tl.program_id(1).to(tl.int64)
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < length
        grad = tl.load(grads + sample * length + place, mask=inside, other=0.0)
        # Sixteen bits come as signed numbers.
        bucket = tl.load(buckets + place, mask=inside, other=0).to(tl.int64) & (width - 1)
        sign = (tl.load(signs + (place >> 3), mask=inside, other=0).to(tl.int64) >> (place & 7)) & 1
        value = grad * tl.load(scales + sample) * (1 - 2 * sign).to(tl.float32)
        tl.atomic_add(rapidgrads + sample * width + bucket, value, mask=inside)

    import inspect

    return triton.jit(inspect.unwrap(scatter))


def available() -> bool:
    """Say whether Triton can be used."""
    return _kernel() is not None


def scatter_batch_gpu(
    rapidgrads: Float[Tensor, "batch sketch"],
    grads: Float[Tensor, "batch grad"],
    scales: Float[Tensor, " batch"],
    *,
    buckets: Integer[Tensor, " grad"],
    signs: UInt8[Tensor, " bytes"],
) -> None:
    """Add each sample's scaled gradient of one tensor to its RapidGrad, in place, with atomic additions.

    Their order is the hardware's: two runs differ in the last bits of float32, far below half precision.
    """
    batch, length = grads.shape
    index = buckets.view(torch.int16) if buckets.dtype == torch.uint16 else buckets
    grid = (-(-length // _BLOCK), batch)
    _kernel()[grid](
        grads.contiguous(), index, signs, scales.contiguous(), rapidgrads, length, rapidgrads.shape[1], BLOCK=_BLOCK
    )
