"""What a process compiles at its first sketch and search, which those that are forked from it need not do again."""

import numpy as np
import torch

from rapidin_vdb.index.half import exact_inner_products, inner_products
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch import Sketch
from rapidin_vdb.sketch.lanes import BatchLanes

torch.set_num_threads(1)  # threads do not survive a fork
_sketch = Sketch(SketchSpec(width=64, shuffles=20), [24, 256])
for _samples in (1, 8):
    _rapidgrads = torch.zeros(_samples, 64)
    _lanes = BatchLanes(_rapidgrads)
    for _number, _length in enumerate((24, 256)):
        _of = _lanes.of(0, _samples) if _length == 24 else ()
        _sketch.add_batch(_rapidgrads, _number, torch.ones(_samples, _length), normalize=True, lanes=_of)
    _lanes.give()
for _queries in (1, 4):
    inner_products(np.zeros((4, 64), np.uint16), np.zeros((_queries, 64), np.float32))
exact_inner_products(np.zeros((4, 64), np.uint16), np.zeros(64))
