"""LanceDB tables, their fingerprint, and the filters that may be put to them."""

from rapidin_vdb.store.fingerprint import check_fingerprint
from rapidin_vdb.store.rows import ColumnKind, Row, merge_kinds
from rapidin_vdb.store.snapshot import TABLE, Snapshot
from rapidin_vdb.store.table import SampleTable

__all__ = ["TABLE", "ColumnKind", "Row", "SampleTable", "Snapshot", "check_fingerprint", "merge_kinds"]
