"""How much of the exact answer a coarse search finds."""

from dataclasses import replace
from typing import Any

import numpy as np

from rapidin_vdb.index.index import ShardedIndex
from rapidin_vdb.index.shard import ScanShard

_QUERIES = 32
_TOP_K = 10


def measured_recall(index: ShardedIndex) -> dict[str, Any]:
    """Return the share of the exact top k that a coarse index finds, for RapidGrads of its own as queries.

    A sample is left out of its own answer, which it would lead. The queries are spread evenly over the samples: the
    gradients of generations, for which the index is built, are not at hand when it is.
    """
    assert index.full is not None
    exact = replace(
        index,
        recipe=replace(index.recipe, coarse_width=0),
        shards=(ScanShard(index.full, width=index.width),),
        numbers=(np.arange(len(index.keys)),),
        full=None,
    )
    alive = index.keys.numbers
    chosen = np.unique(alive[np.linspace(0, len(alive) - 1, min(_QUERIES, len(alive))).astype(np.int64)])
    queries = index.full.take(chosen).view(np.float16).astype(np.float32)
    found, missed = 0, 0
    for number, approximate, right in zip(
        chosen, index.search(queries, _TOP_K + 1), exact.search(queries, _TOP_K + 1), strict=True
    ):
        itself = index.keys.sample_ids[int(number)]
        wanted = [sample_id for sample_id, _ in right if sample_id != itself][:_TOP_K]
        got = {sample_id for sample_id, _ in approximate}
        found += sum(sample_id in got for sample_id in wanted)
        missed += sum(sample_id not in got for sample_id in wanted)
    return {"at": _TOP_K, "queries": len(chosen), "recall": found / (found + missed) if found + missed else 1.0}
