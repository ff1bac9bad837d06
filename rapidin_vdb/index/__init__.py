"""Exact top-k by inner product over FAISS shards, on CPUs or GPUs."""

from rapidin_vdb.index.files import Manifest, list_manifests, load_index, save_index
from rapidin_vdb.index.index import ShardedIndex, build_index

__all__ = ["Manifest", "ShardedIndex", "build_index", "list_manifests", "load_index", "save_index"]
