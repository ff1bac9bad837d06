"""What lies in a table's folder that its newest version does not need."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any


def remove_versions(dataset: Any, *, unnamed: bool) -> None:
    """Remove all older versions and the files that only they name; with `unnamed`, those too that no version names."""
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=unnamed, error_if_tagged_old_versions=False)


def unnamed_files(dataset: Any, paths: Iterable[str]) -> list[str]:
    """Return those of some files, by path below the table's folder, that a version does not name.

    They are what writers that died have left: rows, scalar indices, and what a commit was to do. Where deleted rows
    stand, which says nothing of them, is passed over; and so is what we do not know.
    """
    fragments = dataset.get_fragments()
    rows = {file.path for fragment in fragments for file in fragment.data_files()}
    # Which of Lance's operations come to lie over rows, and where, may change: nothing here asks for one.
    overlaid = any(getattr(fragment.metadata, "overlays", None) for fragment in fragments)
    indices = {str(segment.uuid) for index in dataset.describe_indices() for segment in index.segments}
    made_by = dataset.read_transaction(dataset.version)
    found = []
    for path in paths:
        folder, _, name = path.partition("/")
        if (
            (folder == "data" and name not in rows and not overlaid)
            or (folder == "_indices" and name.split("/")[0] not in indices)
            or (folder == "_transactions" and (made_by is None or made_by.uuid not in name))
        ):
            found.append(path)
    return found
