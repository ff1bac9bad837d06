"""Sums of scores over groups of rows."""

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rapidin_vdb.index.keys import Keys


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


def members_of(
    keys: Keys, row_ids: Int64[np.ndarray, " samples"], groups: Int64[np.ndarray, " samples"]
) -> Int64[np.ndarray, " numbers"]:
    """Return which group each row of an index belongs to, by its number; -1 for those that are in none.

    `groups` says for each of `row_ids` which it belongs to; ids that the index does not hold are passed over.
    """
    order, numbers = np.argsort(row_ids), keys.numbers_of(row_ids)
    members = np.full(len(keys), -1)
    members[numbers] = groups[order[np.searchsorted(row_ids, keys.row_ids[numbers], sorter=order)]]
    return members
