"""The one place that imports FAISS, which faiss-cpu and faiss-gpu provide under the same name."""

from typing import Any

from rapidin_vdb.errors import SpecError


def faiss() -> Any:
    """Return the module.

    Raises:
        SpecError: it is not installed.
    """
    try:
        import faiss as module
    except ImportError as error:
        raise SpecError(
            f"FAISS cannot be imported ({error}). On a machine without an NVIDIA GPU: pip install 'rapidin-vdb[cpu]', "
            "with one, and an x86-64: pip install 'rapidin-vdb[gpu]' (not both: they provide the same module)"
        ) from error
    return module


def gpu_count() -> int:
    """Return how many GPUs this FAISS can use; 0 for faiss-cpu."""
    module = faiss()
    return int(module.get_num_gpus()) if hasattr(module, "StandardGpuResources") else 0
