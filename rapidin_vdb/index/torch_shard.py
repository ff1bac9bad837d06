"""One shard in a GPU's memory, in half precision, searched by torch: one matrix product reads every row once.

On an H100 torch's bare product of 52,000 rows with a hundred queries, and their best, took 2.5 ms; a whole search by
FAISS's flat index took 290, of which some 180 were scores in float64 on the CPU (docs/gpu.md). FAISS has neither
selectors there nor more than 2,048 results.
This shard itself has not been run on a GPU yet: a recipe has to ask for it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float16, Float32, Float64, Int64
from torch import Tensor

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index.half import UNIT, products_in_pieces
from rapidin_vdb.index.shard import Found, Least, Picked, Queries, Reached, reaching, sum_rounding
from rapidin_vdb.index.source import Rows

# Tensor cores cut a running sum off where others round it, at every step of four (V100) to sixteen products, and the
# products of a step too: half a last bit a product is more than was found with models of them. So sums are begun anew
# for so many products, and added up in single precision. The bound has a whole last bit a product: the half for what is
# cut off, and the half that `sum_rounding` has for what is rounded.
_PIECE = 2048
CUT_OFF = 2.0**-24
# A query is searched for as two in half precision, that together have twice its digits: its numbers rounded, and so
# many times what that has left of them.
_REST = 2.0**11
# Scores, and gathered rows, of so many bytes at a time.
_WORK_BYTES = 256 << 20
# Room for rows to come, where there is none left for them; and what is sent to the device at a time.
_ROOM_BYTES = 256 << 20
_SENT_BYTES = 64 << 20
# Beyond this share of a block's rows, the scores of all of them are had sooner than these rows gathered.
_MOST_GATHERED = 1 / 3
# Tensor cores multiply so many queries at a time anyway.
_QUERIES = 8
# Exact scores are summed for so many rows at once, always: torch's order of additions depends on how many there are,
# and equal rows must have equal scores.
_EXACT_ROWS = 64


@dataclass(eq=False)
class _Block:
    """Memory for rows, and how many of them any shard has taken."""

    rows: Float16[Tensor, "capacity sketch"]
    used: int = 0
    taking: Lock = field(default_factory=Lock)

    def take(self, count: int, wanted: int) -> int:
        """Let a shard that has the first `count` rows have further ones, at most `wanted`; return how many it got."""
        with self.taking:
            if self.used != count:  # another shard has gone on from here already
                return 0
            got = min(wanted, len(self.rows) - count)
            self.used += got
            return got


class TorchShard:
    """Rows in half precision in one device's memory."""

    def __init__(self, device: torch.device, *, width: int, room: int = 0) -> None:
        """Make an empty shard with room for so many rows, which further ones may exceed."""
        self.device = device
        self._width = width
        # Each with how many of its rows are ours: those that a later shard adds are none of ours.
        self._blocks: list[tuple[_Block, int]] = []
        if room:
            self._blocks.append((self._made(room), 0))

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return sum(count for _, count in self._blocks)

    @property
    def rounding(self) -> float:
        """Bound of a score's rounding error, relative to the product of the two norms."""
        piece = min(self._width, _PIECE)
        # Pieces are added one by one, which rounds as often as there are pieces.
        return sum_rounding(piece) + CUT_OFF * piece + UNIT * math.ceil(self._width / _PIECE) + 2.0**-21

    def side_by_side(self, queries: int) -> bool:
        """Whether so many queries keep one core busy only: they keep the device busy."""
        return True

    def search(self, queries: Queries, wanted: int, rows: Picked | None, *, both: bool) -> list[Found]:
        """Return the best rows, and the worst; see `Shard`."""
        ends: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(1 + both)]
        for numbers, scores in self._scored(queries, rows):
            for end, best in enumerate(ends):
                values, places = (-scores if end else scores).topk(min(wanted, scores.shape[1]), dim=1)
                best.append((values, numbers[places]))
        found = []
        for best in ends:
            if not best:
                found.append((np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)))
                continue
            values, numbers = torch.cat([part for part, _ in best], 1), torch.cat([part for _, part in best], 1)
            if len(best) > 1:
                values, places = values.topk(min(wanted, values.shape[1]), dim=1)
                numbers = numbers.gather(1, places)
            found.append((values.cpu().numpy(), numbers.cpu().numpy()))
        return found

    def scores(self, queries: Queries, rows: Picked | None) -> Iterator[tuple[Picked, Queries]]:
        """Yield the scores of all rows, or of some."""
        for numbers, scores in self._scored(queries, rows):
            yield numbers.cpu().numpy(), scores.cpu().numpy()

    def reaching(self, queries: Queries, least: Least, longest: float, rows: Picked | None) -> Reached:
        """Return the rows whose exact score may reach `least`; see `Shard`."""

        def scored() -> Iterator[tuple[Picked, Queries, Callable[[Picked], np.ndarray]]]:
            for numbers, scores in self.scores(queries, rows):
                yield numbers, scores, partial(self._norms, numbers)

        return reaching(scored(), queries, least, longest, self.rounding)

    def exact(self, queries: Queries, rows: Sequence[Int64[np.ndarray, " _"]]) -> list[Float64[np.ndarray, " _"]]:
        """Return the inner products in float64 of each query with rows of its own."""
        asked = torch.tensor(queries, device=self.device)
        counts = [len(mine) for mine in rows]
        picked = np.concatenate([np.empty(0, np.int64), *rows])
        owners = np.repeat(np.arange(len(queries)), counts)
        found = torch.empty(len(picked), dtype=torch.float64, device=self.device)
        for first in range(0, len(picked), _EXACT_ROWS):
            # The last of all stands in for those that are missing.
            part = np.minimum(np.arange(first, first + _EXACT_ROWS), len(picked) - 1)
            block = self._gathered(picked[part]).double()
            block *= asked[torch.from_numpy(owners[part]).to(self.device)]
            found[first : first + _EXACT_ROWS] = block.sum(1)[: len(picked) - first]
        return np.split(found.cpu().numpy(), np.cumsum(counts)[:-1])

    def take(self, rows: Picked) -> Rows:
        """Return some rows, as they were added."""
        return self._gathered(rows).cpu().view(torch.int16).numpy().view(np.uint16)

    def added(self, vectors: Rows) -> "TorchShard":
        """Return a shard with further rows; searches of this one that are under way are not disturbed.

        Raises:
            SpecError: the device has no memory for them.
        """
        further = TorchShard(self.device, width=self._width)
        further._blocks = list(self._blocks)
        first = 0
        while first < len(vectors):
            block, count = further._blocks[-1] if further._blocks else (None, 0)
            got = block.take(count, len(vectors) - first) if block is not None else 0
            if block is None or not got:
                further._blocks.append((self._made(len(vectors) - first, _ROOM_BYTES // (2 * self._width)), 0))
                continue
            step = max(1, _SENT_BYTES // (2 * self._width))
            for begin in range(0, got, step):
                part = vectors[first + begin : first + min(begin + step, got)]
                # A copy, where torch would complain of what cannot be written.
                there = torch.from_numpy((part if part.flags.writeable else part.copy()).view(np.float16))
                block.rows[count + begin : count + begin + len(part)].copy_(there)
            further._blocks[-1] = block, count + got
            first += got
        return further

    def _made(self, rows: int, more: int = 0) -> _Block:
        """Return memory for some rows, or for `more` if that is more and there is so much."""
        for room in sorted({rows, max(rows, more)}, reverse=True):
            try:
                return _Block(torch.empty(room, self._width, dtype=torch.float16, device=self.device))
            except torch.OutOfMemoryError:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        raise SpecError(
            f"{self.device} has no memory for {rows:,} more RapidGrads of width {self._width:,} "
            f"({2 * rows * self._width >> 20:,} MiB); give the index more devices, or build it on the CPU"
        )

    def _scored(
        self, queries: Queries, rows: Picked | None
    ) -> Iterator[tuple[Tensor, Float32[Tensor, "queries rows"]]]:
        """Yield numbers of rows and their scores, on the device."""
        asked, scales = self._asked(queries)
        first = 0
        for block, count in self._blocks:
            held, picks = block.rows[:count], None
            if rows is not None:
                begin, end = np.searchsorted(rows, [first, first + count])
                picks = torch.from_numpy(rows[begin:end] - first).to(self.device)
            if count and (picks is None or len(picks)):
                for numbers, found in _of_block(held, asked, picks):
                    rounded, rest = found.chunk(2)
                    yield numbers + first, (rounded + rest / _REST)[: len(queries)] * scales
            first += count

    def _asked(self, queries: Queries) -> tuple[Float16[Tensor, "padded sketch"], Float32[Tensor, "queries 1"]]:
        """Return queries twice, rounded to half precision and what is left of them, scaled, and their scales."""
        whole = torch.tensor(queries, device=self.device)
        largest = whole.abs().amax(1, keepdim=True)
        # No number may be beyond the range of half precision. Powers of two round nothing.
        exponents = (torch.floor(torch.log2(largest)) - 12).clamp(min=-126)
        scales = torch.where(largest > 0, torch.exp2(exponents), 1.0)
        whole = whole / scales
        half = -(-len(queries) // (_QUERIES // 2)) * (_QUERIES // 2)
        asked = torch.zeros(2 * half, self._width, dtype=torch.float16, device=self.device)
        asked[: len(queries)] = whole
        asked[half : half + len(queries)] = (whole - asked[: len(queries)].float()) * _REST
        return asked, scales

    def _gathered(self, rows: Picked) -> Float16[Tensor, "picked sketch"]:
        """Return some rows, in the order asked for."""
        if len(self._blocks) == 1:
            return self._blocks[0][0].rows[torch.from_numpy(rows).to(self.device)]
        found = torch.empty(len(rows), self._width, dtype=torch.float16, device=self.device)
        first = 0
        for block, count in self._blocks:
            mine = np.flatnonzero((rows >= first) & (rows < first + count))
            if len(mine):
                there = block.rows[torch.from_numpy(rows[mine] - first).to(self.device)]
                found[torch.from_numpy(mine).to(self.device)] = there
            first += count
        return found

    def _norms(self, numbers: Picked, some: Int64[np.ndarray, " _"]) -> np.ndarray:
        step = max(1, _WORK_BYTES // (8 * self._width))
        parts = [self._gathered(numbers[some[n : n + step]]).double().norm(dim=1) for n in range(0, len(some), step)]
        return torch.cat(parts).cpu().numpy() if parts else np.empty(0)


def _of_block(
    held: Float16[Tensor, "rows sketch"], asked: Float16[Tensor, "queries sketch"], picks: Tensor | None
) -> Iterator[tuple[Tensor, Float32[Tensor, "queries rows"]]]:
    """Yield numbers of rows of a block, of all or of those picked, and their scaled scores."""
    step = max(1, _WORK_BYTES // (4 * len(asked)))
    if picks is not None and len(picks) <= _MOST_GATHERED * len(held):
        step = max(1, min(step, _WORK_BYTES // (2 * held.shape[1])))
        for chosen in picks.split(step):
            yield chosen, _products(asked, held[chosen])
        return
    for first in range(0, len(held), step):
        part = held[first : first + step]
        scores = _products(asked, part)
        if picks is None:
            yield torch.arange(first, first + len(part), device=held.device), scores
            continue
        chosen = picks[(picks >= first) & (picks < first + len(part))]
        if len(chosen):
            yield chosen, scores[:, chosen - first]


def _products(
    asked: Float16[Tensor, "queries sketch"], rows: Float16[Tensor, "rows sketch"]
) -> Float32[Tensor, "queries rows"]:
    """Return inner products, with sums in single precision."""
    if rows.device.type == "cpu":  # which knows no such product
        return products_in_pieces(asked.float(), rows.float()).float()
    return _added(asked, rows, partial(torch.mm, out_dtype=torch.float32))


def _added(asked: Tensor, rows: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Float32[Tensor, "queries rows"]:
    """Return inner products, added up from those of pieces."""
    total = torch.zeros(len(asked), len(rows), device=rows.device)
    for first in range(0, rows.shape[1], _PIECE):
        piece = slice(first, first + _PIECE)
        total += product(asked[:, piece], rows[:, piece].T)
    return total
