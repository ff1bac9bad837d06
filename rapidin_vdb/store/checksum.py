"""A checksum for every row: Lance has none for what it stores, and a byte that flips on a disk looks like any other.

A CRC of 32 bits notices every change of up to 32 bits in a row, and misses one of four billion others. The lower half
covers what every row has, the upper one the record's further fields (30 bits of a CRC, and a bit that says it is there:
rows that were written before there was one have zeros).
"""

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rapidin_vdb.records import Scalar

_FIELDS = 32
_THERE = 1 << 62


def row_checksum(values: Iterable[Scalar], numbers: Sequence[Sequence[int]], vector: np.ndarray) -> int:
    """Return the checksum of a row's plain values, of its lists of whole numbers, and of its vector of float16."""
    crc = 0
    for value in values:
        # A mark of the kind before each, and a length: no two rows have the same bytes.
        if value is None:
            part = b"n"
        elif isinstance(value, str):
            part = _text(value)
        elif isinstance(value, bool | int):
            part = b"i%d;" % int(value)
        else:
            part = b"f" + np.float32(value).tobytes()
        crc = zlib.crc32(part, crc)
    for row in numbers:
        crc = zlib.crc32(b"l%d:" % len(row) + np.asarray(row, "<i4").tobytes(), crc)
    return zlib.crc32(np.ascontiguousarray(vector, "<f2").data.cast("B"), crc)


def with_fields(checksum: int, fields: Mapping[str, Scalar]) -> int:
    """Return a row's checksum with that of its record's further fields, as they are stored.

    It stays the same when columns are added, and when whole numbers are widened to floating point.
    """
    crc = 0
    for name, value in sorted((name.lower(), value) for name, value in fields.items() if value is not None):
        if isinstance(value, str):
            part = _text(value)
        elif isinstance(value, bool):
            part = b"b%d" % value
        elif isinstance(value, int) and int(float(value)) != value:
            part = b"i%d;" % value
        else:
            part = b"d" + struct.pack("<d", value)
        crc = zlib.crc32(_text(name) + part, crc)
    return checksum | (crc >> 2) << _FIELDS | _THERE


def covers_fields(checksum: int) -> bool:
    """Say whether a row's checksum covers its record's further fields."""
    return bool(checksum & _THERE)


def _text(value: str) -> bytes:
    text = value.encode("utf-8")
    return b"s%d:" % len(text) + text
