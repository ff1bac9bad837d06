"""A checksum for every row: Lance has none for what it stores, and a byte that flips on a disk looks like any other.

A CRC of 32 bits notices every change of up to 32 bits in a row, and misses one of four billion others. It covers what
we write ourselves; a record's further fields are not in it, whose columns may be widened later.
"""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

Value = str | int | float | bool | None


def row_checksum(values: Iterable[Value], numbers: Sequence[Sequence[int]], vector: np.ndarray) -> int:
    """Return the checksum of a row's plain values, of its lists of whole numbers, and of its vector of float16."""
    crc = 0
    for value in values:
        # A mark of the kind before each, and a length: no two rows have the same bytes.
        if value is None:
            part = b"n"
        elif isinstance(value, str):
            text = value.encode("utf-8")
            part = b"s%d:" % len(text) + text
        elif isinstance(value, bool | int):
            part = b"i%d;" % int(value)
        else:
            part = b"f" + np.float32(value).tobytes()
        crc = zlib.crc32(part, crc)
    for row in numbers:
        crc = zlib.crc32(b"l%d:" % len(row) + np.asarray(row, "<i4").tobytes(), crc)
    return zlib.crc32(np.ascontiguousarray(vector, "<f2").data.cast("B"), crc)
