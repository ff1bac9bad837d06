"""Exact top-k by inner product over shards, on CPUs or GPUs."""

from rapidin_vdb.index.index import Batch, Ranked, ShardedIndex, empty_index, make_shard
from rapidin_vdb.index.keys import Keys, joined
from rapidin_vdb.index.loading import check_index, load_index, load_keys, verify_rows
from rapidin_vdb.index.manifest import Held, Manifest, list_manifests
from rapidin_vdb.index.recall import measured_recall
from rapidin_vdb.index.searchable import Searchable
from rapidin_vdb.index.source import TableSource
from rapidin_vdb.index.writing import extend_index, with_recall, write_index

__all__ = [
    "Batch",
    "Held",
    "Keys",
    "Manifest",
    "Ranked",
    "Searchable",
    "ShardedIndex",
    "TableSource",
    "check_index",
    "empty_index",
    "extend_index",
    "joined",
    "list_manifests",
    "load_index",
    "load_keys",
    "make_shard",
    "measured_recall",
    "verify_rows",
    "with_recall",
    "write_index",
]
