"""Where `free_bytes` of `machine` is looked for by `table_index`."""

from rapidin_vdb.machine import free_bytes

__all__ = ["free_bytes"]
