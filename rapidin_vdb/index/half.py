"""Inner products of rows in half precision with queries in single precision, at the speed of memory.

FAISS's half-precision index runs on one core a query and at half of that speed; torch multiplies half-precision numbers
at under 1 GFLOP/s on a CPU. So few queries go through a compiled loop that widens each number on its way to a register,
and many through float32 blocks and one matrix product.
"""

import threading
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt16

from rapidin_vdb.compiled import compiled
from rapidin_vdb.intrinsics import half_widener
from rapidin_vdb.matmul import in_single_precision

# Up to so many queries the loop, four queries at a time, is faster than widening blocks for a matrix product.
FEW_QUERIES = 32
# Rows of a block, in bytes of float32: enough for the matrix product to run at full speed.
_BLOCK_BYTES = 64 << 20
# Rows that several groups of four queries go over one after another, while they are near: from memory they come once.
_NEAR_BYTES = 2 << 20
_compiling = threading.Lock()


def _loops() -> tuple[Any, Any, Any]:
    """Return the loops for one query, for four, and for one in float64."""
    # Shards that begin at the same time would each compile loops of their own.
    with _compiling:
        return _compiled_loops()


@cache
def _compiled_loops() -> tuple[Any, Any, Any]:
    """Compile the loops for one query, for four, and for one in float64; two seconds, once in a process.

    Four rows at a time: so many streams of memory at once are read twice as fast as one.
    """

    wide = half_widener()

    def place_of(picks, number, count):  # type: ignore[no-untyped-def]
        # Rows come four at a time; where fewer are left, the last one stands in for them.
        number = min(number, count - 1)
        return (picks[number] if len(picks) else number), number

    place = compiled(place_of)

    def one(block, picks, queries, out):  # type: ignore[no-untyped-def]
        query, count = queries[0], out.shape[1]
        for number in range(0, count, 4):
            (a, to_a), (b, to_b) = place(picks, number, count), place(picks, number + 1, count)
            (c, to_c), (d, to_d) = place(picks, number + 2, count), place(picks, number + 3, count)
            first, second, third, fourth = block[a], block[b], block[c], block[d]
            sum_a, sum_b, sum_c, sum_d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for at in range(len(query)):
                value = query[at]
                sum_a += wide(first[at]) * value
                sum_b += wide(second[at]) * value
                sum_c += wide(third[at]) * value
                sum_d += wide(fourth[at]) * value
            out[0, to_a], out[0, to_b], out[0, to_c], out[0, to_d] = sum_a, sum_b, sum_c, sum_d

    def four(block, picks, queries, out):  # type: ignore[no-untyped-def]
        query_0, query_1, query_2, query_3, count = queries[0], queries[1], queries[2], queries[3], out.shape[1]
        zero = np.float32(0.0)
        for number in range(0, count, 4):
            (a, to_a), (b, to_b) = place(picks, number, count), place(picks, number + 1, count)
            (c, to_c), (d, to_d) = place(picks, number + 2, count), place(picks, number + 3, count)
            first, second, third, fourth = block[a], block[b], block[c], block[d]
            a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3 = zero, zero, zero, zero, zero, zero, zero, zero
            c_0, c_1, c_2, c_3, d_0, d_1, d_2, d_3 = zero, zero, zero, zero, zero, zero, zero, zero
            for at in range(len(query_0)):
                a_at, b_at, c_at, d_at = wide(first[at]), wide(second[at]), wide(third[at]), wide(fourth[at])
                q_0, q_1, q_2, q_3 = query_0[at], query_1[at], query_2[at], query_3[at]
                a_0, a_1, a_2, a_3 = a_0 + a_at * q_0, a_1 + a_at * q_1, a_2 + a_at * q_2, a_3 + a_at * q_3
                b_0, b_1, b_2, b_3 = b_0 + b_at * q_0, b_1 + b_at * q_1, b_2 + b_at * q_2, b_3 + b_at * q_3
                c_0, c_1, c_2, c_3 = c_0 + c_at * q_0, c_1 + c_at * q_1, c_2 + c_at * q_2, c_3 + c_at * q_3
                d_0, d_1, d_2, d_3 = d_0 + d_at * q_0, d_1 + d_at * q_1, d_2 + d_at * q_2, d_3 + d_at * q_3
            out[0, to_a], out[1, to_a], out[2, to_a], out[3, to_a] = a_0, a_1, a_2, a_3
            out[0, to_b], out[1, to_b], out[2, to_b], out[3, to_b] = b_0, b_1, b_2, b_3
            out[0, to_c], out[1, to_c], out[2, to_c], out[3, to_c] = c_0, c_1, c_2, c_3
            out[0, to_d], out[1, to_d], out[2, to_d], out[3, to_d] = d_0, d_1, d_2, d_3

    def exact(rows, query, out):  # type: ignore[no-untyped-def]
        for number in range(len(rows)):
            row = rows[number]
            total = 0.0
            for place in range(len(query)):
                total += np.float64(wide(row[place])) * query[place]
            out[number] = total

    # Sums in any order: without that a loop cannot be vectorised. Once compiled it is one order for all rows.
    fast = {"reassoc", "contract", "nsz"}
    return compiled(one, fastmath=fast), compiled(four, fastmath=fast), compiled(exact, fastmath=fast)


def inner_products(
    block: UInt16[np.ndarray, "rows sketch"],
    queries: Float32[np.ndarray, "queries sketch"],
    picks: Int64[np.ndarray, " picked"] | None = None,
) -> Float32[np.ndarray, "queries picked"]:
    """Return the inner products of each query with all rows of a block, or with those picked.

    Rows are the bits of float16 numbers, all finite. With few queries this runs on the calling thread alone, without
    holding Python's lock; with many it uses all of torch's threads.
    """
    count = len(block) if picks is None else len(picks)
    out = np.empty((len(queries), count), np.float32)
    if len(queries) > FEW_QUERIES:
        _by_matrix_products(block, queries, picks, out)
        return out
    if not count:
        return out
    one, four, _ = _loops()
    chosen = np.empty(0, np.int64) if picks is None else picks
    groups = _groups(queries)
    step = count if len(groups) == 1 else max(4, _NEAR_BYTES // (2 * block.shape[1]) // 4 * 4)
    for begin in range(0, count, step):
        part = slice(begin, min(begin + step, count))
        near = block[part] if picks is None else block
        for number, group in enumerate(groups):
            mine = slice(4 * number, min(4 * number + 4, len(queries)))
            products = np.empty((len(group), part.stop - begin), np.float32)
            (one if len(group) == 1 else four)(near, chosen[part], group, products)
            out[mine, part] = products[: mine.stop - mine.start]
    return out


def _groups(queries: np.ndarray) -> list[np.ndarray]:
    """Return queries as the loops take them: four at a time, with zeros in place of missing ones, or one alone."""
    groups = [queries[first : first + 4] for first in range(0, len(queries), 4)]
    if groups and 1 < len(groups[-1]) < 4:
        missing = np.zeros((4 - len(groups[-1]), queries.shape[1]), np.float32)
        groups[-1] = np.concatenate([groups[-1], missing])
    return groups


def exact_inner_products(
    rows: UInt16[np.ndarray, "rows sketch"], query: Float64[np.ndarray, " sketch"]
) -> Float64[np.ndarray, " rows"]:
    """Return the inner products of a query with rows, in float64, all with the same order of additions.

    So equal rows have equal scores, wherever they stand, which matrix products do not promise.
    """
    out = np.empty(len(rows))
    _loops()[2](rows, query, out)
    return out


def row_norms(
    rows: UInt16[np.ndarray, "rows sketch"], picks: Int64[np.ndarray, " picked"]
) -> Float32[np.ndarray, " picked"]:
    """Return the lengths of some rows, a little more than they are."""
    with _compiling:
        squares = _squares()
    out = np.empty(len(picks), np.float32)
    squares(rows, picks, out)
    return np.sqrt(out) * np.float32(1 + 1e-4)


@cache
def _squares() -> Any:
    """Compile the loop for sums of squares, when it is first needed."""
    wide = half_widener()

    def squares(rows, picks, out):  # type: ignore[no-untyped-def]
        for number in range(len(picks)):
            row, total = rows[picks[number]], np.float32(0.0)
            for place in range(len(row)):
                value = wide(row[place])
                total += value * value
            out[number] = total

    return compiled(squares, fastmath={"reassoc", "contract", "nsz"})


_kept = threading.local()


def _buffer(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a buffer of this thread's: memory that has been touched before is twice as fast to write."""
    kept: dict[Any, torch.Tensor] = _kept.__dict__
    if dtype not in kept or len(kept[dtype]) < rows * width:
        kept[dtype] = torch.empty(rows * width, dtype=dtype)
    return kept[dtype][: rows * width].view(rows, width)


def _by_matrix_products(block: np.ndarray, queries: np.ndarray, picks: np.ndarray | None, out: np.ndarray) -> None:
    width = block.shape[1]
    step = max(1, _BLOCK_BYTES // (4 * width))
    count = out.shape[1]
    asked, products = torch.from_numpy(queries), torch.from_numpy(out)
    wide = _buffer(min(step, count), width, torch.float32)
    # Gathered first, where not all are wanted or torch would complain that the array cannot be written.
    gather = picks is not None or not block.flags.writeable
    near = _buffer(min(step, count), width, torch.float16) if gather else torch.from_numpy(block.view(np.float16))
    for first in range(0, count, step):
        last = min(first + step, count)
        if gather:
            chosen = np.arange(first, last) if picks is None else picks[first:last]
            np.take(block, chosen, axis=0, out=near[: last - first].numpy().view(np.uint16), mode="clip")
        part = wide[: last - first]
        part.copy_(near[: last - first] if gather else near[first:last])
        with in_single_precision():
            products[:, first:last] = asked @ part.T
