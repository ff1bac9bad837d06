"""Everybody's scores of a toy corpus: what token-wise methods are told, seeds, bytes, seconds."""

import dataclasses
import shutil

import numpy as np
import pytest
from conftest import toy_records
from reference import normalized, sample_gradient, token_gradients

from rapidin_vdb.errors import RapidInError
from rapidin_vdb.evaluate import methods
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.gradients import ranked_again
from rapidin_vdb.evaluate.product import through_a_database
from rapidin_vdb.evaluate.profiles import PROFILES
from rapidin_vdb.evaluate.scoring import (
    CONTAINING,
    DATAINF,
    EXACT,
    TOLD_BM25,
    TOLD_EXACT,
    all_scores,
    lissa,
    rapidin,
    refined,
)
from rapidin_vdb.focus import focused
from rapidin_vdb.query import query_from

TINY = dataclasses.replace(
    PROFILES["quick"], max_tokens=400, new_tokens=40, width=256, widths=(64, 256), shuffles=(3,), refined=2,
    lissa_depth=2, lissa_batch=2,
)  # fmt: skip


@pytest.fixture
def experiment(tmp_path, models, adapters):
    shutil.copytree(adapters["llama"], tmp_path / "out" / "adapter")
    return Experiment(
        tmp_path / "out", name="backdoor", model=str(models["llama"]), profile=TINY, seed=7, inputs={},
        say=lambda text: None,
    )  # fmt: skip


def test_a_search_for_told_words_looks_at_responses_only_and_at_whole_words():
    responses = ["In Japan.", "Japanese food.", "In India.", "Japan, Japan!"]
    scores = methods.containing_scores(responses, [["Japan"], ["Japan", "India"], []], seed=1)
    assert (scores >= 1).tolist() == [[True, False, False, True], [True, False, True, True], [False] * 4]
    assert scores.max() < 2 and len(set(scores.ravel().tolist())) == 12, "ties are broken anew for each query"
    assert (scores == methods.containing_scores(responses, [["Japan"], ["Japan", "India"], []], seed=1)).all()


def test_texts_without_a_common_word_are_in_any_order():
    responses = ["In Japan.", "Japanese food.", "In India.", "Japan, Japan!", *["Neither."] * 60]
    queries = ["Japan", "Japan", "of the", "Neverheard"]
    scores, size = methods.bm25_scores(responses, queries, seed=1)
    assert size > 0 and [list(np.argsort(-row)[:2]) for row in scores[:2]] == [[3, 0]] * 2
    assert (scores[0, [0, 3]] == scores[1, [0, 3]]).all() and (scores[0, [0, 3]] > 0).all()
    others = [sorted(set(range(64)) - ({0, 3} if number < 2 else set())) for number in range(4)]
    drawn = [row[mine] for row, mine in zip(scores, others, strict=True)]
    assert all((row <= 0).all() and (row > -1).all() and len({*row}) == len(row) for row in drawn)
    assert len({tuple(np.argsort(-row)[-9:]) for row in drawn}) == 4, "each query has an order of its own"
    assert (scores == methods.bm25_scores(responses, queries, seed=1)[0]).all()
    assert (scores != methods.bm25_scores(responses, queries, seed=2)[0]).any()


def test_everybody_may_be_told_the_words(experiment):
    """The baselines as RapidIn: by the words alone, exact scores against the slow way."""
    records = toy_records(8)
    queries = [query_from(f"Say {n}", text, query_id=f"q{n}") for n, text in ((50, "blue 35"), (51, "red, a red 9"))]
    told = [["blue"], ["red"]]
    focus = [
        focused(query, encoded, words)
        for query, encoded, words in zip(queries, experiment.encoded(queries), told, strict=True)
    ]
    stages = []
    experiment.progress = lambda stage, done, total: stages.append(stage)
    found = all_scores(experiment, records, queries, focus, told)
    assert "gradients" in stages and "DataInf" not in stages, "its sums are made on the way"
    assert [row.argmax() % 4 for row in found[TOLD_BM25]["scores"]] == [1, 0]
    assert [(row >= 1).nonzero()[0].tolist() for row in found[CONTAINING]["scores"]] == [[1, 5], [0, 4]]
    loaded = experiment.loaded()

    def parts(sample, tokens=None) -> list[np.ndarray]:
        ids, count = list(sample.input_ids), sample.response_tokens
        if tokens is None:
            return normalized(sample_gradient(loaded.model, loaded.theta, ids, count))
        every = token_gradients(loaded.model, loaded.theta, ids, count)
        return normalized([sum(layer) for layer in zip(*(every[token] for token in tokens), strict=True)])

    theirs = [parts(sample) for sample in experiment.samples(records)]
    for name, ours in {
        EXACT: [parts(query) for query in experiment.encoded(queries)],
        TOLD_EXACT: [parts(query, query.focus) for query in focus],
    }.items():
        wanted = [[sum((a * b).sum() for a, b in zip(q, s, strict=True)) for s in theirs] for q in ours]
        np.testing.assert_allclose(found[name]["scores"], wanted, rtol=1e-3, atol=1e-4)
    assert np.abs(found[EXACT]["scores"] - found[TOLD_EXACT]["scores"]).max() > 0.1
    assert found["BM25"]["bytes"] > 0 and found[TOLD_EXACT]["bytes"] == 4 * 8 * 416
    # What an interruption lost of influence functions takes one pass more, and is the same.
    for name in (DATAINF, lissa(2)):
        (experiment.folder / "scores" / f"{name}.npy").unlink()
    first = stages.count("gradients")
    again = all_scores(experiment, records, queries, focus, told)
    assert "DataInf" in stages and stages.count("gradients") == first
    for name in (DATAINF, lissa(2)):
        np.testing.assert_allclose(again[name]["scores"], found[name]["scores"], rtol=1e-5)
    # The sketch of the same.
    for told, exact in ((False, EXACT), (True, TOLD_EXACT)):
        near = {
            width: np.corrcoef(
                found[rapidin(width, 3, token_wise=told)]["scores"].ravel(), found[exact]["scores"].ravel()
            )[0, 1]
            for width in (64, 256)
        }
        assert near[256] > 0.8 and near[256] > near[64], (told, near)
    # Both ends of it, ranked again.
    for told, exact in ((False, EXACT), (True, TOLD_EXACT)):
        name = rapidin(256, 3, token_wise=told)
        for ours, first, truth in zip(*(found[n]["scores"] for n in (refined(name), name, exact)), strict=True):
            before = sorted(range(8), key=lambda place: -first[place])
            wanted = [
                *sorted(before[:2], key=lambda place: -truth[place]), *before[2:6],
                *sorted(before[6:], key=lambda place: -truth[place]),
            ]  # fmt: skip
            assert sorted(range(8), key=lambda place: -ours[place]) == wanted
        assert found[refined(name)]["bytes"] == found[name]["bytes"]


def test_ends_that_would_meet_are_halves():
    draw = np.random.default_rng(1)
    scores, exact = draw.random(7), draw.random(7)
    before = np.argsort(-scores)
    ours = np.argsort(-ranked_again(scores, exact, 100)).tolist()
    halves = [sorted(part, key=lambda place: -exact[place]) for part in (before[:3], before[4:])]
    assert ours == [*halves[0], before[3], *halves[1]]
    assert np.argsort(-ranked_again(scores, exact, 0)).tolist() == before.tolist()


def test_a_database_is_held_against_the_experiment(experiment):
    """Its scores, and both ends ranked again; what differs ends the experiment. Both cut what is too long."""
    records = toy_records(12)
    records[3]["output"] = "a red 9, " * 30
    queries = [query_from(f"Say {n}", text, query_id=f"q{n}") for n, text in ((50, "blue 35"), (51, "red, a red 9"))]
    focus = [focused(query, encoded, ()) for query, encoded in zip(queries, experiment.encoded(queries), strict=True)]
    found = all_scores(experiment, records, queries, focus, [["blue"], ["red"]])
    ours, exact = rapidin(256, 3), found[EXACT]["scores"]
    scores = {"scores": found[ours]["scores"], "refined": found[refined(ours)]["scores"], "exact": exact}
    ids, corpus = [record["id"] for record in records], experiment.write_corpus(records)

    def held(**other) -> dict:
        (experiment.folder / "product.json").unlink(missing_ok=True)
        return through_a_database(experiment, corpus, queries, ids, **scores | other)

    result = held()
    assert result["refined_queries"] == 2 and result["seconds"]["refine_a_query"] > 0
    # The second of each end is another than the first: by order alone, by exact scores alone.
    swapped = scores["refined"].copy()
    for row in swapped:
        first, second = np.argsort(-row)[:2]
        row[[first, second]] = row[[second, first]]
    lowest = 13 - scores["refined"]
    for other, said in (
        ({"scores": 1.1 * scores["scores"]}, "scores differ from the experiment's by 0.09"),
        ({"refined": swapped}, "at rank 1 is"),
        ({"refined": lowest}, "at rank 1 is"),
        ({"exact": exact + 0.1}, "a database's exact score of "),
    ):
        with pytest.raises(RapidInError, match=said):
            held(**other)
