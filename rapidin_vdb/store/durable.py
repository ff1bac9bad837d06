"""A folder's commits outlive a loss of power: their files are on the disk before anyone is told that they are."""

import os
import threading
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from rapidin_vdb.locks import NamedLock


class DurableLock(NamedLock):
    """A lock whose outermost holder leaves all files that came into a folder's tables on the disk.

    Lance leaves that to the system, which takes its time: a table's newest version may be there after a loss of power,
    and what it consists of not.
    """

    def __init__(self, lock: FileLock, what: str, folder: Path) -> None:
        super().__init__(lock, what)
        self._folder = folder
        self._before = threading.local()

    def __enter__(self) -> "DurableLock":
        """Wait for it."""
        super().__enter__()
        try:
            if self._lock.lock_counter == 1:
                self._before.files = _files(self._folder)
        except BaseException:
            # Without an `__enter__` that ends well there is no `__exit__`.
            super().__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of it, once all is on the disk."""
        try:
            if self._lock.lock_counter == 1:
                # Also where something failed: of several commits some may have been made.
                before = self._before.files
                _sync(self._folder, _files(self._folder) - before, before)
        finally:
            super().__exit__(*error)


def _files(folder: Path) -> set[str]:
    """Return the paths of all files of the tables in a folder."""
    return {
        f"{place}/{name}" for table in folder.glob("*.lance") for place, _, names in os.walk(table) for name in names
    }


def _sync(folder: Path, files: set[str], before: set[str]) -> None:
    """Have files, which were not there before, and the entries of the folders they are in, on the disk."""
    known = {Path(file).parent for file in before}
    folders = {Path(file).parent for file in files}
    for new in folders - known:
        # Its own entry, and that of what it is in.
        folders |= {parent for parent in new.parents if parent.is_relative_to(folder)} | {folder.absolute().parent}
    # From the innermost on, so that no entry is there before what it stands for.
    innermost = sorted(folders, key=lambda path: len(path.absolute().parts), reverse=True)
    for path in [*map(Path, sorted(files)), *innermost]:
        # What has been removed again needs not be there.
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
