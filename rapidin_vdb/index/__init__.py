"""Exact top-k by inner product over shards, on CPUs or GPUs."""

from rapidin_vdb.index.coarse import looked_at, narrowed
from rapidin_vdb.index.index import Batch, Ranked, ShardedIndex, check_top_k, empty_index
from rapidin_vdb.index.keys import Keys, joined
from rapidin_vdb.index.loading import check_index, load_index, load_keys, verify_rows
from rapidin_vdb.index.making import make_shard
from rapidin_vdb.index.manifest import (
    MANIFEST,
    Held,
    Manifest,
    index_folders,
    list_manifests,
    manifest_of,
    readable_manifest,
)
from rapidin_vdb.index.recall import measured_recall
from rapidin_vdb.index.searchable import Searchable
from rapidin_vdb.index.source import TableSource
from rapidin_vdb.index.surveying import End, Grouping, Survey, survey
from rapidin_vdb.index.texts import Texts
from rapidin_vdb.index.writing import clear_index, extend_index, with_recall, write_index

__all__ = [
    "MANIFEST",
    "Batch",
    "End",
    "Grouping",
    "Held",
    "Keys",
    "Manifest",
    "Ranked",
    "Searchable",
    "ShardedIndex",
    "Survey",
    "TableSource",
    "Texts",
    "check_index",
    "check_top_k",
    "clear_index",
    "empty_index",
    "extend_index",
    "index_folders",
    "joined",
    "list_manifests",
    "load_index",
    "load_keys",
    "looked_at",
    "make_shard",
    "manifest_of",
    "measured_recall",
    "narrowed",
    "readable_manifest",
    "survey",
    "verify_rows",
    "with_recall",
    "write_index",
]
