"""What the sketch draws: the permutations of Algorithm 1 and the signs, repeatable from the seed for ever.

Only the raw streams of numpy's bit generators are used, which numpy promises never to change (its `permutation` and
torch's `randperm` come with no such promise).
"""

from dataclasses import dataclass

import numpy as np

from rapidin_vdb.errors import SpecError
from rapidin_vdb.records import SketchSpec

SCHEME = 1
"""Version of the drawing below. Whoever changes what is drawn must raise it: old vectors cannot meet new ones."""


@dataclass(frozen=True, eq=False)
class ShuffleStep:
    """One of the lambda rounds of Algorithm 1."""

    row_permutation: np.ndarray
    """Viewing v as [x_row, D / x_row], row r of the result is row `row_permutation[r]`; x_row is its length."""
    column_permutation: np.ndarray
    """Viewing v as [D / x_col, x_col], column c of the result is column `column_permutation[c]`; x_col likewise."""


def padded_length(grad_length: int, *, width: int) -> int:
    """Return the length to which a gradient is padded with zeros: the next power of two.

    A power of two has a divisor of every size, is a multiple of every width, and makes all of the map's arithmetic
    shifts and masks; it depends on nothing else, so RapidGrads of every width nest. The zeros are never computed.

    >>> padded_length(5000, width=64)
    8192

    Raises:
        SpecError: the width is no power of two, or beyond the gradient.
    """
    if width < 1 or width & (width - 1):
        below = 1 << max(width.bit_length() - 1, 0)
        raise SpecError(f"width is {width}; wanted a power of two, such as {below} or {2 * below}")
    if width > grad_length:
        largest = 1 << (grad_length.bit_length() - 1) if grad_length > 0 else 0
        raise SpecError(
            f"width is {width}, but the gradient has only {grad_length} coordinates; "
            f"give --width {largest} or less, or choose more --parameters"
        )
    return 1 << (grad_length - 1).bit_length()


def draw_shuffle(spec: SketchSpec, length: int) -> list[ShuffleStep]:
    """Return the lambda rounds of Algorithm 1 for a padded length.

    Divisors are drawn from the four powers of two from sqrt(D) upwards: x_row * x_col >= D then always holds, so blocks
    of rows are never longer than a row of columns and every coordinate can reach every place, while no permutation has
    more than 8 sqrt(D) entries.

    Raises:
        SpecError: a negative number of shuffles, or a scheme that this version does not know.
    """
    if spec.scheme != SCHEME:
        raise SpecError(f"sketch scheme {spec.scheme} is not known to this version, which writes scheme {SCHEME}")
    if spec.shuffles < 0:
        raise SpecError(f"shuffles is {spec.shuffles}; wanted 0 or more (the paper uses 20 to 100)")
    log_length = length.bit_length() - 1
    lowest = max((log_length + 1) // 2, 1)
    highest = max(min(lowest + 3, log_length - 1), lowest)
    stream = _stream(spec, purpose=0)
    return [
        ShuffleStep(
            row_permutation=_draw_permutation(stream, lowest, highest),
            column_permutation=_draw_permutation(stream, lowest, highest),
        )
        for _ in range(spec.shuffles)
    ]


def draw_signs(spec: SketchSpec, start: int, stop: int) -> np.ndarray:
    """Return the Rademacher signs of coordinates [start, stop) of the unshuffled gradient, as booleans: True is -1."""
    return np.unpackbits(draw_packed_signs(spec, start, stop), count=stop - start, bitorder="little").astype(bool)


def draw_packed_signs(spec: SketchSpec, start: int, stop: int) -> np.ndarray:
    """Return the same signs eight to a byte, the first in the lowest bit; bits behind the last sign mean nothing.

    Any range can be drawn by itself: the generator is counter-based.
    """
    stream = _stream(spec, purpose=1)
    # One Philox step gives four words of 64 signs.
    first = start // 256
    stream.advance(first)
    words = stream.random_raw(4 * (-(-stop // 256) - first)) if stop > start else np.empty(0, np.uint64)
    # The words are the signs, packed already. A byte more, for the last one to take its upper bits from.
    packed = np.append(words.astype("<u8", copy=False).view(np.uint8), np.uint8(0))[start // 8 - 32 * first :]
    if past := start % 8:
        packed[:-1] = packed[:-1] >> past | packed[1:] << (8 - past)
    return packed[: -(-(stop - start) // 8)]


def _stream(spec: SketchSpec, *, purpose: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([spec.seed, spec.scheme, purpose]))


def _draw_permutation(stream: np.random.Philox, lowest: int, highest: int) -> np.ndarray:
    log_divisor = lowest + int(stream.random_raw() % np.uint64(highest - lowest + 1))
    keys = stream.random_raw(1 << log_divisor)
    return np.argsort(keys, kind="stable").astype(np.int32)
