"""Scalar indices, by which filters look values up: made where they are missing, or anew."""

from collections.abc import Callable
from typing import Any

from lancedb.index import Bitmap, BTree

# A bitmap keeps the rows of each value together, which suits few values; ids are all different.
_KINDS = {"split": Bitmap, "source": Bitmap, "sample_id": BTree}


def make_missing(opened: Callable[[], Any]) -> None:
    """Make the scalar indices that are missing, or lack many rows; called while committing.

    The table is opened anew for each, which shows that the lock is still ours.
    """
    there = {index.columns[0]: index for index in opened().list_indices()}
    for column in _KINDS:
        found = there.get(column)
        # Rows that came later are looked at one by one, which is cheap for few.
        if found is None or 4 * found.num_unindexed_rows > found.num_indexed_rows:
            make(opened(), column)


def make_anew(table: Any) -> None:
    """Make all scalar indices anew; called while committing."""
    for index in table.list_indices():
        make(table, index.columns[0])


def make(table: Any, column: str) -> None:
    """Make the scalar index of a column, in the place of what is there; called while committing."""
    table.create_index(column, config=_KINDS.get(column, Bitmap)(), replace=True)
