"""Shuffle, flip, fold: a gradient becomes a RapidGrad (paper, section 3.2 and Algorithm 1)."""

from rapidin_vdb.sketch.bucket_map import BucketMap
from rapidin_vdb.sketch.lanes import BatchLanes
from rapidin_vdb.sketch.shuffle import ShuffleStep, draw_shuffle, padded_length
from rapidin_vdb.sketch.sketch import Sketch, fold, map_bytes

__all__ = [
    "BatchLanes", "BucketMap", "ShuffleStep", "Sketch", "draw_shuffle", "fold", "map_bytes",
    "padded_length",
]  # fmt: skip
