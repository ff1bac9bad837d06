"""How far scores of RapidGrads may be from those of full gradients: the variance of a sketch with random signs.

A RapidGrad's inner product has the right expectation over the signs and shuffles that could have been drawn. With P
the chance that two coordinates share a bucket, its variance for gradients q and g is at most
P (|q|^2 |g|^2 + <q, g>^2), as for the count sketch (Charikar, Chen, Farach-Colton 2002).
"""

import math

import numpy as np
from jaxtyping import Float32, Float64

from rapidin_vdb.records import Fingerprint
from rapidin_vdb.sketch import padded_length

PROBES = 16
"""Random vectors that tell the length of a sum of rows, to 18 % (one standard deviation)."""


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
    # With every layer of norm 1, all gradients are as long as the query's.
    return _deviation(fingerprint) * np.einsum("qk,qk->q", vectors, vectors, dtype=np.float64)


def probes(width: int) -> Float32[np.ndarray, "probes sketch"]:
    """Return random vectors whose inner products with any vector have its squared length for their mean square."""
    drawn = np.random.default_rng(0).integers(0, 2, (PROBES, width), dtype=np.int8)
    return 2 * drawn.astype(np.float32) - 1


def sum_errors(
    vectors: Float32[np.ndarray, "queries sketch"],
    sums: Float64[np.ndarray, "queries groups"],
    probed: Float64[np.ndarray, "probes groups"],
    fingerprint: Fingerprint,
) -> Float64[np.ndarray, "queries groups"]:
    """Return a standard deviation of the error of sums of scores, given the same sums for the `probes`.

    A sum of scores is the score of the sum of gradients, whose length the probes tell.
    """
    lengths = np.einsum("qk,qk->q", vectors, vectors, dtype=np.float64)[:, None] * (probed**2).mean(0)
    return _deviation(fingerprint) * np.sqrt(lengths + sums**2)


def chance(error: float, samples: int) -> float:
    """Return about what the largest of so many scores is by chance alone, where all are of unrelated gradients."""
    return error * math.sqrt(2 * math.log(max(samples, 2)))


def _deviation(fingerprint: Fingerprint) -> float:
    """Return the standard deviation of an inner product of unrelated vectors of length 1."""
    shared = shared_bucket(fingerprint.gradient_length, fingerprint.sketch.width)
    return fingerprint.epochs * fingerprint.learning_rate * math.sqrt(shared)
