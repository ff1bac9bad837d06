"""The sketch on the CPU: one pass over a gradient fills its buckets and takes its norm."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from rapidin_vdb.compiled import compiled, side_by_side
from rapidin_vdb.sketch.lanes import LANES, WORTH_LANES, Buckets

# Coordinates below which sharing the work among threads costs more than it saves.
_WORTH_A_THREAD = 1 << 17
# What eight samples in lanes cost beside one.
_LANES_COST = 3.3


@cache
def _kernel() -> Any:
    """Compile the loop for one sample; a second the first time in a process, and only where a gradient is sketched."""

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


@cache
def _small_kernel() -> Any:
    """Compile the loop for several samples' gradients of a small tensor, one sample after the other."""

    def scatter(targets, grads, buckets, signs, scales):  # type: ignore[no-untyped-def]
        samples, length = grads.shape
        for sample in range(samples):
            for place in range(length):
                sign = np.float32(1.0) - np.float32(2.0) * np.float32((signs[place >> 3] >> (place & 7)) & 1)
                targets[sample, buckets[place]] += sign * (scales[sample] * grads[sample, place])

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
    lanes: Sequence[Buckets] = (),
) -> None:
    """Add each sample's gradient of one tensor to its RapidGrad, in place, the work shared among torch's threads.

    A tensor too small to be worth buckets of its own goes to `lanes` instead, each eight samples' from the first on, as
    far as there are any; whoever keeps these gives them to the RapidGrads after the last tensor.
    """
    targets, sources, index, bits = rapidgrads.numpy(), grads.contiguous().numpy(), buckets.numpy(), signs.numpy()
    length, width = sources.shape[1], targets.shape[1]
    share = side_by_side if sources.size >= _WORTH_A_THREAD else _in_turn
    if length <= width // 2:
        # Going over all buckets once more in the end would cost more than it saves; reading a gradient twice does not.
        scales = np.ones(len(sources), np.float32)
        if normalize:
            norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64).numpy()
            np.divide(1.0, norms, out=scales, where=norms != 0, casting="same_kind")
        first = min(LANES * len(lanes), len(sources))

        def add_to_lanes(group: int) -> None:
            mine = slice(group * LANES, min((group + 1) * LANES, first))
            lanes[group].add_scaled(sources[mine], index, bits, scales[mine])

        share(add_to_lanes, len(lanes))
        rest, tasks = len(sources) - first, min(torch.get_num_threads(), len(sources) - first)

        def add_small(task: int) -> None:
            mine = slice(first + task * rest // tasks, first + (task + 1) * rest // tasks)
            _small_kernel()(targets[mine], sources[mine], index, bits, scales[mine])

        share(add_small, tasks)
        return
    groups, parts = _shares(len(sources), length, width=width, threads=torch.get_num_threads())
    sums = [[_sums_of(group, width) for _ in parts] for group in groups]

    def add(number: int) -> None:
        group, part = divmod(number, len(parts))
        sums[group][part].add(sources[groups[group]], index, bits, *parts[part])

    def give(group: int) -> None:
        rows, squares = sources[groups[group]], np.sum([part.squares for part in sums[group]], axis=0)
        scales = np.ones(len(rows), np.float32)
        if normalize:
            scales[:] = [_scale(float(total), row) for total, row in zip(squares, rows, strict=False)]
        for part in sums[group]:
            part.give(targets[groups[group]], scales)

    share(add, len(groups) * len(parts))
    share(give, len(groups))


class _Alone:
    """The buckets of one sample, as `Buckets` has those of several."""

    def __init__(self, width: int) -> None:
        self._sums, self.squares = np.zeros(width, np.float32), np.zeros(1)

    def add(self, grads: np.ndarray, buckets: np.ndarray, signs: np.ndarray, begin: int, stop: int) -> None:
        part, all_of_it = slice(begin, stop), np.zeros(1, np.int64)
        self.squares[0] += _kernel()(
            self._sums, grads[0, part], buckets[part], signs[begin // 8 :], all_of_it, stop - begin
        )

    def give(self, rapidgrads: np.ndarray, scales: np.ndarray) -> None:
        rapidgrads[0] += self._sums * scales[0]


def _shares(samples: int, length: int, *, width: int, threads: int) -> tuple[list[slice], list[tuple[int, int]]]:
    """Return which samples are done together, and which parts of a tensor at once, so that it takes the least time."""
    last = samples if samples % LANES >= WORTH_LANES else samples - samples % LANES
    alone = [slice(number, number + 1) for number in range(samples)]
    together = [slice(first, min(first + LANES, last)) for first in range(0, last, LANES)] + alone[last:]
    ways = []
    for groups, cost in ((together, _LANES_COST if last else 1.0), (alone, 1.0)):
        parts = _parts(length, width=width, most=threads // max(1, len(groups)))
        rounds = -(-len(groups) * len(parts) // threads)
        ways.append((rounds * cost / len(parts), groups, parts))
    _, groups, parts = min(ways, key=lambda way: way[0])
    return groups, parts


def _sums_of(group: slice, width: int) -> Buckets | _Alone:
    return Buckets(width) if group.stop - group.start > 1 else _Alone(width)


def _parts(length: int, *, width: int, most: int) -> list[tuple[int, int]]:
    """Return begin and end of the parts of a tensor that are done at once where samples do not suffice for threads.

    All buckets are gone over for each of them in the end: so they have many times as many coordinates.
    """
    count = max(1, min(most, length // (4 * width)))
    bounds = [8 * (number * length // (8 * count)) for number in range(count)] + [length]
    return list(pairwise(bounds))


def _in_turn(task: Callable[[int], None], count: int) -> None:
    for number in range(count):
        task(number)


def _one(
    rapidgrad: np.ndarray, grad: np.ndarray, rows: np.ndarray, buckets: np.ndarray, signs: np.ndarray, normalize: bool
) -> None:
    length, flat = grad.shape[1], grad.reshape(-1)
    if not normalize:
        _kernel()(rapidgrad, flat, buckets, signs, rows, length)
    elif flat.size < len(rapidgrad):
        # A small tensor: reading it twice is cheaper than going over all buckets.
        wide = flat.astype(np.float64)  # many small squares are lost beside a large one
        _kernel()(rapidgrad, flat * _scale(float(np.vdot(wide, wide)), flat), buckets, signs, rows, length)
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
