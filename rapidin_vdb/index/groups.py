"""Sums of scores over groups of rows."""

import numpy as np
from jaxtyping import Float32, Float64, Int64


def add_up(
    sums: Float64[np.ndarray, "queries groups"],
    members: Int64[np.ndarray, " some"],
    scores: Float32[np.ndarray, "queries some"],
) -> None:
    """Add scores to the sums of the groups that their rows belong to, in place."""
    count, occurring = sums.shape[1], np.arange(0)
    if few := len(members) < count:
        # There may be as many groups as rows in all: only those are touched that occur here.
        occurring, members = np.unique(members, return_inverse=True)
    for total, some in zip(sums, scores, strict=True):
        if few:
            total[occurring] += np.bincount(members, weights=some)
        else:
            total += np.bincount(members, weights=some, minlength=count)
