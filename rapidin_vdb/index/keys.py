"""Which samples an index holds: ids, and what tells whether the table still has a row as the index holds it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64

from rapidin_vdb.index.texts import Texts

Picked = Int64[np.ndarray, " picked"]


@dataclass(frozen=True, eq=False)
class Keys:
    """The rows of an index in the order of their numbers, those too that the table no longer has."""

    sample_ids: Texts
    """Their samples, or tokens."""
    row_ids: Int64[np.ndarray, " samples"]
    """The table's own names of its rows; a replaced row keeps its name."""
    versions: Int64[np.ndarray, " samples"]
    """The table's version in which a row came to be what it is."""
    alive: Bool[np.ndarray, " samples"]
    """Whether the table still has it."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @cached_property
    def count(self) -> int:
        """How many rows the table still has."""
        return int(self.alive.sum())

    @cached_property
    def numbers(self) -> Picked:
        """The numbers of the rows that the table still has, ascending."""
        return np.flatnonzero(self.alive)

    @cached_property
    def _by_row_id(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.row_ids[self.numbers], kind="stable")
        return self.row_ids[self.numbers][order], self.numbers[order]

    def numbers_of(self, row_ids: Int64[np.ndarray, " wanted"]) -> Picked:
        """Return the numbers of rows, ascending; those that the index does not hold are passed over."""
        known, numbers = self._by_row_id
        if not len(known):
            return np.empty(0, np.int64)
        places = np.minimum(np.searchsorted(known, row_ids), len(known) - 1)
        return np.unique(numbers[places[known[places] == row_ids]])

    def difference(
        self, row_ids: Int64[np.ndarray, " samples"], versions: Int64[np.ndarray, " samples"]
    ) -> tuple["Keys", Int64[np.ndarray, " missing"]]:
        """Return these keys as a version of the table has them, and the row ids that it has beyond them.

        The version's rows are given by row id and the version in which each came to be what it is. A row that went
        away and is back, as in an older version, is alive again.
        """
        # A row is the same one only with the same version.
        base = 1 + max(self.versions.max(initial=0), versions.max(initial=0))
        mine, theirs = self.row_ids * base + self.versions, row_ids * base + versions
        return replace(self, alive=np.isin(mine, theirs)), np.sort(row_ids[~np.isin(theirs, mine)])


def joined(parts: Sequence[Keys]) -> Keys:
    """Return the keys of some rows and then of others."""
    nothing = np.empty(0, np.int64)
    return Keys(
        Texts.joined(part.sample_ids for part in parts),
        np.concatenate([nothing, *(part.row_ids for part in parts)]),
        np.concatenate([nothing, *(part.versions for part in parts)]),
        np.concatenate([np.empty(0, bool), *(part.alive for part in parts)]),
    )
