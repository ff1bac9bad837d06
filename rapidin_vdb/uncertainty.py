"""How far scores of RapidGrads may be from those of full gradients: the variance of a sketch with random signs.

A RapidGrad's inner product has the right expectation over the signs and shuffles that could have been drawn. With P
the chance that two coordinates share a bucket, its variance for gradients q and g is at most
P (|q|^2 |g|^2 + <q, g>^2), as for the count sketch (Charikar, Chen, Farach-Colton 2002).
"""

import hashlib
import math
from dataclasses import replace
from statistics import NormalDist
from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rapidin_vdb.index import End, Grouping, Searchable, Survey, survey
from rapidin_vdb.records import Fingerprint
from rapidin_vdb.sketch import padded_length

PROBES = 16
"""Random vectors that tell the length of a sum of rows, to 18 % (one standard deviation)."""
_GROUPINGS_KEPT = 16
_USUAL = 0.9


def shared_bucket(coordinates: int, width: int) -> float:
    """Return the chance that two coordinates of a gradient share a bucket.

    >>> shared_bucket(4, width=4)
    0.0
    >>> shared_bucket(4, width=2) == 1 / 3
    True
    """
    padded = padded_length(coordinates, width=width)
    return (padded / width - 1) / max(padded - 1, 1)


def score_errors(
    vectors: Float32[np.ndarray, "queries sketch"], fingerprint: Fingerprint
) -> Float64[np.ndarray, " queries"] | None:
    """Return a standard deviation of the error of each query's scores, for samples of unrelated gradients.

    For others it is larger, up to sqrt(2) times for a sample of the same gradient. None where layers are not
    normalised: samples' gradients are of any length there.
    """
    if fingerprint.normalize != "layer":
        return None
    # With every layer of norm 1, gradients are as long as the query's; but for layers whose gradient is exactly zero,
    # such as those of queries and keys where there is one token to attend to.
    return _deviation(fingerprint) * np.einsum("qk,qk->q", vectors, vectors, dtype=np.float64)


def surveyed(
    index: Searchable,
    vectors: Float32[np.ndarray, "queries sketch"],
    top_k: int,
    fingerprint: Fingerprint,
    *,
    ends: tuple[End, ...] = ("highest",),
    among: Int64[np.ndarray, " some"] | None = None,
    grouping: Grouping | None = None,
    bins: int = 0,
) -> tuple[Survey, Float64[np.ndarray, "queries groups"]]:
    """Return what `survey` does, and a standard deviation of the error of each sum over groups.

    A sum of scores is the score of the sum of gradients. The length of that is told by random vectors, which go along
    with the queries in the same pass, once for the groups of an index.

    Raises:
        SpecError: `top_k` is not positive.
    """
    if grouping is None:
        found = survey(index, vectors, top_k, ends=ends, among=among, bins=bins)
        return found, np.zeros_like(found.sums)
    counts = np.bincount(grouping.groups, minlength=grouping.count)
    key = _key(grouping.row_ids, grouping.groups, counts)
    lengths = _known(index, key)
    if lengths is None:
        grouping = replace(grouping, probes=probes(vectors.shape[1]))
    found = survey(index, vectors, top_k, ends=ends, among=among, grouping=grouping, bins=bins)
    if lengths is None:
        lengths = _keep(index, key, found.probed)
    return found, _sum_errors(vectors, found.sums, lengths, counts, fingerprint)


def _key(row_ids: np.ndarray, groups: np.ndarray, counts: np.ndarray) -> bytes:
    """Return what tells a grouping of rows from others."""
    return hashlib.blake2b(row_ids.tobytes() + groups.tobytes() + counts.tobytes()).digest()


def _known(index: Searchable, key: bytes) -> Float64[np.ndarray, " groups"] | None:
    """Return the squared lengths of the sums over groups of an index's rows; None where they have to be found."""
    return _LENGTHS.setdefault(index, {}).get(key)


def _keep(
    index: Searchable, key: bytes, probed: Float64[np.ndarray, "probes groups"]
) -> Float64[np.ndarray, " groups"]:
    """Return these lengths, from the sums of probes' scores, and keep them for later questions."""
    lengths = np.einsum("pg,pg->g", probed, probed) / PROBES
    with _LOCK:
        kept = _LENGTHS[index]
        while len(kept) >= _GROUPINGS_KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = lengths
    return lengths


def _sum_errors(
    vectors: Float32[np.ndarray, "queries sketch"],
    sums: Float64[np.ndarray, "queries groups"],
    lengths: Float64[np.ndarray, " groups"],
    counts: Int64[np.ndarray, " groups"],
    fingerprint: Fingerprint,
) -> Float64[np.ndarray, "queries groups"]:
    squared = np.einsum("qk,qk->q", vectors, vectors, dtype=np.float64)[:, None]
    if fingerprint.normalize == "layer":
        lengths = np.where(counts == 1, squared, lengths)  # of a single sample it is known, as in `score_errors`
    return _deviation(fingerprint) * np.sqrt(squared * lengths + sums**2)


def probes(width: int) -> Float32[np.ndarray, "probes sketch"]:
    """Return random vectors whose inner products with any vector have its squared length for their mean square."""
    drawn = np.random.default_rng(0).integers(0, 2, (PROBES, width), dtype=np.int8)
    return 2 * drawn.astype(np.float32) - 1


def chance(error: float, scores: int) -> float:
    """Return what the largest of so many scores stays below nine times in ten, where all are of unrelated gradients.

    These are normally distributed, for each is a sum over all buckets. Of either sign, one sample counts as two scores.

    >>> [round(chance(1.0, scores), 2) for scores in (1, 100, 10_500)]
    [1.28, 3.07, 4.26]
    """
    return error * NormalDist().inv_cdf(_USUAL ** (1 / max(scores, 1)))


# By index, which is one of a version's rows; it is let go of with its index.
_LENGTHS: WeakKeyDictionary[Searchable, dict[bytes, Float64[np.ndarray, " groups"]]] = WeakKeyDictionary()
_LOCK = Lock()


def _deviation(fingerprint: Fingerprint) -> float:
    """Return the standard deviation of an inner product of unrelated vectors of length 1."""
    shared = shared_bucket(fingerprint.gradient_length, fingerprint.sketch.width)
    return fingerprint.epochs * fingerprint.learning_rate * math.sqrt(shared)
