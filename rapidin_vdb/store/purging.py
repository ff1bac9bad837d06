"""Nothing of deleted or replaced rows is left in a table's files."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lancedb.index import Bitmap, BTree

from rapidin_vdb.errors import TableError

_PURGED = "rapidin_vdb.purged"


def purge_table(table: Any, place: str, name: str) -> None:
    """Write a table anew without what is gone, and remove its older versions; called while committing.

    Raises:
        TableError: some of them could not be removed.
    """
    import lance

    folder = str(Path(place, f"{name}.lance"))
    # Every fragment that lost a row, however large, is written anew without it.
    lance.dataset(folder).optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
    # Scalar indices hold values of rows that are gone.
    for index in table.list_indices():
        config = BTree() if index.columns[0] == "sample_id" else Bitmap()
        table.create_index(index.columns[0], config=config, replace=True)
    # The newest version says what made it, as a deletion's filter with its ids and texts: so it is made by this.
    lance.dataset(folder).update_metadata({_PURGED: datetime.now(UTC).isoformat()})
    lance.dataset(folder).cleanup_old_versions(
        older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
    )
    # Lance passes over files that it may not delete.
    if len(left := lance.dataset(folder).versions()) > 1:
        raise TableError(
            f"{len(left) - 1} older versions of the table {name} of {place} could not be deleted: "
            "permission denied, or others are writing; see to it, and run the purge again"
        )
