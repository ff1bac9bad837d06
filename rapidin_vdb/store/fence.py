"""A version of a table on which nothing that was begun earlier can be committed, and which changes nothing.

Lance lets nothing pass a restore of a version, and has no other operation that stops all others. But a restore passes
everything: what a former writer commits after we looked, and before ours is there, would be undone. So it is restored
in its turn, which is final, for after the first restore nobody's commit can be on its way any more.

Nobody's but another restore. Who takes over may stand still itself between its last look at the lease and its restore,
while another takes over from it, writes and is done: then its restore comes late, and undoes that. Such a fence is half
done: it has not restored what was there before it. Fences are marked, so that it can be told, and everybody who holds
the lease looks whether what it is about to change is one, and restores what was there before all fences. One that comes
later still lets the change fail. So nobody ever writes on top of it, whether whoever was late goes on or is killed; and
readers read what was there before.
"""

from collections.abc import Callable
from typing import Any

_MARK = "rapidin_vdb.fence"


def fence(uri: str, options: dict[str, str], *, kept: Callable[[int], bool], holding: Callable[[], bool]) -> bool:
    """Commit such a version of a Lance table, and return whether it is whole.

    `kept` says whether an older version is still there. `holding` says whether the lease is still ours: where it is
    not, this stops, and leaves to others what is not whole.
    """
    import lance

    try:
        newest = lance.dataset(uri, storage_options=options)
        wanted, restored = before_fences(newest, kept), 0
        while restored != wanted:
            if not holding():
                return False
            made = lance.Transaction(
                newest.version, lance.LanceOperation.Restore(wanted), transaction_properties={_MARK: ""}
            )
            newest = lance.LanceDataset.commit(uri, made, storage_options=options)
            wanted, restored = before_fences(newest, kept), wanted
    except (ValueError, RuntimeError, OSError):
        if holding():
            raise
        return False  # others have gone on, and may have purged what was to be restored
    return True


def is_half_done(dataset: Any, *, kept: Callable[[int], bool]) -> bool:
    """Say whether a version of a Lance table is a fence that has not restored what was there before it."""
    made_by = dataset.read_transaction(int(dataset.version))
    return is_fence(made_by) and made_by.operation.version != before_fences(dataset, kept)


def before_fences(dataset: Any, kept: Callable[[int], bool]) -> int:
    """Return the newest version that is no fence; or the oldest that is kept, which a fence then stands for."""
    version = int(dataset.version)
    while is_fence(dataset.read_transaction(version)) and kept(version - 1):
        version -= 1
    return version


def is_fence(made_by: Any) -> bool:
    """Say whether a transaction of Lance made such a version."""
    return made_by is not None and _MARK in (made_by.transaction_properties or {})
