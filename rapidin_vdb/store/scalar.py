"""Scalar indices: copies of a column's values from which Lance answers filters, without any checksum of its own."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rapidin_vdb.errors import TableError
from rapidin_vdb.store.filters import listed
from rapidin_vdb.store.indexing import make
from rapidin_vdb.store.row_ids import ROW_ID, int64
from rapidin_vdb.store.snapshot import Snapshot
from rapidin_vdb.store.table import SampleTable
from rapidin_vdb.store.telling import told
from rapidin_vdb.store.version import IDS_A_FILTER, batches

# Of more values than this, a wrong one is told from the right one by a few bits drawn at random, not by its number's.
_MOST_NUMBERED = 20_000
_DRAWN_BITS = 4


def indexed_columns(snapshot: Snapshot) -> list[str]:
    """Return the columns that have a scalar index.

    Raises:
        TableError: that cannot be read.
    """
    with told("the scalar indices cannot be listed"):
        return sorted(index.columns[0] for index in snapshot._table.list_indices())


def wrong_lookup(snapshot: Snapshot, column: str) -> str | None:
    """Return a filter that the index of a column answers otherwise than the column itself, or why it cannot answer.

    None where all are answered alike: every value is looked up, together with about half of the others for each bit of
    its number, so that a row which the index gives to another value is in an answer too many or too few. Of many values
    that other one goes unnoticed once in 16 times. Ranges and single values are sampled.

    Raises:
        TableError: the column cannot be read.
        PurgedError: the version is gone.
    """
    table = snapshot._select([ROW_ID, column], None)
    row_ids, values = int64(table[ROW_ID]), table[column].combine_chunks()
    known = values.dictionary_encode()
    if isinstance(known, pa.ChunkedArray):
        known = known.combine_chunks()
    codes = known.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    names = known.dictionary.to_pylist()
    for where, expected in _lookups(column, values, codes, names):
        wanted = np.sort(row_ids[expected])
        try:
            found = [int64(snapshot._select([ROW_ID], one, ours=True)[ROW_ID]) for one in where]
        except TableError as error:
            snapshot.check_kept()
            return f"a filter on {column} cannot be answered from it: {error}"
        if not np.array_equal(np.sort(np.concatenate([np.empty(0, np.int64), *found])), wanted):
            return f"a filter on {column} gives other rows with it than without"
    return None


def _lookups(
    column: str, values: pa.Array, codes: np.ndarray, names: list[Any]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield filters, several where one would be too long, and which rows they should let through together."""
    literals = [_literal(name) for name in names]
    if None in literals:
        return
    count = len(names)
    numbers = np.arange(1, count + 1)
    if count > _MOST_NUMBERED:
        # None of them zero: a value in no answer would not be looked up.
        numbers = np.random.default_rng(count).integers(1, 1 << _DRAWN_BITS, count)
    bits = math.ceil(math.log2(numbers.max(initial=0) + 1))
    for bit in range(bits):
        chosen = numbers >> bit & 1 == 1
        asked = [str(literal) for literal, taken in zip(literals, chosen, strict=True) if taken]
        wheres = [f"`{column}` IN ({', '.join(part)})" for part in batches(asked, IDS_A_FILTER)]
        # The last place stands for rows without a value, whose code is -1.
        yield wheres, np.append(chosen, False)[codes]
    yield [f"`{column}` IS NULL"], codes == -1
    order = sorted(range(count), key=lambda place: names[place])
    for share in (0.25, 0.5, 0.75) if count > 1 else ():
        place = order[int(share * count)]
        yield [f"`{column}` = {literals[place]}"], codes == place
        above = pc.greater_equal(values, pa.scalar(names[place], values.type)).fill_null(False)
        yield [f"`{column}` >= {literals[place]}"], above.to_numpy(zero_copy_only=False)


def _literal(value: object) -> str | None:
    """Return a value as SQL has it; None for one that is not exact there."""
    if isinstance(value, str):
        return listed([value])
    return str(value) if isinstance(value, int) else None


def make_scalar_index(table: SampleTable, column: str) -> None:
    """Make the scalar index of a column anew.

    Raises:
        TableError: it cannot be written.
    """
    with table.committing():
        make(table._table, column)
