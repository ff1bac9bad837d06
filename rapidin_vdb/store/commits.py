"""What made a version of the table, in a word: Lance keeps in each what its commit did."""

from typing import Any

from rapidin_vdb.store.fence import is_fence
from rapidin_vdb.store.purging import PURGED

_WORDS = {
    "Append": "ingest",
    "Update": "replace",
    "Delete": "delete",
    "CreateIndex": "scalar index",
    "Rewrite": "compaction",
    "Merge": "columns",
    "Project": "columns",
}


def word_for(made_by: Any) -> str:
    """Return what a transaction of Lance did to the table of samples; nothing where we know no word for it."""
    if made_by is None:
        return ""
    if PURGED in (made_by.transaction_properties or {}):
        return "purge"
    return "fence" if is_fence(made_by) else _WORDS.get(type(made_by.operation).__name__, "")
