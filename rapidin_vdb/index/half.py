"""Inner products of rows in half precision with queries in single precision, at the speed of memory.

FAISS's half-precision index runs on one core a query and at half of that speed; torch multiplies half-precision numbers
at under 1 GFLOP/s on a CPU. So few queries go through a compiled loop that widens each number on its way to a register,
and many through float32 blocks and matrix products.

Either way sums are begun anew every `PIECE` coordinates, and those of the pieces are added up in float64: what rounding
may take from a sum in single precision grows with its length, and all goes one way where a row lies along its query.
"""

import threading
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt16
from torch import Tensor

from rapidin_vdb.compiled import compiled
from rapidin_vdb.intrinsics import half_widener
from rapidin_vdb.matmul import in_single_precision

UNIT = 2.0**-24
"""What one operation in single precision may err by, relative to its result."""
PIECE = 2048
"""Coordinates of a sum in single precision: with more its bound is wider, with fewer the loops take longer."""
# Up to so many queries the loop, four queries at a time, is faster than widening blocks for a matrix product.
FEW_QUERIES = 32
# Of wider rows so few fit into a block that the loop is faster for any number of queries.
_WIDEST = 1 << 20
# Rows of a block, in bytes of float32: enough for the matrix product to run at full speed.
_BLOCK_BYTES = 64 << 20
# Queries of a matrix product, which has a result for every piece.
_BLOCK_QUERIES = 256
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
        return picks[number] if len(picks) else number

    place = compiled(place_of)

    def one(block, picks, queries, out):  # type: ignore[no-untyped-def]
        count, width = len(picks) if len(picks) else len(block), queries.shape[1]
        for number in range(0, count, 4):
            a, b = place(picks, number, count), place(picks, number + 1, count)
            c, d = place(picks, number + 2, count), place(picks, number + 3, count)
            for begin in range(0, width, PIECE):
                end = min(begin + PIECE, width)
                query = queries[0, begin:end]
                first, second = block[a, begin:end], block[b, begin:end]
                third, fourth = block[c, begin:end], block[d, begin:end]
                sum_a, sum_b, sum_c, sum_d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for at in range(len(query)):
                    value = query[at]
                    sum_a += wide(first[at]) * value
                    sum_b += wide(second[at]) * value
                    sum_c += wide(third[at]) * value
                    sum_d += wide(fourth[at]) * value
                for lane, found in enumerate((sum_a, sum_b, sum_c, sum_d)):
                    out[0, number + lane] += found

    def four(block, picks, queries, out):  # type: ignore[no-untyped-def]
        count, width, zero = len(picks) if len(picks) else len(block), queries.shape[1], np.float32(0.0)
        for number in range(0, count, 4):
            a, b = place(picks, number, count), place(picks, number + 1, count)
            c, d = place(picks, number + 2, count), place(picks, number + 3, count)
            for begin in range(0, width, PIECE):
                end = min(begin + PIECE, width)
                query_0, query_1 = queries[0, begin:end], queries[1, begin:end]
                query_2, query_3 = queries[2, begin:end], queries[3, begin:end]
                first, second = block[a, begin:end], block[b, begin:end]
                third, fourth = block[c, begin:end], block[d, begin:end]
                a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3 = zero, zero, zero, zero, zero, zero, zero, zero
                c_0, c_1, c_2, c_3, d_0, d_1, d_2, d_3 = zero, zero, zero, zero, zero, zero, zero, zero
                for at in range(len(query_0)):
                    a_at, b_at, c_at, d_at = wide(first[at]), wide(second[at]), wide(third[at]), wide(fourth[at])
                    q_0, q_1, q_2, q_3 = query_0[at], query_1[at], query_2[at], query_3[at]
                    a_0, a_1, a_2, a_3 = a_0 + a_at * q_0, a_1 + a_at * q_1, a_2 + a_at * q_2, a_3 + a_at * q_3
                    b_0, b_1, b_2, b_3 = b_0 + b_at * q_0, b_1 + b_at * q_1, b_2 + b_at * q_2, b_3 + b_at * q_3
                    c_0, c_1, c_2, c_3 = c_0 + c_at * q_0, c_1 + c_at * q_1, c_2 + c_at * q_2, c_3 + c_at * q_3
                    d_0, d_1, d_2, d_3 = d_0 + d_at * q_0, d_1 + d_at * q_1, d_2 + d_at * q_2, d_3 + d_at * q_3
                found_a, found_b = (a_0, a_1, a_2, a_3), (b_0, b_1, b_2, b_3)
                found_c, found_d = (c_0, c_1, c_2, c_3), (d_0, d_1, d_2, d_3)
                for query in range(4):
                    out[query, number] += found_a[query]
                    out[query, number + 1] += found_b[query]
                    out[query, number + 2] += found_c[query]
                    out[query, number + 3] += found_d[query]

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


def by_loops(queries: int, width: int) -> bool:
    """Say whether the calling thread alone scores rows for so many queries, without Python's lock."""
    return queries <= FEW_QUERIES or width > _WIDEST


def inner_products(
    block: UInt16[np.ndarray, "rows sketch"],
    queries: Float32[np.ndarray, "queries sketch"],
    picks: Int64[np.ndarray, " picked"] | None = None,
) -> Float32[np.ndarray, "queries picked"]:
    """Return the inner products of each query with all rows of a block, or with those picked.

    Rows are the bits of float16 numbers, all finite. Scores err by `UNIT` times `PIECE` + 2 of the product of the norms
    at the most; see `sum_rounding` in `index/shard.py`. Where `by_loops` says so this runs on the calling
    thread alone, without holding Python's lock; else it uses all of torch's threads.
    """
    count = len(block) if picks is None else len(picks)
    out = np.empty((len(queries), count), np.float32)
    if not by_loops(*queries.shape):
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
            # To which the loops add, and for rows that stand in for missing ones too.
            products = np.zeros((len(group), -(-(part.stop - begin) // 4) * 4))
            (one if len(group) == 1 else four)(near, chosen[part], group, products)
            out[mine, part] = products[: mine.stop - mine.start, : part.stop - begin]
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
    # A sum of squares errs by 1.3e-4 of itself at the most, its root by half of that.
    return np.sqrt(out) * np.float32(1 + 1e-4)


@cache
def _squares() -> Any:
    """Compile the loop for sums of squares, when it is first needed."""
    wide = half_widener()

    def squares(rows, picks, out):  # type: ignore[no-untyped-def]
        for number in range(len(picks)):
            row, total = rows[picks[number]], 0.0
            for begin in range(0, len(row), PIECE):
                piece, partial = row[begin : begin + PIECE], np.float32(0.0)
                for place in range(len(piece)):
                    value = wide(piece[place])
                    partial += value * value
                total += partial
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
        products[:, first:last] = products_in_pieces(asked, part)


def products_in_pieces(
    asked: Float32[Tensor, "queries sketch"], rows: Float32[Tensor, "rows sketch"]
) -> Float64[Tensor, "queries rows"]:
    """Return inner products, summed in single precision over `PIECE` coordinates at a time, and in double over these.

    They err by `UNIT` times `PIECE` of the product of the norms at the most, in whatever order a piece is added up.
    """
    pieces, whole = asked.shape[1] // PIECE, asked.shape[1] // PIECE * PIECE
    there = rows[:, :whole].unflatten(1, (pieces, PIECE)).permute(1, 2, 0)
    with in_single_precision():
        found = (asked[:, whole:] @ rows[:, whole:].T).double()
        # All pieces at once: of a product after another, threads would wait for one another each time.
        for first in range(0, len(asked) if pieces else 0, _BLOCK_QUERIES):
            part = slice(first, first + _BLOCK_QUERIES)
            mine = asked[part, :whole].unflatten(1, (pieces, PIECE)).transpose(0, 1)
            found[part] += (mine @ there).sum(0, dtype=torch.float64)
    return found
