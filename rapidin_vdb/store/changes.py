"""Rows deleted and replaced, each in one commit that is not tried again.

Lance would begin again by itself where another commit came between, on a version that nobody has looked at: under a
lock nothing comes between, and who has lost a lease must not go on.
"""

from typing import Any

from rapidin_vdb.store.place import Place


def delete_rows(place: Place, name: str, where: str) -> int:
    """Delete the rows of a table that a checked filter lets through, and return the version that made.

    Called while committing.
    """
    dataset = place.dataset(name)
    dataset.delete(where, conflict_retries=0)
    return int(dataset.version)


def put_rows(place: Place, name: str, key: str, rows: Any) -> int:
    """Put rows, an Arrow reader, in the place of those with the same keys, and return the version that made."""
    dataset = place.dataset(name)
    merge = dataset.merge_insert(key).when_matched_update_all().when_not_matched_insert_all()
    merge.conflict_retries(0).execute(rows)
    return int(dataset.version)
