"""A version of a table on which nothing that was begun earlier can be committed, and which changes nothing.

Lance lets nothing pass a restore of a version, and has no other operation that stops all others. But a restore passes
everything: what a former writer commits after we looked, and before ours is there, would be undone. So it is restored
in its turn, which is final, for after the first restore nobody's commit can be on its way any more.

Fences are marked. Who dies between the two has not let go of the lease: whoever takes it next restores what was there
before all fences, and not what the last of them left. Who stood still in the middle of it, while another took over and
was done, goes on without the lease: so whoever takes one that was let go of looks whether the last version is the first
of two.
"""

from collections.abc import Callable
from typing import Any

_MARK = "rapidin_vdb.fence"


def fence(uri: str, options: dict[str, str], *, kept: Callable[[int], bool]) -> None:
    """Commit such a version of a Lance table; `kept` says whether an older version is still there."""
    import lance

    newest = lance.dataset(uri, storage_options=options)
    wanted, restored = _before_fences(newest, kept), 0
    # More than twice only where whoever fences stood still itself, and others went on without it.
    while restored != wanted:
        made = lance.Transaction(
            newest.version, lance.LanceOperation.Restore(wanted), transaction_properties={_MARK: ""}
        )
        newest = lance.LanceDataset.commit(uri, made, storage_options=options)
        wanted, restored = _before_fences(newest, kept), wanted


def is_half_done(uri: str, options: dict[str, str], *, kept: Callable[[int], bool]) -> bool:
    """Say whether the newest version of a Lance table is a fence that has not restored what was there before it."""
    import lance

    newest = lance.dataset(uri, storage_options=options)
    made_by = newest.read_transaction(int(newest.version))
    return _is_fence(made_by) and made_by.operation.version != _before_fences(newest, kept)


def _before_fences(dataset: Any, kept: Callable[[int], bool]) -> int:
    """Return the newest version that is no fence; or the oldest that is kept, which a fence then stands for."""
    version = int(dataset.version)
    while _is_fence(dataset.read_transaction(version)) and kept(version - 1):
        version -= 1
    return version


def _is_fence(made_by: Any) -> bool:
    return made_by is not None and _MARK in (made_by.transaction_properties or {})
