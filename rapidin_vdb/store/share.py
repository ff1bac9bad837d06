"""A share of one version of a table: some of its rows, for one of several machines that hold it together."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from rapidin_vdb.store.version import TableVersion, VectorBatch

# Neighbouring rows lie together in the table, and are read together.
_RUN = 16
# With more parts than these, rows are taken one by one; with fewer, it is faster to pass over those of others.
_SCANNED = 4


class Share(TableVersion):
    """The rows of a version whose ids fall to one of several parts; a row stays in its part for good."""

    def __init__(self, whole: TableVersion, part: int, parts: int) -> None:
        """Take a share; nothing is read yet."""
        self._whole, self._part, self._parts = whole, part, parts
        self._place, self.name, self.version = whole.place, whole.name, whole.version
        self.schema, self.width = whole.schema, whole.width

    def digest_of(self, version: int) -> str | None:
        """Return the digest of another version of this table; None where it is no longer kept."""
        return self._whole.digest_of(version)

    def rows(self) -> int:
        """Return how many rows fall to this part."""
        return len(self.row_keys()[0])

    def row_keys(self) -> tuple[Int64[np.ndarray, " samples"], Int64[np.ndarray, " samples"]]:
        """Return the row id of every row of this part, and the version in which it came to be what it is."""
        row_ids, versions = self._whole.row_keys()
        mine = self._mine(row_ids)
        return row_ids[mine], versions[mine]

    def keys_in_order(self) -> tuple[list[str], Int64[np.ndarray, " samples"], Int64[np.ndarray, " samples"]]:
        """Return key, row id and version of every row of this part, in the order of `vectors`."""
        keys, row_ids, versions = self._whole.keys_in_order()
        mine = np.flatnonzero(self._mine(row_ids))
        if self._parts > _SCANNED:
            # A row that was replaced lies behind others in the table, and has kept its id.
            mine = mine[np.argsort(row_ids[mine])]
        return [keys[number] for number in mine], row_ids[mine], versions[mine]

    def vectors(self, row_ids: Int64[np.ndarray, " wanted"] | None = None) -> Iterator[VectorBatch]:
        """Yield the RapidGrads of this part, or of some rows of it."""
        if row_ids is not None:
            yield from self._whole.vectors(row_ids)
        elif self._parts > _SCANNED:
            yield from self._whole.taken(np.sort(self.row_keys()[0]))
        else:
            yield from self._whole.scanned(self._mine)

    def _mine(self, row_ids: np.ndarray) -> np.ndarray:
        return row_ids // _RUN % self._parts == self._part
