"""The sketch's inner loop on the CPU: one pass over a gradient fills its buckets and takes its norm."""

from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from rapidin_vdb.compiled import compiled, side_by_side

# Coordinates below which sharing the work among threads costs more than it saves.
_WORTH_A_THREAD = 1 << 17


@cache
def _kernel() -> Any:
    """Compile the loop; a second the first time in a process, and only where a gradient is sketched."""

    def scatter(target, grad, buckets, signs, rows, length):  # type: ignore[no-untyped-def]
        # `grad` holds runs of `length` coordinates, one after the other, that begin at rows * length of the tensor.
        total = 0.0
        for number in range(len(rows)):
            begin, source = rows[number] * length, number * length
            place = begin
            stop = begin + length
            while place < stop:
                # Eight coordinates to a byte of signs; the first and last byte may be shared with another run.
                word = signs[place >> 3]
                bit = place & 7
                end = min(place + 8 - bit, stop)
                squares = np.float32(0.0)
                for current in range(place, end):
                    value = grad[source + current - begin]
                    squares += value * value
                    # By arithmetic: a branch would be mispredicted half of the time.
                    sign = np.float32(1.0) - np.float32(2.0) * np.float32((word >> (current & 7)) & 1)
                    target[buckets[current]] += sign * value
                # Millions of squares in one float32 would lose the small ones.
                total += squares
                place = end
        return total

    return compiled(scatter)


def scatter_rows(
    rapidgrad: Float[Tensor, " sketch"],
    grad: Float[Tensor, "rows length"],
    *,
    rows: Integer[Tensor, " rows"],
    buckets: Integer[Tensor, " grad"],
    signs: UInt8[Tensor, " bytes"],
    normalize: bool,
) -> None:
    """Add some rows of one sample's gradient of one tensor to its RapidGrad, in place; the other rows are zero."""
    _one(rapidgrad.numpy(), grad.contiguous().numpy(), rows.numpy(), buckets.numpy(), signs.numpy(), normalize)


def scatter_batch(
    rapidgrads: Float[Tensor, "batch sketch"],
    grads: Float[Tensor, "batch grad"],
    *,
    buckets: Integer[Tensor, " grad"],
    signs: UInt8[Tensor, " bytes"],
    normalize: bool,
) -> None:
    """Add each sample's gradient of one tensor to its RapidGrad, in place, samples shared among torch's threads."""
    targets, sources = rapidgrads.numpy(), grads.contiguous().numpy()
    everything, index, bits = np.zeros(1, np.int64), buckets.numpy(), signs.numpy()

    def add(number: int) -> None:
        _one(targets[number], sources[number : number + 1], everything, index, bits, normalize)

    if grads.numel() > _WORTH_A_THREAD:
        side_by_side(add, len(sources))
    else:
        for number in range(len(sources)):
            add(number)


def _one(
    rapidgrad: np.ndarray, grad: np.ndarray, rows: np.ndarray, buckets: np.ndarray, signs: np.ndarray, normalize: bool
) -> None:
    length, flat = grad.shape[1], grad.reshape(-1)
    if not normalize:
        _kernel()(rapidgrad, flat, buckets, signs, rows, length)
    elif flat.size < len(rapidgrad):
        # A small tensor: reading it twice is cheaper than going over all buckets.
        _kernel()(rapidgrad, flat * _scale(float(np.vdot(flat, flat)), flat), buckets, signs, rows, length)
    else:
        # The norm is known only at the end: gather apart, where it stays in the core's cache, then add scaled.
        scratch = np.zeros_like(rapidgrad)
        total = _kernel()(scratch, flat, buckets, signs, rows, length)
        rapidgrad += scratch * _scale(total, flat)


def _scale(total: float, flat: np.ndarray) -> np.float32:
    """Return 1 / norm, from the sum of squares where that can be trusted."""
    if 1e-30 < total < 1e30:
        return np.float32(1.0 / np.sqrt(total))
    # Squares of very small or very large float32 numbers vanish or overflow.
    norm = float(np.linalg.norm(flat.astype(np.float64)))
    return np.float32(0.0) if norm == 0.0 else np.float32(1.0 / norm)
