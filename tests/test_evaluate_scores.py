"""Everybody's scores of a toy corpus: what token-wise methods are told, seeds, bytes, seconds."""

import dataclasses
import shutil

import numpy as np
import pytest
from conftest import toy_records
from reference import normalized, sample_gradient, token_gradients

from rapidin_vdb.evaluate import methods
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.profiles import PROFILES
from rapidin_vdb.evaluate.scoring import CONTAINING, EXACT, TOLD_BM25, TOLD_EXACT, all_scores, lissa, rapidin
from rapidin_vdb.focus import focused
from rapidin_vdb.query import query_from

TINY = dataclasses.replace(
    PROFILES["quick"], max_tokens=400, new_tokens=40, width=256, widths=(64, 256), shuffles=(3,), lissa_depth=2,
    lissa_batch=2,
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
    bm25, size = methods.bm25_scores(responses, ["Japan", "of the", "Neverheard"])
    assert list(np.argsort(-bm25[0], kind="stable")[:2]) == [3, 0] and bm25[0, 1] == 0
    assert not bm25[1:].any() and size > 0


def test_everybody_may_be_told_the_words(experiment):
    """The baselines as RapidIn: by the words alone, exact scores against the slow way."""
    records = toy_records(8)
    queries = [query_from(f"Say {n}", text, query_id=f"q{n}") for n, text in ((50, "blue 35"), (51, "red, a red 9"))]
    told = [["blue"], ["red"]]
    focus = [
        focused(query, encoded, words)
        for query, encoded, words in zip(queries, experiment.encoded(queries), told, strict=True)
    ]
    found = all_scores(experiment, records, queries, focus, told)
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
    assert lissa(2) in found
    # The sketch of the same.
    near = np.corrcoef(found[rapidin(256, 3, token_wise=True)]["scores"].ravel(), found[TOLD_EXACT]["scores"].ravel())
    assert near[0, 1] > 0.8
