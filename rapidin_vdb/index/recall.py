"""How much of the exact answer a coarse search finds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rapidin_vdb.index.coarse import FEWEST, looked_at
from rapidin_vdb.index.index import Ranked, ShardedIndex
from rapidin_vdb.index.shard import ScanShard

_QUERIES = 32
# Of fewer results as many are looked at, and so of these no smaller share is found.
_TOP_K = FEWEST


def measured_recall(index: ShardedIndex) -> dict[str, Any]:
    """Return the share of the exact top k that a coarse index finds at each end, for RapidGrads of its own as queries.

    `recall` is of the `at` best, `recall_harmful` of as many that are most negative. A sample is left out of its own
    answer, which it would lead, and of its candidates: of others there are as many as a question for `at` results has.
    The queries, at most 32, are spread evenly over the samples: the gradients of generations, for which the index is
    built, are not at hand when it is. Of so few the share is known to some per cent, no better.
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
    right = exact.search_both(queries, _TOP_K + 1)
    best, lowest = (
        _share(asked, found, end) for found, end in zip(_found_beside(index, queries, chosen), right, strict=True)
    )
    return {"at": _TOP_K, "queries": len(chosen), "recall": best, "recall_harmful": lowest}


def _found_beside(index: ShardedIndex, queries: np.ndarray, itself: np.ndarray) -> list[list[Ranked]]:
    """Return what a coarse search finds at each end, were the row that each query is, by number, not in the index."""
    rows, found = index.rows_among(None), []
    wanted = min(index.samples, looked_at(index.recipe.refine, _TOP_K) + 1)
    ends = index.candidates(queries, wanted, rows, both=True)
    for sign, (scores, numbers) in zip((1, -1), ends, strict=True):
        # Where it is not among them, the last of them is one too many.
        others = np.argsort(numbers == itself[:, None], axis=1, kind="stable")[:, : wanted - 1]
        beside = np.take_along_axis(scores, others, 1), np.take_along_axis(numbers, others, 1)
        found.append(index.settled(np.float32(sign) * queries, beside, _TOP_K, rows))
    return found


def _share(asked: Sequence[str], found: Sequence[Ranked], right: Sequence[Ranked]) -> float:
    """Return the share of the right answers to some samples, each without itself, that is among what was found."""
    hits = []
    for itself, got, ranked in zip(asked, found, right, strict=True):
        names = {sample_id for sample_id, _ in got}
        wanted = [sample_id for sample_id, _ in ranked if sample_id != itself][:_TOP_K]
        hits += [sample_id in names for sample_id in wanted]
    return sum(hits) / len(hits) if hits else 1.0
