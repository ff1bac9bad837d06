"""Candidates are found in single precision: no score errs by more than its shard says, whatever the rows are like."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from test_index import index_of

from rapidin_vdb.index import shard
from rapidin_vdb.index.faiss_shard import FaissShard
from rapidin_vdb.index.half import PIECE, UNIT, inner_products, row_norms
from rapidin_vdb.index.shard import ScanShard, sum_rounding
from rapidin_vdb.index.source import ArraySource, norm_of
from rapidin_vdb.index.torch_shard import TorchShard
from rapidin_vdb.recipe import IndexRecipe

COUNTS = [1, 4, 33]
"""Queries for the loop of one, for that of four, and for matrix products."""
CONSTANTS = (0.537, 1.37, 1.93)
"""Of constant rows all rounding goes one way, and how much it is depends on the constant."""


def made_by(kind: str, width: int) -> shard.Shard:
    if kind == "scan":
        return ScanShard(ArraySource([], width), width=width)
    if kind == "torch":
        return TorchShard(torch.device("cpu"), width=width)
    return FaissShard(None, width=width, recipe=IndexRecipe(name="test", element_type="float32"))


def vectors_of(width: int) -> np.ndarray:
    """Constant rows, one of them negative, and one drawn at random."""
    drawn = np.random.default_rng(3).standard_normal(width, dtype=np.float32)
    fixed = [np.full(width, constant, np.float16) for constant in (*CONSTANTS, -1.11)]
    return np.stack([*fixed, drawn.astype(np.float16)])


def queries_of(vectors: np.ndarray, count: int) -> np.ndarray:
    """Rows themselves and multiples of them: each query is parallel to a row."""
    scales = np.float32(0.1) + np.random.default_rng(4).random(count, dtype=np.float32)
    return vectors[np.arange(count) % len(vectors)].astype(np.float32) * scales[:, None]


def exact_and_limits(queries: np.ndarray, vectors: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """Inner products in float64, and how much scores in single precision may err by."""
    wide, rows = queries.astype(np.float64), vectors.astype(np.float64)
    return wide @ rows.T, rounding * np.linalg.norm(wide, axis=1)[:, None] * np.linalg.norm(rows, axis=1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("width", [100, PIECE * 3 + 77, 1 << 16, 1 << 18])
@pytest.mark.parametrize("kind", ["scan", "torch", "faiss"])
def test_no_score_errs_by_more_than_is_said(kind, width, count):
    vectors = vectors_of(width)
    some = made_by(kind, width).added(vectors.view(np.uint16))
    asked = queries_of(vectors, count)
    exact, limits = exact_and_limits(asked, vectors, some.rounding)
    for numbers, scores in some.scores(asked, None):
        assert np.all(np.abs(scores - exact[:, numbers]) <= limits[:, numbers])
    for rows in (None, np.array([0, 2, 3])):
        for sign, (scores, numbers) in zip((1, -1), some.search(asked, 8, rows, both=True), strict=True):
            lost = np.abs(sign * scores - np.take_along_axis(exact, numbers, 1))
            assert np.all(lost <= np.take_along_axis(limits, numbers, 1))


@pytest.mark.parametrize("count", [1, 4, 33])
def test_no_score_of_the_widest_rows_errs_by_more_than_is_said(count):
    width = 1 << 24
    rows = np.stack([np.full(width, constant, np.float16) for constant in CONSTANTS[:2]])
    asked = np.full((count, width), np.float32(1.37))
    scores = inner_products(rows.view(np.uint16), asked)
    right = width * float(np.float32(1.37)) * rows[:, 0].astype(np.float64)
    assert np.abs(scores / right - 1).max() <= sum_rounding(width) < 1.3e-4
    assert np.all(row_norms(rows.view(np.uint16), np.arange(2)) >= math.sqrt(width) * rows[:, 0].astype(np.float64))


@pytest.mark.parametrize("width", [1 << 16, 1 << 20])
def test_no_row_is_longer_than_is_said(width):
    for constant in CONSTANTS:
        rows = np.full((2, width), constant, np.float16)
        long = math.sqrt(width) * float(rows[0, 0])
        assert long <= norm_of(rows.view(np.uint16)) < 1.001 * long
        assert np.all(row_norms(rows.view(np.uint16), np.array([1])) >= long)


@cache
def rows_along_a_query(width: int) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """A query, rows of which one is along it and the others are at an angle, and their products in float64."""
    draw = np.random.default_rng(0)
    query = np.full(width, 1.37, np.float32)
    vectors = {"along": query.astype(np.float16)}
    for number in range(20):
        aside = draw.standard_normal(width, dtype=np.float32)
        aside -= (aside @ query) / (query @ query) * query
        vectors[f"s{number:02d}"] = (np.float32(0.9985) * query + aside).astype(np.float16)
    exact = {name: float(vector.astype(np.float64) @ query.astype(np.float64)) for name, vector in vectors.items()}
    return query, vectors, exact


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("elements", ["float16", "float32"])
def test_what_is_best_of_one_query_is_best_of_it_among_others(elements, count):
    """Rounding takes most of the row along the query, and there are more others than candidates."""
    width = 1 << 20
    query, vectors, exact = rows_along_a_query(width)
    index = index_of(vectors, width=width, batch=21, element_type=elements)
    right = sorted(exact.items(), key=lambda pair: -pair[1])
    assert right[0][0] == "along"
    for ranked in index.search(np.repeat(query[None], count, axis=0), 1):
        assert ranked == [("along", pytest.approx(exact["along"], rel=1e-12))]
    assert UNIT * PIECE < index.shards[0].rounding < 3e-4
