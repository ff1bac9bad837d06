"""The experiments' measures against independent ones, and at their edges."""

import math

import numpy as np
import pytest
from scipy import stats

from rapidin_vdb.evaluate import metrics

DESCENDING = np.array([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])


def marks(text: str) -> np.ndarray:
    """Which samples are positive: those of a 1."""
    return np.array([mark == "1" for mark in text])


# Intervals


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_an_interval_is_the_bootstraps(kind):
    """Beside scipy's bootstrap, and beside 1.96 standard errors: within 5 % of its half."""
    draw = np.random.default_rng(3)
    values = draw.normal(3, 2, 200) if kind == "normal" else draw.exponential(1.0, 200)
    found = metrics.interval(values.tolist(), seed=1, draws=20_000)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert found[0] == pytest.approx(values.mean())
    assert found[1:] == pytest.approx((wanted.low, wanted.high), abs=0.05 * 1.96 * error)
    assert found[2] - found[1] == pytest.approx(2 * 1.96 * error, rel=0.05)
    if kind == "skewed":
        assert found[2] - found[0] > 1.03 * (found[0] - found[1]), "its ends are percentiles of their own"
    # As often as it is drawn unless told otherwise: not as near, and near.
    assert metrics.interval(values.tolist(), seed=1)[1:] == pytest.approx(found[1:], abs=0.12 * 1.96 * error)


def test_an_interval_of_groups_is_the_bootstraps_of_groups():
    """Groups of 1 to 9 generations that are alike: all of a group, or none, and the mean over generations."""
    draw = np.random.default_rng(4)
    sizes = [1 + number % 9 for number in range(90)]
    values = [draw.normal(shift, 0.1, size) for shift, size in zip(draw.normal(3, 1, 90), sizes, strict=True)]
    flat, groups = np.concatenate(values), np.repeat([f"g{number}" for number in range(90)], sizes).tolist()
    mixed = draw.permutation(len(flat))
    found = metrics.interval(flat[mixed].tolist(), seed=1, draws=20_000, groups=[groups[place] for place in mixed])
    sums = np.array([one.sum() for one in values])
    wanted = stats.bootstrap(
        (sums, np.array(sizes)), lambda sums, sizes, axis=-1: sums.sum(axis) / sizes.sum(axis), paired=True,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(9), vectorized=True,
    ).confidence_interval  # fmt: skip
    half = (wanted.high - wanted.low) / 2
    assert found[0] == pytest.approx(flat.mean())
    assert found[1:] == pytest.approx((wanted.low, wanted.high), abs=0.05 * half)
    alone = metrics.interval(flat.tolist(), seed=1, draws=20_000)
    assert alone[2] - alone[1] < 0.7 * (found[2] - found[1]), "generations by themselves would claim to know more"


def test_generations_without_a_measure_leave_their_groups():
    """The others keep theirs: two alike of one question stay one, and the interval is that of three groups."""
    values = [0.0, math.nan, 0.0, 1.0, math.nan, 2.0]
    groups = ["a", "a", "a", "b", "c", "c"]
    found, count = metrics.interval_of_defined(values, seed=1, groups=groups)
    assert (found, count) == (metrics.interval([0.0, 0.0, 1.0, 2.0], seed=1, groups=["a", "a", "b", "c"]), 4)
    assert found != metrics.interval([0.0, 0.0, 1.0, 2.0], seed=1) and found[0] == 0.75


def test_other_seeds_draw_other_intervals():
    values = np.random.default_rng(1).normal(0, 1, 50).tolist()
    assert metrics.interval(values, seed=1) == metrics.interval(values, seed=1) != metrics.interval(values, seed=2)


# Agreement


def test_spearman_is_of_ranks_and_pearson_is_not():
    scores = np.random.default_rng(2).normal(0, 1, (3, 40))
    found = metrics.agreement(scores, scores**3, seed=1, top=5)
    assert found["spearman"] == pytest.approx((1, 1, 1))
    pearson = [np.corrcoef(one, one**3)[0, 1] for one in scores]
    assert found["pearson"][0] == pytest.approx(np.mean(pearson)) and found["pearson"][0] < 0.95
    assert (found["overlap_5"][0], found["top_5_in_20"][0], found["ndcg_5"][0]) == pytest.approx((1, 1, 1))


def test_a_correlation_is_that_of_ranks_on_average():
    draw = np.random.default_rng(4)
    scores, others = draw.normal(size=(3, 50)), draw.normal(size=(3, 50))
    ranks = [[np.argsort(np.argsort(row)) for row in side] for side in (scores, others)]
    wanted = np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(*ranks, strict=True)])
    assert metrics.correlation(scores, others) == pytest.approx(wanted)
    assert metrics.correlation(np.ones((1, 5)), scores[:1, :5]) is None


def test_agreement_is_the_obvious_one():
    """By sets and sums, query by query; and the interval is over the queries, or over their groups."""
    draw = np.random.default_rng(5)
    exact = draw.normal(0, 1, (12, 60))
    scores = exact + draw.normal(0, 1.5, (12, 60))
    overlaps, within, gains = [], [], []
    for one, other in zip(scores, exact, strict=True):
        ours, theirs = (sorted(range(60), key=lambda place, side=side: -side[place]) for side in (one, other))
        overlaps.append(len({*ours[:6]} & {*theirs[:6]}) / 6)
        within.append(len({*ours[:24]} & {*theirs[:6]}) / 6)
        mine, best = (
            sum(max(other[place], 0) / math.log2(rank + 2) for rank, place in enumerate(order[:6]))
            for order in (ours, theirs)
        )
        gains.append(mine / best)
    groups = [f"g{number // 3}" for number in range(12)]
    columns = {"overlap_6": overlaps, "top_6_in_24": within, "ndcg_6": gains}
    for options in ({}, {"groups": groups}):
        found = metrics.agreement(scores, exact, seed=3, top=6, **options)
        for name, column in columns.items():
            assert found[name] == pytest.approx(metrics.interval(column, seed=3, **options)), name
    assert 0.1 < np.mean(overlaps) < np.mean(within) < 0.95
    assert np.mean(gains) < 0.95, "the two orders differ"


# Shares and areas, at their edges


def test_ends_never_overlap():
    """Where the k highest and the k lowest would be more than all, each sample counts once."""
    positive = marks("101000")
    for k in (3, 4, 100):
        assert metrics.ends_auprc(DESCENDING, positive, k) == pytest.approx((1 + 2 / 3) / 2)
        assert metrics.ends_auroc(DESCENDING, positive, k) == pytest.approx(7 / 8)
    # Of five, the one in the middle belongs to neither.
    assert metrics.ends_auprc(DESCENDING[:5], marks("00100"), 3) == 0.0
    assert math.isnan(metrics.ends_auroc(DESCENDING[:5], marks("00100"), 3))
    assert math.isnan(metrics.ends_auroc(DESCENDING, marks("111111"), 2))
    assert metrics.ends_auroc(DESCENDING, marks("010010"), 2) == pytest.approx(2 / 4)


def test_the_lowest_lie_at_the_other_end():
    positive = marks("110100")
    for k, highest, lowest in ((1, 1, 0), (2, 1, 0), (3, 2 / 3, 1 / 3), (6, 1 / 2, 1 / 2), (9, 1 / 2, 1 / 2)):
        assert metrics.precision_at(DESCENDING, positive, k) == pytest.approx(highest)
        assert metrics.lowest_at(DESCENDING, positive, k) == pytest.approx(lowest)
        mixed = [3, 0, 5, 1, 4, 2]
        assert metrics.precision_at(DESCENDING[mixed], positive[mixed], k) == pytest.approx(highest)
        assert metrics.lowest_at(DESCENDING[mixed], positive[mixed], k) == pytest.approx(lowest)


def test_ties_go_by_place():
    """Enough of them for a sort that is not stable to mix them up."""
    scores, positive = np.arange(400) * 7 % 3 * 1.0, np.random.default_rng(6).random(400) < 0.3
    order = sorted(range(400), key=lambda place: -scores[place])
    assert scores[order[7]] == scores[order[100]] == 2 and scores[order[-8]] == 0
    for k in (8, 30, 90):
        found = [bool(positive[place]) for place in order[:k]]
        assert metrics.precision_at(scores, positive, k) == pytest.approx(sum(found) / k)
        assert metrics.lowest_at(scores, positive, k) == pytest.approx(sum(positive[order[-k:]]) / k)
        precisions = [sum(found[: rank + 1]) / (rank + 1) for rank in range(k) if found[rank]]
        assert metrics.average_precision_at(scores, positive, k) == pytest.approx(sum(precisions) / k)
        # The 2 of the highest and the 0 of the lowest: two values, so that the areas can be reckoned from counts.
        ups, downs = sum(found), sum(positive[order[-k:]])
        area = (ups * (ups / k) + downs * (ups + downs) / (2 * k)) / (ups + downs)
        assert metrics.ends_auprc(scores, positive, k) == pytest.approx(area)
        wins = ups * (k - downs) + (ups * (k - ups) + downs * (k - downs)) / 2
        assert metrics.ends_auroc(scores, positive, k) == pytest.approx(wins / (ups + downs) / (2 * k - ups - downs))
        alike = metrics.agreement(-np.argsort(order)[None] * 1.0, scores[None], seed=1, top=k)
        assert alike[f"overlap_{k}"][0] == 1, k
    marked = [bool(positive[place]) for place in order]
    cuts = {sum(marked[:cut]): cut for cut in range(400, 0, -1) if marked[cut - 1]}
    best = [max(count / cut for count, cut in cuts.items() if count >= least) for least in (2, 40, 100)]
    shares = [least / sum(marked) for least in (2, 40, 100)]
    assert metrics.precision_at_recalls(scores, positive, shares) == pytest.approx(best)


def test_average_precision_is_over_as_many_as_could_be_found():
    for text, k, wanted in (
        ("101000", 2, 1 / 2),  # two could be among the two highest
        ("101000", 6, (1 + 2 / 3) / 2),
        ("011111", 2, 1 / 4),  # of five no more than two
        ("000001", 5, 0.0),
        ("000000", 3, 0.0),
        ("000001", 9, 1 / 6),
    ):
        assert metrics.average_precision_at(DESCENDING, marks(text), k) == pytest.approx(wanted), (text, k)


def test_a_recall_has_the_best_precision_that_reaches_it():
    # Precisions by cut: 0, 1/2, 2/3, 3/4, 3/5, 4/6: a later cut may be better.
    positive = marks("011101")
    found = metrics.precision_at_recalls(DESCENDING, positive, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert found == pytest.approx([3 / 4, 3 / 4, 3 / 4, 3 / 4, 4 / 6])
    # Shares are rounded to whole positives, of which one at least is meant: 0.1 of 4 is 1, 0.4 are 2, 0.9 are 4.
    found = metrics.precision_at_recalls(DESCENDING, marks("101101"), [0.1, 0.4, 0.9])
    assert found == pytest.approx([1, 3 / 4, 4 / 6])
