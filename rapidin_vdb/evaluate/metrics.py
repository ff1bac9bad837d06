"""How good a ranking is: the paper's auPRC and auROC, average precision, agreement with exact scores, and intervals."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

Scores = Float64[np.ndarray, "queries samples"]


def ends_auprc(scores: Float64[np.ndarray, " samples"], positive: Bool[np.ndarray, " samples"], k: int) -> float:
    """Return the area under the precision-recall curve over the k highest and the k lowest samples (section 4.5).

    The area is the average precision; 0 where none of them is positive. Ties go by place.
    """
    from sklearn.metrics import average_precision_score

    chosen = _ends(scores, k)
    return float(average_precision_score(positive[chosen], scores[chosen])) if positive[chosen].any() else 0.0


def ends_auroc(scores: Float64[np.ndarray, " samples"], positive: Bool[np.ndarray, " samples"], k: int) -> float:
    """Return the area under the ROC curve over the same samples; NaN where all of them are of one kind: it has none."""
    from sklearn.metrics import roc_auc_score

    chosen = _ends(scores, k)
    labels = positive[chosen]
    return float(roc_auc_score(labels, scores[chosen])) if labels.any() and not labels.all() else math.nan


def _ends(scores: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-scores, kind="stable")
    k = min(k, len(order) // 2)
    return np.concatenate([order[:k], order[len(order) - k :]])


def precision_at(scores: Float64[np.ndarray, " samples"], positive: Bool[np.ndarray, " samples"], k: int) -> float:
    """Return the share of positives among the k highest; its mean over generations is the paper's AP (4.6)."""
    return float(positive[np.argsort(-scores, kind="stable")[:k]].mean())


def lowest_at(scores: Float64[np.ndarray, " samples"], positive: Bool[np.ndarray, " samples"], k: int) -> float:
    """Return the share of positives among the k lowest."""
    order = np.argsort(-scores, kind="stable")
    return float(positive[order[max(len(order) - k, 0) :]].mean())


def average_precision_at(
    scores: Float64[np.ndarray, " samples"], positive: Bool[np.ndarray, " samples"], k: int
) -> float:
    """Return the average precision at k: precision at each positive among the k highest, over as many as could be.

    >>> average_precision_at(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]), 2)
    0.5
    """
    found = positive[np.argsort(-scores, kind="stable")[:k]]
    possible = min(k, int(positive.sum()))
    precisions = np.cumsum(found) / np.arange(1, len(found) + 1)
    return float((precisions * found).sum() / possible) if possible else 0.0


def precision_at_recalls(
    scores: Float64[np.ndarray, " samples"], positive: Bool[np.ndarray, " samples"], recalls: Sequence[float]
) -> list[float]:
    """Return the best precision with which each share of all positives is found."""
    found = np.cumsum(positive[np.argsort(-scores, kind="stable")])
    precision = found / np.arange(1, len(found) + 1)
    # The best that any cut at this recall or beyond reaches.
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return [float(best[np.searchsorted(found, max(1, round(recall * found[-1])))]) for recall in recalls]


def found_first(scores: Scores, count: int, *, both: bool = True) -> Int64[np.ndarray, " count"]:
    """Return which samples have the largest score for any of the generations, largest first, as `Database.pool` does.

    Of `both` ends, for samples that say a fault in other words than a generation may be among its lowest: by absolute
    score; else by the highest alone. Ties go by place.

    >>> found_first(np.array([[9.0, 1.0, 2.0, 3.0], [5.0, -6.0, 2.0, 7.5]]), 3).tolist()
    [0, 3, 1]
    """
    strength = (np.abs(scores) if both else scores).max(0)
    return np.argsort(-strength, kind="stable")[:count]


def found_by_some(
    scores: Scores, positive: Bool[np.ndarray, " samples"], k: int, generations: int, *, seed: int, both: bool,
    groups: Sequence[str], draws: int = 200,
) -> tuple[float, float, float]:  # fmt: skip
    """Return the share of positives among the `k` samples that so many generations find first, of different groups.

    The mean over draws of the generations, and between which values 95 % of the draws lie; of all groups, one number.
    """
    members = [np.flatnonzero(np.asarray(groups) == group) for group in dict.fromkeys(groups)]
    if generations >= len(members):
        share = float(positive[found_first(scores, k, both=both)].mean())
        return share, share, share
    draw, shares = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = draw.choice(len(members), generations, replace=False)
        rows = [int(draw.choice(members[number])) for number in chosen]
        shares.append(positive[found_first(scores[rows], k, both=both)].mean())
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(np.mean(shares)), float(low), float(high)


def agreement(
    scores: Scores, exact: Scores, *, seed: int, top: int = 100, groups: Sequence[str] | None = None
) -> dict[str, tuple[float, float, float] | None]:
    """Return how scores agree with exact ones: means over the queries, with their intervals; see `interval`.

    Pearson's and Spearman's correlation over all samples, the share of the `top` that is common, the share of the exact
    `top` that is among four times as many (what exact scores of these would bring to the top again), and nDCG at `top`
    with the exact scores above zero as gains.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import ndcg_score

    rows = []
    for one, other in zip(scores, exact, strict=True):
        ours, theirs = (np.argsort(-side, kind="stable") for side in (one, other))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant scores, whose correlation is none
            rows.append(
                (
                    pearsonr(one, other).statistic,
                    spearmanr(one, other).statistic,
                    np.isin(theirs[:top], ours[:top]).mean(),
                    np.isin(theirs[:top], ours[: 4 * top]).mean(),
                    ndcg_score(np.maximum(other, 0)[None], one[None], k=top),
                )
            )
    names = ("pearson", "spearman", f"overlap_{top}", f"top_{top}_in_{4 * top}", f"ndcg_{top}")
    return {
        name: interval_of_defined(column, seed=seed, groups=groups)[0]
        for name, column in zip(names, np.array(rows).T.tolist(), strict=True)
    }


def correlation(scores: Scores, others: Scores) -> float | None:
    """Return Spearman's correlation over all samples, the mean over the queries; None where one has none."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant scores, whose correlation is none
        found = float(np.mean([spearmanr(one, other).statistic for one, other in zip(scores, others, strict=True)]))
    return None if math.isnan(found) else found


def interval_of_defined(
    values: Sequence[float], *, seed: int, groups: Sequence[str] | None = None
) -> tuple[tuple[float, float, float] | None, int]:
    """Return the interval over those generations for which a measure is no NaN, and how many these are.

    >>> interval_of_defined([math.nan, math.nan], seed=1)
    (None, 0)
    """
    defined = [number for number, value in enumerate(values) if not math.isnan(value)]
    mine = None if groups is None else [groups[number] for number in defined]
    found = interval([values[number] for number in defined], seed=seed, groups=mine) if defined else None
    return found, len(defined)


def interval(
    values: Sequence[float], *, seed: int, draws: int = 2000, groups: Sequence[str] | None = None
) -> tuple[float, float, float]:
    """Return the mean over generations, and its 95 % bootstrap interval.

    Generations of one of the `groups`, such as answers to one question, are no independent ones: groups are drawn then.
    """
    found = np.asarray(values, float)
    draw = np.random.default_rng(seed)
    mine = np.arange(len(found)) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    sums, counts = np.bincount(mine, found), np.bincount(mine)
    drawn = draw.integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(found.mean()), float(low), float(high)
