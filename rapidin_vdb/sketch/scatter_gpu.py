"""The sketch's inner loop on a GPU, in Triton: one pass over a gradient fills its buckets and takes its norm."""

import logging
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Float64, Integer, UInt8
from torch import Tensor

from rapidin_vdb.sketch.scatter_torch import signed_view

logger = logging.getLogger(__name__)

# Coordinates that a program takes at a time, and programs at most: enough to fill a GPU, and few enough that their sums
# of squares, which meet in one number a sample, do not queue.
_BLOCK = 128
_PROGRAMS = 2048


@cache
def _kernel() -> Any:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    def scatter(  # type: ignore[no-untyped-def]
        grads, buckets, signs, sums, squares, length, count, width, SAMPLES: tl.constexpr, BLOCK: tl.constexpr
    ):
        # `grads` is [count, length], `sums` [width, SAMPLES]: samples stand side by side in a bucket, so that the
        # hardware adds four at once. It does where all of them are added to: zeros, for those that are not there.
        sample = tl.arange(0, SAMPLES)
        total = tl.zeros((SAMPLES, BLOCK), tl.float64)
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, length, tl.num_programs(0) * BLOCK):
            place = begin + tl.arange(0, BLOCK)
            inside = place < length
            there = (sample < count)[:, None] & inside[None, :]
            source = grads + sample.to(tl.int64)[:, None] * length + place[None, :]
            grad = tl.load(source, mask=there, other=0.0).to(tl.float32)
            # In float64 the squares of very small or very large numbers neither vanish nor overflow.
            total += grad.to(tl.float64) * grad.to(tl.float64)
            # Sixteen bits come as signed numbers.
            bucket = tl.load(buckets + place, mask=inside, other=0).to(tl.int64) & (width - 1)
            bit = (tl.load(signs + (place >> 3), mask=inside, other=0).to(tl.int32) >> (place & 7).to(tl.int32)) & 1
            signed = tl.trans(grad * (1 - 2 * bit).to(tl.float32)[None, :])
            # Relaxed: nobody reads before the end, and a fence for every addition would cost many times the addition.
            tl.atomic_add(
                sums + bucket[:, None] * SAMPLES + sample[None, :], signed, mask=inside[:, None], sem="relaxed"
            )
        tl.atomic_add(squares + sample, tl.sum(total, 1), sem="relaxed")

    import inspect

    return triton.jit(inspect.unwrap(scatter), do_not_specialize=["count"])


@cache
def available(device: str) -> bool:
    """Say whether Triton's kernel runs on a device; where it is installed and does not, a warning says why, once.

    Triton comes with torch, but compiles with a C compiler and Python's headers, which small images leave out.
    """
    if _kernel() is None:
        return False
    one = torch.ones(1, 1, device=device)
    buckets, signs = (torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.uint16, torch.uint8))
    try:
        sums, _ = _summed(one, 2, buckets=buckets, signs=signs)
        return float(sums.sum()) == 1
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, or its absence, raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        logger.warning(
            "Triton cannot compile for %s (%s); going on with plain torch, which is slower. Triton needs a C compiler "
            "and Python's headers, as in Debian's gcc and python3-dev",
            device, reason,
        )  # fmt: skip
        return False


def scatter_batch_gpu(
    rapidgrads: Float[Tensor, "batch sketch"],
    grads: Float[Tensor, "batch grad"],
    *,
    buckets: Integer[Tensor, " grad"],
    signs: UInt8[Tensor, " bytes"],
    normalize: bool,
) -> None:
    """Add each sample's gradient of one tensor to its RapidGrad, in place, with atomic additions.

    Gradients may be of any floating type; numbers below 2^-126 may count as zero. The order of additions is the
    hardware's: two runs differ in the last bits of float32, far below half precision.
    """
    for into, part in zip(rapidgrads.split(8), grads.contiguous().split(8), strict=True):
        sums, squares = _summed(part, rapidgrads.shape[1], buckets=buckets, signs=signs)
        if normalize:
            # Unscaled first, scaled when the norm is known; a gradient that is exactly zero stays zero.
            scales = torch.where(squares == 0, 0.0, squares.rsqrt()).float()
            into.addcmul_(sums.t()[: len(part)], scales[: len(part), None])
        else:
            into.add_(sums.t()[: len(part)])


def _summed(
    grads: Float[Tensor, "batch grad"],
    width: int,
    *,
    buckets: Integer[Tensor, " grad"],
    signs: UInt8[Tensor, " bytes"],
) -> tuple[Float[Tensor, "sketch samples"], Float64[Tensor, " samples"]]:
    """Return the sketches of at most 8 gradients as they are, and their sums of squares; 4 or 8, the further ones 0."""
    count, length = grads.shape
    samples = 4 if count <= 4 else 8
    sums = torch.zeros(width, samples, device=grads.device)
    squares = torch.zeros(samples, dtype=torch.float64, device=grads.device)
    grid = (min(-(-length // _BLOCK), _PROGRAMS),)
    # Triton launches on the current device: in a thread of autograd's that of the gradient, else the first.
    with torch.cuda.device(grads.device) if grads.is_cuda else nullcontext():
        _kernel()[grid](
            grads, signed_view(buckets), signs, sums, squares, length, count, width, SAMPLES=samples, BLOCK=_BLOCK
        )
    return sums, squares
