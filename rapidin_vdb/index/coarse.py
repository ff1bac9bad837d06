"""Narrow copies of RapidGrads for a first, coarse search: neighbouring buckets summed are those of a smaller width."""

import numpy as np
from jaxtyping import Float32, UInt16

from rapidin_vdb.errors import SpecError

# Of fewer results as many are looked at as of so many: so few candidates would find less of them.
FEWEST = 10

Rows = UInt16[np.ndarray, "rows sketch"]


def looked_at(refine: int, top_k: int) -> int:
    """Return how many samples that a coarse search finds are scored again at full width.

    >>> looked_at(20, 3), looked_at(20, 100)
    (200, 2000)
    """
    return refine * max(top_k, FEWEST)


def narrowed(queries: Float32[np.ndarray, "queries sketch"], width: int) -> Float32[np.ndarray, "queries {width}"]:
    """Return queries folded to a width: sums of neighbouring buckets, as rows of that width are of theirs."""
    return np.ascontiguousarray(queries.reshape(len(queries), width, -1).sum(2))


def folded(rows: Rows, width: int) -> UInt16[np.ndarray, "rows {width}"]:
    """Return rows, as bits of float16, folded to a width and divided by a power of two near the root of the fold.

    Sums of m independent entries are sqrt(m) times as large as one, so the division keeps them in the range that they
    had; it is exact, and the same for all rows, so it changes no ranking.

    Raises:
        SpecError: a sum is beyond half precision.
    """
    times = rows.shape[1] // width
    sums = rows.view(np.float16).reshape(len(rows), width, times).sum(2, dtype=np.float32)
    with np.errstate(over="ignore"):
        narrow = (sums / np.float32(2.0 ** (times.bit_length() // 2))).astype(np.float16)
    if not np.isfinite(narrow).all():
        raise SpecError(
            f"folded to width {width}, a RapidGrad reaches {np.abs(sums).max():.3g}, beyond half precision; use a "
            "larger coarse_width, or a recipe without one"
        )
    return narrow.view(np.uint16)
