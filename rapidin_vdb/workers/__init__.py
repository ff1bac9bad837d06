"""Batches shared among worker processes, each with the model, on several devices or on the cores of one machine."""

from rapidin_vdb.workers.sharing import compute_in_workers, road_of_workers
from rapidin_vdb.workers.threads import speedup, threads_each

__all__ = ["compute_in_workers", "road_of_workers", "speedup", "threads_each"]
