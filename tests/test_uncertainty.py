"""What a ranking says of the error of its scores, beside the errors that it has."""

import dataclasses
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb import uncertainty
from rapidin_vdb.index import Grouping, Searchable
from rapidin_vdb.query import query_from
from rapidin_vdb.question import Question
from rapidin_vdb.recipe import IndexRecipe
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch import Sketch
from rapidin_vdb.uncertainty import PROBES, chance, probes, score_errors, shared_bucket, surveyed

ASKED = [(f"Say {number}", f"blue {7 * number}") for number in (2, 5, 9)]


def root_mean_square(values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.fixture
def fingerprint(database):
    """Of two layers of together 416 coordinates, whose scores are 1.5 times the inner products."""
    stored = database._table.fingerprint
    assert stored.gradient_length == 416
    return dataclasses.replace(stored, epochs=3.0, learning_rate=0.5)


class Matrix(Searchable):
    """Stands for an index of some rows."""

    samples = 0

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def group_sums(self, queries, row_ids, groups, count):
        self.asked.append(len(queries))
        scores = queries.astype(np.float64) @ self.rows[row_ids].T
        return np.stack([scores[:, groups == group].sum(1) for group in range(count)], 1)


def group_sums(index, queries, groups, fingerprint):
    """Return the sums of scores over groups of an index's first rows, and what is said of their errors."""
    grouping = Grouping(row_ids=np.arange(len(groups)), groups=groups, count=int(groups.max()) + 1)
    found, errors = surveyed(index, queries, 1, fingerprint, ends=(), grouping=grouping)
    return found.sums, errors


def drawn_gradients(*, normalised):
    """Of 40 samples: the first 10 of unrelated directions, the others akin to the first."""
    draw = np.random.default_rng(3)
    gradients = draw.standard_normal((40, 416))
    gradients[10:] += 2 * gradients[0]
    layers = np.split(gradients, [160], axis=1)
    lengths = np.exp(draw.standard_normal((40, 1)))
    return np.concatenate(
        [layer / np.linalg.norm(layer, axis=1, keepdims=True) for layer in layers], axis=1
    ) if normalised else lengths * gradients  # fmt: skip


def sketched(gradients, *, seed):
    """Return their RapidGrads in double precision, by a matrix of signs."""
    sketch = Sketch(SketchSpec(width=64, shuffles=20, seed=seed), [gradients.shape[1]])
    matrix = np.stack([sketch_of(sketch, one) for one in np.eye(gradients.shape[1], dtype=np.float32)])
    return gradients @ matrix


def sketch_of(sketch, gradient):
    rapidgrad = torch.zeros(sketch.spec.width)
    sketch.add(rapidgrad, 0, torch.from_numpy(gradient))
    return rapidgrad.numpy().astype(np.float64)


@pytest.mark.parametrize("normalised", [True, False])
def test_errors_of_scores_and_sums_are_as_large_as_said(fingerprint, normalised):
    gradients = drawn_gradients(normalised=normalised)
    members = np.arange(40) // 10
    exact = 1.5 * gradients[:1] @ gradients.T
    fingerprint = dataclasses.replace(fingerprint, normalize="layer" if normalised else "none")
    alone, sums = [], []
    for seed in range(60):
        vectors = sketched(gradients, seed=seed)
        scores = vectors[:1] @ vectors.T
        asked = vectors[:1].astype(np.float32)
        said = score_errors(asked, fingerprint)
        if normalised:
            alone.append((1.5 * scores - exact)[0] / said[0])
        else:
            assert said is None
        added, errors = group_sums(Matrix(vectors), asked, members, fingerprint)
        wanted = np.stack([exact[:, members == group].sum(1) for group in range(4)], 1)
        sums.append(((1.5 * added - wanted) / errors)[0])
    if normalised:
        by_sample = np.sqrt(np.mean(np.square(alone), 0))
        assert by_sample[0] == pytest.approx(np.sqrt(2), rel=0.25), "the query's own gradient"
        assert np.mean(by_sample[1:10]) == pytest.approx(1, rel=0.15), "unrelated ones"
        assert np.all(by_sample < 1.8)
    assert np.sqrt(np.mean(np.square(sums), 0)) == pytest.approx(np.ones(4), rel=0.4)


def test_a_ranking_says_how_far_it_may_be_off(tmp_path, models, adapters):
    made = rapidin_vdb.init(
        tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, epochs=3.0,
        learning_rate=0.5,
    )  # fmt: skip
    made.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(24)))
    offs, seen = [], []
    for asked in ASKED:
        (exact,) = made.query(*asked, top_k=24, refine=24, group_by="source")
        (mean,) = made.query(*asked, top_k=24, group_by="source", aggregate="mean")
        assert mean.score_error == exact.score_error
        offs += [result.difference / exact.score_error for result in exact.results]
        for added, averaged in zip(sorted(exact.groups, key=str), sorted(mean.groups, key=str), strict=True):
            of_group = [result.exact_score for result in exact.results if result.source == added.value]
            seen.append((added.score - sum(of_group)) / added.error)
            assert averaged.error == pytest.approx(added.error / added.samples)
            assert averaged.score == pytest.approx(added.score / added.samples)
    # One draw of shuffles and signs for all: errors go together.
    assert 0.4 < root_mean_square(offs) < 2.5
    assert 0.2 < root_mean_square(seen) < 2.5
    (found,) = made.query(*ASKED[0], level="sample", where="source = 'odd'", group_by="stars")
    assert len(found.groups) == 5 and all(group.error > 0 for group in found.groups)


def test_the_lengths_of_groups_are_asked_for_once(fingerprint):
    draw = np.random.default_rng(4)
    index, queries, groups = (
        Matrix(draw.standard_normal((9, 64))),
        draw.standard_normal((2, 64)).astype(np.float32),
        np.arange(9) % 2,
    )
    first = group_sums(index, queries, groups, fingerprint)
    again = group_sums(index, queries, groups, fingerprint)
    np.testing.assert_array_equal(first, again)
    group_sums(index, queries, 1 - groups, fingerprint)
    group_sums(index, queries, groups[:8], fingerprint)
    assert index.asked == [2, PROBES, 2, 2, PROBES, 2, PROBES]
    # Of other rows they are others, though these go to the same groups.
    firsts, lasts = (
        uncertainty._key(np.arange(start, start + 4), np.array([0, 1, 0, 1]), np.array([2, 2])) for start in (0, 5)
    )
    assert firsts != lasts
    alone = group_sums(index, queries, np.arange(9), fingerprint)
    known = score_errors(queries, fingerprint)[:, None]
    np.testing.assert_allclose(alone[1] ** 2, known**2 + (shared_bucket(416, 64) ** 0.5 * 1.5 * alone[0]) ** 2)
    other = Matrix(index.rows + 1)
    assert not np.allclose(group_sums(other, queries, groups, fingerprint)[1], first[1])
    for number in range(40):
        group_sums(index, queries, np.roll(groups, number % 9) + number, fingerprint)
    assert len(uncertainty._LENGTHS[index]) == 16
    held = weakref.ref(index)
    del index
    gc.collect()
    assert held() is None, "no index is kept for them"


@pytest.mark.parametrize(("length", "width"), [(416, 64), (1000, 256), (512, 512)])
def test_the_chance_of_sharing_a_bucket(length, width):
    shared = []
    for seed in range(20):
        sketch = Sketch(SketchSpec(width=width, shuffles=20, seed=seed), [length])
        buckets = sketch._map.buckets(0, length).numpy().astype(int)
        shared.append(sum(one == other for one, other in itertools.combinations(buckets.tolist(), 2)))
    pairs = length * (length - 1) / 2
    assert np.mean(shared) / pairs == pytest.approx(shared_bucket(length, width), rel=0.05)


def test_probes_tell_lengths():
    drawn = np.random.default_rng(1).standard_normal((200, 4096))
    ratios = ((drawn @ probes(4096).T.astype(np.float64)) ** 2).mean(1) / (drawn**2).sum(1)
    assert np.mean(ratios) == pytest.approx(1, abs=0.08)
    assert np.sqrt(ratios).std() == pytest.approx(0.18, abs=0.03)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("samples", [1, 3, 100, 5_000])
def test_the_largest_of_chance(samples, both):
    drawn = 2.0 * np.random.default_rng(2).standard_normal((2000, samples), dtype=np.float32)
    largest = (np.abs(drawn) if both else drawn).max(1)
    below = np.mean(largest < chance(2.0, samples * (2 if both else 1)))
    assert below == pytest.approx(0.9, abs=0.025)


def test_scores_that_do_not_stand_out_are_told(database, monkeypatch):
    """By the end that was asked for, and not where exact scores rank them all."""
    everything = database.query(*ASKED[0], top_k=24)[0]
    error, scores = everything.score_error, {result.sample_id: result.score for result in everything.results}
    assert everything.note is None and max(scores.values()) > chance(error, 24)
    assert everything.to_dict()["score_error"] == error
    weak = tuple(sorted(scores, key=lambda name: abs(scores[name]))[:3])

    def note(*names, **options):
        (ranking,) = database.query(*ASKED[0], where=f"sample_id IN {names}", **options)
        return ranking.note

    assert note(*weak).startswith(
        f"no positive score stands out: by chance alone the largest of 3 stays below {chance(error, 3):.3g} nine times in ten; exact"
    )
    # The toy has no negative scores that stand out: the bound is set between the weak ones and the lowest.
    lowest = min(scores, key=scores.get)
    bound = (abs(scores[weak[-1]]) - scores[lowest]) / 2
    assert abs(scores[weak[-1]]) < bound < -scores[lowest]
    # Of either sign there are twice as many scores.
    said = note(*weak, both=True)
    assert f"the largest of 6 stays below {chance(error, 6):.3g} nine times in ten" in said
    monkeypatch.setattr("rapidin_vdb.ranking.chance", lambda error, samples: bound)
    assert note(*weak).startswith("no positive score stands out")
    assert note(*weak, harmful=True).startswith("no negative score stands out")
    assert note(*weak, both=True).startswith("no score stands out")
    assert note(*weak, lowest).startswith("no positive score stands out")
    assert note(*weak, lowest, top_k=1).startswith("no positive score stands out")
    assert note(*weak, lowest, both=True) is note(*weak, lowest, harmful=True) is None
    # What is explained was chosen by such scores, as what is not.
    assert note(*weak, tokens=True) == note(*weak, matrix=True) == note(*weak)
    assert (
        note(*weak, refine=2, tokens=True)
        == note(*weak, refine=2)
        == (
            f"no positive score stands out: by chance alone the largest of 3 stays below {bound:.3g} nine times in ten; the 2 that are ranked "
            "again were chosen by these: refine more, or make a wider sketch (width at init)"
        )
    )
    assert note(*weak, refine=3) is note(*weak, refine=9, both=True) is None, "all are ranked by exact scores"
    (nobody,) = database.query(*ASKED[0], where="stars > 100")
    assert (nobody.note, nobody.results) == (None, ())
    monkeypatch.setattr("rapidin_vdb.ranking.chance", lambda error, samples: 1e9)
    (cut,) = database.query("Say 5", "blue 35 " * 200, top_k=1)
    assert "has no part in the scores; no positive score stands out" in cut.note


def test_a_sample_does_not_stand_out_beside_itself(database, monkeypatch):
    """It leads the ranking of its own RapidGrad, whatever the others are."""
    found = database.nearest("toy-005", Question(top_k=5))
    assert found.results[0].sample_id == "toy-005" and found.note is None
    second = found.results[1].score
    monkeypatch.setattr("rapidin_vdb.ranking.chance", lambda error, scores: (second + found.results[0].score) / 2)
    assert database.nearest("toy-005", Question(top_k=5)).note.startswith("no positive score stands out")
    # Whatever a query is called, what leads its ranking counts.
    (ranking,) = database.query(queries=[query_from("Say 5", "blue 35", query_id="toy-005")], top_k=1)
    monkeypatch.setattr("rapidin_vdb.ranking.chance", lambda error, scores: ranking.results[0].score / 2)
    asked = query_from("Say 5", "blue 35", query_id=ranking.results[0].sample_id)
    assert database.query(queries=[asked], top_k=1)[0].note is None
    alone = database.nearest("toy-005", Question(top_k=5, where="sample_id = 'toy-005'"))
    assert len(alone.results) == 1 and alone.note is None


def test_the_lengths_of_groups_are_asked_for_once_of_a_coarse_index_too(database, monkeypatch):
    """They go by the index, which stays the same object, with what was measured of it."""
    recipe = IndexRecipe(name="coarse", coarse_width=32, refine=2)
    database.index(recipe)
    asked = []
    monkeypatch.setattr(uncertainty, "probes", lambda width: asked.append(width) or probes(width))
    first, again = (database.query(*ASKED[0], group_by="source")[0] for _ in range(2))
    assert asked == [64] and first.groups == again.groups and len(first.groups) == 2
    assert first.note == again.note
