"""rapidin-vdb: which training samples, and which words in them, made a fine-tuned language model say this?"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Handed out lazily: `rapidin-vdb --help` must load none of torch, faiss, lancedb.
_HOMES = {
    "Database": "rapidin_vdb.database",
    "init": "rapidin_vdb.creation",
    "open": "rapidin_vdb.creation",
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
