"""A coarse index may miss samples: what it finds is measured at both ends, and told in every ranking that may lack some."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_cli import call
from test_freshness import ASKED, assert_answers
from test_index_files import recipe_of, rows, write

import rapidin_vdb
from rapidin_vdb.index import list_manifests, load_index, measured_recall, with_recall
from rapidin_vdb.query import query_from
from rapidin_vdb.question import Question
from rapidin_vdb.recipe import IndexRecipe

NARROW = IndexRecipe(name="narrow", coarse_width=2, refine=1)
MISSING = ", so that samples may be missing here; an exact one misses none: rapidin-vdb index DB"


@pytest.fixture
def coarse(database):
    """With other numbers than were measured, which of so few samples are alike at both ends."""
    database.index(NARROW)
    folder = Path(database.path, "indexes")
    (manifest,) = list_manifests(folder)
    with_recall(folder, manifest, manifest.recall | {"recall": 0.4128, "recall_harmful": 0.2374})
    return database


def told(database) -> tuple[str, str]:
    """What is on disk of what was measured, at either end, in words."""
    text = Path(database.path, "indexes", "narrow", "manifest.json").read_text("utf-8")
    recall = json.loads(text)["recall"]
    assert 0 < recall["recall"] < 1 and 0 < recall["recall_harmful"] < 1 and recall["queries"] == 24
    return (
        f"{100 * recall['recall']:.0f} % of the best 10",
        f"{100 * recall['recall_harmful']:.0f} % of the most negative 10",
    )


def note(database, **options) -> str | None:
    (ranking,) = database.query(*ASKED, **{"top_k": 3} | options)
    assert ranking.to_dict().get("note") == ranking.note
    return ranking.note


def test_recall_is_measured_at_both_ends(tmp_path):
    vectors = rows(400)
    measured = measured_recall(load_index(tmp_path, write(tmp_path, recipe_of(coarse_width=16, refine=4), vectors)))
    whole = np.stack(list(vectors.values())).astype(np.float64)
    narrow = whole.reshape(400, 16, -1).sum(2)
    for end, sign in (("recall", 1), ("recall_harmful", -1)):
        shares = []
        for number in np.unique(np.linspace(0, 399, 32).astype(np.int64)):
            exact, near = sign * whole @ whole[number], sign * narrow @ narrow[number]
            near[number] = -np.inf  # it takes no other's place
            candidates = np.argsort(-near)[: 4 * 10]
            got = candidates[np.argsort(-exact[candidates])][:10]
            right = [other for other in np.argsort(-exact)[:11] if other != number][:10]
            shares.append(np.isin(right, got).mean())
        assert measured[end] == pytest.approx(np.mean(shares))
        assert 0.2 < measured[end] < 1.0
    assert measured["recall"] != measured["recall_harmful"]


def test_fewer_results_are_no_worse_than_ten(tmp_path):
    """Of fewer than ten the first of those ten are found."""
    vectors = rows(400)
    index = load_index(tmp_path, write(tmp_path, recipe_of(coarse_width=16, refine=2), vectors))
    asked = np.stack(list(vectors.values()))[:40].astype(np.float32)
    for ten, *fewer in zip(*(index.search(asked, top_k) for top_k in (10, 1, 3, 9)), strict=True):
        assert fewer == [ten[:1], ten[:3], ten[:9]]
    assert len(index.search(asked, 30)[0]) == 30


def test_what_is_measured_is_what_ten_results_get(tmp_path):
    """A sample's own row is not among the rows in the answer that it is held against, nor in their place."""
    vectors = rows(400)
    measured = measured_recall(load_index(tmp_path, write(tmp_path, recipe_of(coarse_width=16, refine=1), vectors)))
    names, hits = list(vectors), []
    for number in np.unique(np.linspace(0, 399, 32).astype(np.int64)):
        others = {name: vector for name, vector in vectors.items() if name != names[number]}
        folder = tmp_path / str(number)
        index = load_index(folder, write(folder, recipe_of(coarse_width=16, refine=1), others))
        query = vectors[names[number]].astype(np.float32)
        got = {name for name, _ in index.search(query[None], 10)[0]}
        exact = np.stack(list(others.values())).astype(np.float64) @ query
        right = [list(others)[other] for other in np.argsort(-exact)[:10]]
        hits.append(len(got & set(right)) / 10)
    assert measured["recall"] == pytest.approx(np.mean(hits)) and 0.1 < measured["recall"] < 0.9


def test_a_ranking_that_may_lack_samples_says_so(coarse):
    best, lowest = told(coarse)
    for options, found in (
        ({}, best), ({"harmful": True}, lowest), ({"both": True}, f"{best} and {lowest}"), ({"refine": 4}, best)
    ):  # fmt: skip
        said = f"the index narrow is not exact: it found {found} when it was built{MISSING}"
        assert note(coarse, **options).partition("; of what was found")[0] == said
        assert note(rapidin_vdb.open(coarse.path), **options).startswith(said), "from disk"
    near = coarse.nearest("toy-005", Question(top_k=3))
    assert near.note.startswith(f"the index narrow is not exact: it found {best} when")
    coarse.index("cpu")
    assert note(coarse) is note(coarse, index="cpu") is None
    assert "is not exact" in note(coarse, index="narrow")


def test_where_all_were_looked_at_nothing_is_missing(coarse):
    """However narrow the folded rows are: the answer is the exact one."""
    assert assert_answers(coarse, k=24).note is None
    assert assert_answers(coarse, k=3, where="stars = 1 AND source = 'odd'").note is None
    assert note(coarse, refine=24) is None
    coarse.index(IndexRecipe(name="a_wide", coarse_width=2, refine=2))
    assert assert_answers(coarse, k=12, index="a_wide").note is None
    assert "the index a_wide is not exact" in note(coarse, index="a_wide", top_k=11)
    coarse.index(IndexRecipe(name="b_wide", coarse_width=2, refine=3))
    assert assert_answers(coarse, k=1, index="b_wide").note is None, "of one as many are looked at as of ten"


@pytest.mark.parametrize(("options", "which"), [({}, "positive "), ({"harmful": True}, "negative ")])
def test_of_what_was_not_found_it_is_not_said_that_it_does_not_stand_out(coarse, monkeypatch, options, which):
    asked = [query_from(f"Say {number}", f"blue {7 * number}") for number in range(24)]
    pairs = zip(
        coarse.query(queries=asked, top_k=24, **options), coarse.query(queries=asked, top_k=1, **options), strict=True
    )
    first = [(abs(all_of_them.results[0].score), abs(some.results[0].score)) for all_of_them, some in pairs]
    number = next(number for number, (highest, seen) in enumerate(first) if highest > seen)
    # What stands out is missed: the bound lies between that and what is found.
    bound = sum(first[number]) / 2
    monkeypatch.setattr("rapidin_vdb.ranking.chance", lambda error, samples: bound)
    (found,) = coarse.query(queries=asked[number : number + 1], top_k=1, **options)
    measured = told(coarse)[bool(options)]
    assert found.note == (
        f"the index narrow is not exact: it found {measured} when it was built{MISSING}; of what was found, no {which}"
        f"score stands out: by chance alone the largest of 24 stays below {bound:.3g} nine times in ten"
    )
    coarse.index("cpu")
    (exact,) = coarse.query(queries=asked[number : number + 1], top_k=1, **options)
    assert exact.note is None, "it does stand out"


def test_it_is_in_json_on_the_page_and_in_the_terminal(coarse, capsys, tmp_path):
    best, lowest = told(coarse)
    said = f"the index narrow is not exact: it found {best} and {lowest} when it was built{MISSING}"
    asked = ("query", coarse.path, "--prompt", ASKED[0], "--generation", ASKED[1], "--top-k", 3, "--both")
    code, out, _ = call(capsys, *asked, "--json")
    assert code == 0 and json.loads(out)["note"].startswith(said)
    code, out, _ = call(capsys, *asked, "--html", tmp_path / "page.html")
    assert code == 0 and said in " ".join(out.split())
    page = (tmp_path / "page.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["rankings"][0]["note"].startswith(said)


def test_what_was_measured_is_told_when_it_is_built_and_later(database, capsys, tmp_path):
    (tmp_path / "narrow.toml").write_text("coarse_width = 2\nrefine = 1\n")
    code, _, err = call(capsys, "index", database.path, "--recipe", tmp_path / "narrow.toml")
    best, lowest = told(database)
    said = f"not exact: it finds {best} and {lowest} (measured with 24 samples as queries)"
    assert code == 0 and err.endswith(f"; {said}\n")
    code, out, _ = call(capsys, "info", database.path)
    assert code == 0 and said in " ".join(out.split())


def test_indexes_that_were_measured_at_one_end(coarse, capsys, caplog):
    """Those of before: they open as they did, and say what is not known."""
    best, _ = told(coarse)
    folder = Path(coarse.path, "indexes")
    (manifest,) = list_manifests(folder)
    half = {name: manifest.recall[name] for name in ("at", "queries", "recall")}
    manifest = with_recall(folder, manifest, half)
    assert list_manifests(folder) == [manifest] and manifest.recall == half
    again = rapidin_vdb.open(coarse.path)
    began = f"the index narrow is not exact: it found {best} when it was built"
    assert note(again).startswith(began + MISSING)
    assert note(again, both=True).startswith(f"{began}, and was not measured at the most negative{MISSING}")
    harmful = "the index narrow is not exact, and what it finds of the most negative was not measured"
    assert note(again, harmful=True).startswith(harmful + MISSING)
    _, out, _ = call(capsys, "info", coarse.path)
    assert f"not exact: it finds {best} (measured with 24 samples as queries)" in " ".join(out.split())
    assert f"{began}, and was not measured at the most negative" in caplog.text
