"""rapidin-vdb: which training samples, and which words in them, made a fine-tuned language model say this?"""

import os
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Threads of torch's that have nothing to do would go on asking for work for many milliseconds after each operation, and
# take that time from our own loops, which come between. Asleep at once, they would be late for the next operation; with
# GCC's OpenMP, torch's on Linux, they ask for some tenths of a millisecond. Read once, when torch is loaded.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Handed out lazily: `rapidin-vdb --help` must load none of torch, faiss, lancedb.
_HOMES = {
    "Database": "rapidin_vdb.database",
    "init": "rapidin_vdb.creation",
    "query_from": "rapidin_vdb.query",
    "open": "rapidin_vdb.creation",
    "Comparison": "rapidin_vdb.results",
    "Pool": "rapidin_vdb.results",
    "PooledSample": "rapidin_vdb.results",
    "Ranking": "rapidin_vdb.results",
    "RankedSample": "rapidin_vdb.results",
    "RankedToken": "rapidin_vdb.results",
    "SketchSpec": "rapidin_vdb.records",
    "RapidInError": "rapidin_vdb.errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rapidin_vdb' has no attribute {name!r}")
