"""LanceDB tables, their fingerprint, and the filters that may be put to them."""

from rapidin_vdb.store.cache import cache_limit, cached_indexes
from rapidin_vdb.store.meanwhile import Since
from rapidin_vdb.store.place import Place, size_of
from rapidin_vdb.store.rows import ColumnKind, Row, can_hold, merge_kinds, value_kind
from rapidin_vdb.store.scalar import indexed_columns, make_scalar_index, wrong_lookup
from rapidin_vdb.store.share import Share
from rapidin_vdb.store.snapshot import SAMPLES, Snapshot
from rapidin_vdb.store.table import SampleTable
from rapidin_vdb.store.telling import may_pass, undisturbed, undisturbed_each
from rapidin_vdb.store.tokens import TokenRows, TokenSnapshot, TokenTable, token_of
from rapidin_vdb.store.version import TableVersion

__all__ = [
    "SAMPLES",
    "ColumnKind",
    "Place",
    "Row",
    "SampleTable",
    "Share",
    "Since",
    "Snapshot",
    "TableVersion",
    "TokenRows",
    "TokenSnapshot",
    "TokenTable",
    "cache_limit",
    "cached_indexes",
    "can_hold",
    "indexed_columns",
    "make_scalar_index",
    "may_pass",
    "merge_kinds",
    "size_of",
    "token_of",
    "undisturbed",
    "undisturbed_each",
    "value_kind",
    "wrong_lookup",
]
