"""How much of the exact answer a coarse search finds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rapidin_vdb.index.index import Ranked, ShardedIndex
from rapidin_vdb.index.shard import ScanShard

_QUERIES = 32
_TOP_K = 10


def measured_recall(index: ShardedIndex) -> dict[str, Any]:
    """Return the share of the exact top k that a coarse index finds at each end, for RapidGrads of its own as queries.

    `recall` is of the `at` best, `recall_harmful` of as many that are most negative. A sample is left out of its own
    answer, which it would lead. The queries are spread evenly over the samples: the gradients of generations, for which
    the index is built, are not at hand when it is.
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
    asked = [index.keys.sample_ids[int(number)] for number in chosen]
    ends = zip(index.search_both(queries, _TOP_K + 1), exact.search_both(queries, _TOP_K + 1), strict=True)
    best, lowest = (_share(asked, found, right) for found, right in ends)
    return {"at": _TOP_K, "queries": len(chosen), "recall": best, "recall_harmful": lowest}


def _share(asked: Sequence[str], found: Sequence[Ranked], right: Sequence[Ranked]) -> float:
    """Return the share of the right answers to some samples that is among what was found, each without itself."""
    hits = []
    for itself, got, ranked in zip(asked, found, right, strict=True):
        names = {sample_id for sample_id, _ in got}
        wanted = [sample_id for sample_id, _ in ranked if sample_id != itself][:_TOP_K]
        hits += [sample_id in names for sample_id in wanted]
    return sum(hits) / len(hits) if hits else 1.0
