"""Row ids: Lance's own names of rows, which stay while rows are replaced and files are put together."""

import numpy as np
import pyarrow as pa

ROW_ID = "_rowid"


def among(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Say which row ids are among some that ascend."""
    places = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
    return wanted[places] == found


def ascending(rows: pa.Table) -> pa.Table:
    """Return rows by row id; they come as they lie, and a row that was replaced lies behind others."""
    row_ids = int64(rows[ROW_ID])
    return rows if (row_ids[1:] > row_ids[:-1]).all() else rows.take(np.argsort(row_ids))


def int64(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return a column of whole numbers."""
    return column.to_numpy().astype(np.int64)
