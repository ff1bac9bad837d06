"""One shard: a FAISS flat inner-product index over a run of rows, on one device."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from rapidin_vdb.index.library import faiss, gpu_count
from rapidin_vdb.recipe import ElementType

# A float32 sum of `width` products errs by a random walk of width / 16 steps in each of FAISS's lanes: measured, up to
# 5e-6 of the product of the norms at width 65536, where this bound is 1.2e-4. A GPU also rounds the query to half
# precision.
_SUM_ROUNDING = 8 * 2.0**-24
_HALF_ROUNDING = 2.0**-11


class Shard:
    """A run of rows, searched on one device."""

    def __init__(self, device: str, *, width: int, element_type: ElementType) -> None:
        """Make an empty shard; a GPU that is not there is replaced by the CPU."""
        module = faiss()
        self.element_type = element_type
        self.gpu = int(device.removeprefix("cuda:")) if device.startswith("cuda:") else None
        if self.gpu is not None and self.gpu >= gpu_count():
            self.gpu = None
        self.index: Any
        self._resources: Any = None
        if self.gpu is not None:
            self._resources = module.StandardGpuResources()
            config = module.GpuIndexFlatConfig()
            config.device = self.gpu
            config.useFloat16 = element_type == "float16"
            self.index = module.GpuIndexFlatIP(self._resources, width, config)
        elif element_type == "float16":
            self.index = module.IndexScalarQuantizer(width, module.ScalarQuantizer.QT_fp16, module.METRIC_INNER_PRODUCT)
        else:
            self.index = module.IndexFlatIP(width)

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return int(self.index.ntotal)

    @property
    def rounding(self) -> float:
        """Bound of a score's rounding error, relative to the product of the two norms."""
        rounding = _SUM_ROUNDING * math.sqrt(self.index.d)
        return rounding if self.gpu is None or self.element_type == "float32" else rounding + _HALF_ROUNDING

    def add(self, vectors: np.ndarray) -> None:
        """Append rows, float16 [samples, width]."""
        if self.gpu is None and self.element_type == "float16":
            # The codes of the scalar quantizer are the half-precision bytes themselves: ten times faster than `add`.
            self.index.add_sa_codes(np.ascontiguousarray(vectors).view(np.uint8))
        else:
            self.index.add(vectors.astype(np.float32))

    def search(
        self, queries: Float32[np.ndarray, "queries sketch"], top_k: int, rows: Int64[np.ndarray, " samples"] | None
    ) -> tuple[Float32[np.ndarray, "queries top_k"], Int64[np.ndarray, "queries top_k"]]:
        """Return scores and row numbers of the best rows, among `rows` where given; missing ones are -1."""
        if rows is None:
            return self.index.search(queries, min(top_k, self.rows))
        module = faiss()
        if self.gpu is not None:
            # FAISS's flat GPU index knows no selectors: search a copy of the rows asked for.
            part = module.IndexFlatIP(self.index.d)
            part.add(self.vectors(rows))
            scores, places = part.search(queries, min(top_k, len(rows)))
            return scores, np.where(places >= 0, rows[places], -1)
        selector = module.IDSelectorBatch(rows)
        return self.index.search(queries, min(top_k, len(rows)), params=module.SearchParameters(sel=selector))

    def vectors(self, rows: Int64[np.ndarray, " samples"]) -> Float32[np.ndarray, "samples sketch"]:
        """Return the vectors of some rows."""
        return self.index.reconstruct_batch(rows)
