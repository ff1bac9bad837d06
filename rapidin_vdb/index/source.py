"""Where a shard's rows are: in memory, in a mapped file, in a file that is streamed, or in the table itself."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt16

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index.half import PIECE

Numbers = Int64[np.ndarray, " picked"]
Rows = UInt16[np.ndarray, "rows sketch"]
T = TypeVar("T")

# Read from a file at a time: enough for a disk at full speed, and for a matrix product.
_READ_BYTES = 32 << 20
_AHEAD = 2
# Arrays of so many bytes are searched as fast one by one as in one piece: they are not put together.
_LARGE_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some rows, and which of them are wanted."""

    numbers: np.ndarray
    """The numbers of the rows wanted, in ascending order."""
    rows: np.ndarray
    """The bits of float16 numbers, [rows, sketch]; to be used before the next chunk is asked for."""
    picks: np.ndarray | None
    """Which rows are wanted; None for all."""


@runtime_checkable
class RowSource(Protocol):
    """Rows that are known by number, from 0."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def chunks(self, wanted: Numbers | None) -> Iterator[Chunk]:
        """Yield all rows, or at least those wanted (ascending), once and in order."""
        ...

    def take(self, numbers: Numbers) -> Rows:
        """Return some rows."""
        ...


class ArraySource:
    """Rows in arrays, which may be mapped files."""

    def __init__(self, arrays: Sequence[np.ndarray], width: int) -> None:
        self.arrays = tuple(arrays)
        self._width = width
        self._starts = np.cumsum([0, *(len(array) for array in arrays)])

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self._starts[-1])

    def added(self, rows: Rows) -> "ArraySource":
        """Return a source with further rows, which are put together with the small arrays at the end."""
        kept, last, size = list(self.arrays), [rows], rows.nbytes
        # Each time a row is copied, its array is half as large again at least: that happens a few times only, and of
        # what is small no more is left than the logarithm of how often rows came.
        while kept and kept[-1].nbytes <= min(2 * size, _LARGE_BYTES - size) and not isinstance(kept[-1], np.memmap):
            last.insert(0, kept.pop())
            size += last[0].nbytes
        return ArraySource([*kept, np.concatenate(last) if len(last) > 1 else rows], self._width)

    def chunks(self, wanted: Numbers | None) -> Iterator[Chunk]:
        """Yield all rows, or at least those wanted."""
        for array, first in zip(self.arrays, self._starts, strict=False):
            if (chunk := _chunk(int(first), array, wanted)) is not None:
                yield chunk

    def take(self, numbers: Numbers) -> Rows:
        """Return some rows."""
        result = np.empty((len(numbers), self._width), np.uint16)
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            result[mine] = self.arrays[owner][numbers[mine] - self._starts[owner]]
        return result


@dataclass(frozen=True)
class RowFile:
    """Rows in a file."""

    path: Path
    """Which file."""
    offset: int
    """Where the first row begins, in bytes."""
    count: int
    """How many there are."""


class FileSource:
    """Rows in files that are larger than memory: read from the beginning to the end, a few chunks ahead."""

    def __init__(self, files: Sequence[RowFile], width: int) -> None:
        self._files = tuple(files)
        self._width = width
        self._starts = np.cumsum([0, *(file.count for file in files)])
        # Held open: whoever builds the index anew takes the files away.
        self._open: list[int] = []
        for file in files:
            descriptor = os.open(file.path, os.O_RDONLY)
            # At once: the next one may not open.
            weakref.finalize(self, os.close, descriptor)
            self._open.append(descriptor)
        # Buffers of earlier searches: memory that has been touched before is faster to read into.
        self._spare: list[list[np.ndarray]] = []

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self._starts[-1])

    def chunks(self, wanted: Numbers | None) -> Iterator[Chunk]:
        """Yield all rows, or at least those wanted."""
        # Buffers in rotation: one is being searched, one waits, one is being read into.
        rows = max(1, _READ_BYTES // (2 * self._width))
        try:
            buffers = self._spare.pop()
        except IndexError:
            buffers = [np.empty(rows * self._width, np.uint16) for _ in range(_AHEAD + 2)]
        yield from ahead(self._read(wanted, rows, buffers))
        self._spare.append(buffers)

    def _read(self, wanted: Numbers | None, size: int, buffers: list[np.ndarray]) -> Iterator[Chunk]:
        turn = 0
        for source, opened, start in zip(self._files, self._open, self._starts, strict=False):
            for first in range(0, source.count, size):
                count = min(size, source.count - first)
                if wanted is not None and not len(_between(wanted, int(start) + first, count)):
                    continue
                rows = buffers[turn % len(buffers)][: count * self._width]
                turn += 1
                _fill(opened, rows.data.cast("B"), source.offset + first * 2 * self._width, source.path)
                chunk = _chunk(int(start) + first, rows.reshape(count, self._width), wanted)
                assert chunk is not None
                yield chunk

    def take(self, numbers: Numbers) -> Rows:
        """Return some rows."""
        result = np.empty((len(numbers), self._width), np.uint16)
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        for place, (number, owner) in enumerate(zip(numbers, owners, strict=True)):
            source = self._files[owner]
            offset = source.offset + int(number - self._starts[owner]) * 2 * self._width
            _fill(self._open[owner], result[place].data.cast("B"), offset, source.path)
        return result


class TableSource:
    """Rows in the table itself, where there is no index and the table is larger than memory."""

    def __init__(
        self,
        row_ids: Int64[np.ndarray, " samples"],
        scan: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]],
        take: Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]],
        width: int,
    ) -> None:
        """`scan` yields all rows in the order of `row_ids`, `take` those of some row ids; as row ids and float16."""
        self._row_ids, self._scan, self._take, self._width = row_ids, scan, take, width
        self.largest_norm = 0.0
        """No row that was read is longer."""

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self._row_ids)

    def chunks(self, wanted: Numbers | None) -> Iterator[Chunk]:
        """Yield all rows, or at least those wanted."""
        for chunk in ahead(self._read(wanted)):
            self.largest_norm = max(self.largest_norm, norm_of(chunk.rows))
            yield chunk

    def _read(self, wanted: Numbers | None) -> Iterator[Chunk]:
        if wanted is not None and len(wanted) < self.count // 4:
            for first in range(0, len(wanted), 64):
                part = wanted[first : first + 64]
                yield Chunk(part, self.take(part), None)
            return
        first = 0
        for row_ids, vectors in self._scan():
            if not np.array_equal(row_ids, self._row_ids[first : first + len(row_ids)]):
                raise RuntimeError("the table's rows came in another order than before")
            if (chunk := _chunk(first, vectors.view(np.uint16), wanted)) is not None:
                yield chunk
            first += len(row_ids)

    def take(self, numbers: Numbers) -> Rows:
        """Return some rows."""
        wanted = self._row_ids[numbers]
        result = np.empty((len(numbers), self._width), np.uint16)
        order = np.argsort(wanted)
        for row_ids, vectors in self._take(wanted):
            places = order[np.searchsorted(wanted, row_ids, sorter=order)]
            result[places] = vectors.view(np.uint16)
        return result


def norm_of(rows: Rows) -> float:
    """Return a bound of the rows' norms."""
    squares = np.zeros(len(rows))
    for begin in range(0, rows.shape[1], PIECE):
        wide = rows[:, begin : begin + PIECE].view(np.float16).astype(np.float32)
        squares += np.einsum("ij,ij->i", wide, wide)
    # A little more than was computed in float32: a piece's sum errs by 1.3e-4 of itself at the most, its root by half.
    return float(np.sqrt(squares.max(initial=0.0))) * (1 + 1e-4)


def ahead(chunks: Iterator[T], depth: int = _AHEAD) -> Iterator[T]:
    """Yield what an iterator yields, which runs in a thread of its own, up to `depth` items ahead."""
    waiting: Queue[tuple[bool, T | BaseException | None]] = Queue(depth)
    stopped = Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return
            except Full:  # look again whether anybody still waits
                continue

    def read() -> None:
        try:
            for chunk in chunks:
                put((True, chunk))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            going, value = waiting.get()
            if going:
                yield value  # type: ignore[misc]
            elif value is None:
                return
            else:
                raise value  # type: ignore[misc]
    finally:
        stopped.set()
        while thread.is_alive():
            try:
                waiting.get_nowait()
            except Empty:
                thread.join(0.05)


def _between(wanted: np.ndarray, first: int, count: int) -> np.ndarray:
    begin, end = np.searchsorted(wanted, [first, first + count])
    return wanted[begin:end]


def _chunk(first: int, rows: np.ndarray, wanted: np.ndarray | None) -> Chunk | None:
    """Return neighbouring rows with those of them that are wanted; None where none is."""
    if wanted is None:
        return Chunk(np.arange(first, first + len(rows)), rows, None) if len(rows) else None
    mine = _between(wanted, first, len(rows))
    return Chunk(mine, rows, mine - first) if len(mine) else None


def _fill(opened: int, target: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(opened, [target[done:]], offset + done)
        except OSError as error:
            raise SpecError(f"{path} cannot be read: {error}; build the index anew with: rapidin-vdb index") from error
        if not count:
            raise SpecError(f"{path} ends too early; build the index anew with: rapidin-vdb index")
        done += count
