"""Several generations as one list of samples, held against the scores of each alone; and what is left out by it."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from test_cli import call

import rapidin_vdb
from rapidin_vdb.cli.ids import read_ids
from rapidin_vdb.cluster import ClusterKeeper
from rapidin_vdb.errors import FilterError, SpecError
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.pooling import pool
from rapidin_vdb.query import Sketched, query_from, read_queries
from rapidin_vdb.question import Question
from rapidin_vdb.uncertainty import chance

ASKED = [
    query_from("Say 5", "blue 35", query_id="a"),
    query_from("Say 12", "red 84, or so", query_id="b"),
    query_from("Say 90", "黄 is it", query_id="c"),
]
ENDS = ({}, {"harmful": True}, {"both": True})


@pytest.fixture
def repeated(database, tmp_path):
    """Some samples say the same under other ids: their scores are equal."""
    twins = [record | {"id": f"twin-{9 - number}"} for number, record in enumerate(toy_records(9))]
    database.ingest(write_jsonl(tmp_path / "twins.jsonl", twins))
    return database


def wanted(database, ends, *, where=None, focus=()):
    """All samples with the score they should be pooled by, and the generation, best first."""
    rankings = database.query(queries=ASKED, top_k=1000, where=where, focus=focus)
    found = {}
    for place, ranking in enumerate(rankings):
        for result in ranking.results:
            strength = abs(result.score) if ends.get("both") else -result.score if ends.get("harmful") else result.score
            found.setdefault(result.sample_id, []).append((-strength, place, result.score))
    best = [(*min(scores), name) for name, scores in found.items()]
    return [
        (name, score, ASKED[place].sample_id) for _, name, place, score in sorted((s, n, p, x) for s, p, x, n in best)
    ]


@pytest.mark.parametrize("where", [None, "stars > 1"])
@pytest.mark.parametrize("ends", ENDS, ids=["helpful", "harmful", "both"])
def test_a_pool_is_of_the_best_scores_of_all_generations(repeated, ends, where):
    every = wanted(repeated, ends, where=where)
    assert len(every) == repeated.count(where) > 10 and len({score for _, score, _ in every}) < len(every)
    rows = {name: repeated.show(name) for name, _, _ in every}
    for size in (1, 4, 11, 100):
        found = repeated.pool(queries=ASKED, size=size, where=where, **ends)
        assert [(r.sample_id, r.score, r.query_id) for r in found.results] == every[:size]
        assert [r.rank for r in found.results] == [*range(1, min(size, len(every)) + 1)]
        for result in found.results:
            stored = rows[result.sample_id]
            for name in ("prompt", "response", "split", "source", "metadata"):
                assert getattr(result, name) == getattr(stored, name)
        assert (found.queries, found.searched, found.where) == (("a", "b", "c"), len(every), where)
        assert (found.table_version, found.identity) == (repeated.version, repeated.identity)
    assert len({name for _, _, name in every[:11]}) > 1, "more than one generation has a part in it"


@pytest.mark.parametrize("ends", ENDS, ids=["helpful", "harmful", "both"])
def test_scores_of_either_sign_are_pooled(repeated, tmp_path, ends):
    """Of vectors that are drawn, against products in double precision."""
    snapshot = repeated._table.snapshot()
    draw = np.random.default_rng(5)
    vectors = draw.normal(0, 1, (6, 64)).astype(np.float32)
    stored = {sample.sample_id: snapshot.vector_of(sample.sample_id) for sample in repeated.samples()[0]}
    names = sorted(stored)
    scores = np.array([stored[name].astype(np.float64) for name in names]) @ vectors.astype(np.float64).T
    strengths = np.abs(scores) if ends.get("both") else -scores if ends.get("harmful") else scores
    order = np.lexsort((names, -strengths.max(1).round(9)))
    question = Question(top_k=12, **ends)
    sketched = Sketched(query_ids=tuple("abcdef"), vectors=vectors, seconds=(0.5,) * 6, focus=((),) * 6)
    found = pool(snapshot, IndexKeeper(tmp_path / "none").fresh(snapshot), sketched, question)
    assert [result.sample_id for result in found.results] == [names[place] for place in order[:12]]
    for result, place in zip(found.results, order, strict=False):
        query = int(strengths[place].argmax())
        assert result.query_id == "abcdef"[query] and result.score == pytest.approx(scores[place, query], abs=1e-4)
    assert len({result.query_id for result in found.results}) > 2 and found.seconds.gradient == 3.0
    assert {result.score > 0 for result in found.results} == (
        {True, False} if ends.get("both") else {not ends.get("harmful")}
    )


@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_long_gradients_do_not_have_all_places(tmp_path, models, adapters, normalize):
    """Where layers are normalised, all are as long, and scores are compared as they are."""
    database = rapidin_vdb.init(
        tmp_path / "db",
        model=models["llama"],
        adapter=adapters["llama"],
        width=64,
        template="text",
        normalize=normalize,
    )
    database.ingest(write_jsonl(tmp_path / "some.jsonl", toy_records(9)))
    snapshot = database._table.snapshot()
    vectors = np.random.default_rng(3).normal(0, 1, (3, 64)).astype(np.float32)

    def pooled(*factors):
        scaled = Sketched(
            query_ids=("a", "b", "c"), vectors=vectors * np.array(factors, np.float32)[:, None], seconds=(0.0,) * 3,
            focus=((),) * 3,
        )  # fmt: skip
        index = IndexKeeper(tmp_path / "none").fresh(snapshot)
        return pool(snapshot, index, scaled, Question(top_k=9, both=True)).results

    plain, scaled = pooled(1, 1, 1), pooled(1, 1000, 1)
    assert len({result.query_id for result in plain}) > 1
    if normalize == "layer":
        assert {result.query_id for result in scaled} == {"b"}
        assert "normalised" not in (database.pool(queries=ASKED).note or "")
    else:
        assert database.pool(queries=ASKED).note == (
            "layers are not normalised: ranked relative to the length of each generation's gradient"
        )
        assert [(r.sample_id, r.query_id) for r in scaled] == [(r.sample_id, r.query_id) for r in plain]
        for one, other in zip(scaled, plain, strict=True):
            assert one.score == pytest.approx(other.score * (1000 if one.query_id == "b" else 1), rel=1e-5)


@pytest.mark.parametrize("recipe", ["cpu", "streamed", "coarse"])
def test_every_index_gives_the_same_pool(repeated, tmp_path, recipe):
    before = repeated.pool(queries=ASKED, size=9, both=True)
    coarse = tmp_path / "coarse.toml"
    coarse.write_text('residence = "streamed"\ncoarse_width = 16\nrefine = 3\n')
    repeated.index(coarse if recipe == "coarse" else recipe)
    after = repeated.pool(queries=ASKED, size=9, both=True, index=recipe)
    assert len(after.results) == 9 and (recipe == "coarse" or after.results == before.results)
    # A coarse one may miss some, and knows the score of those that it finds.
    every = {name: score for name, score, _ in wanted(repeated, {"both": True})}
    assert all(abs(result.score) <= abs(every[result.sample_id]) for result in after.results)
    assert sum(result.score == every[result.sample_id] for result in after.results) > 4
    assert ("coarse" in (after.note or "")) == (recipe == "coarse"), after.note


def test_a_focus_a_version_and_one_generation(repeated, tmp_path):
    ends = {"both": True}
    own = read_queries(
        write_jsonl(tmp_path / "own.jsonl", [{"prompt": "Say 5", "generation": "blue 35", "focus": "blue"}])
    )
    (ranking,) = repeated.query(queries=own, top_k=5)
    found = repeated.pool(queries=own, size=5)
    assert [(r.sample_id, r.score) for r in found.results] == [(r.sample_id, r.score) for r in ranking.results]
    assert "Eq. 7" in found.score_unit and found.focus is None
    focused = repeated.pool("Say 5", "blue 35", focus="blue", size=5)
    assert focused.focus == ("blue",) and [r.score for r in focused.results] == [r.score for r in found.results]
    assert focused.queries == ("query",)
    version, every = repeated.version, wanted(repeated, ends)
    repeated.delete(ids=[every[0][0]])
    assert repeated.pool(queries=ASKED, size=1, both=True).results[0].sample_id == every[1][0]
    (then,) = repeated.pool(queries=ASKED, size=1, both=True, as_of=version).results
    assert (then.sample_id, then.score, then.query_id) == every[0]


def test_some_generations_may_have_a_focus(repeated, tmp_path):
    lines = [
        {"prompt": "Say 5", "generation": "blue 35", "id": "a"},
        {"prompt": "Say 12", "generation": "red 84", "id": "b"},
    ]
    for focused in ((0, 1), (1, 0)):
        asked = [
            line | ({"focus": line["generation"].split()[0]} if on else {})
            for line, on in zip(lines, focused, strict=True)
        ]
        found = repeated.pool(queries=read_queries(write_jsonl(tmp_path / "some.jsonl", asked)), size=50, both=True)
        assert found.score_unit.endswith("RapidGrads (Eq. 5; Eq. 7 of those with a focus)")
        rankings = repeated.query(queries=read_queries(tmp_path / "some.jsonl"), top_k=50)
        scores = {name: [r.score for ranking in rankings for r in ranking.results if r.sample_id == name] for name in
                  (result.sample_id for result in found.results)}  # fmt: skip
        assert all(abs(result.score) == max(map(abs, scores[result.sample_id])) for result in found.results)


@pytest.mark.parametrize("entries", [1, 8, 10_000])
def test_many_generations_are_asked_some_at_a_time(repeated, monkeypatch, entries):
    """Scores of all at once would take gigabytes."""
    asked, real = [], rapidin_vdb.pooling.surveyed

    def surveyed(index, vectors, *arguments, **options):
        asked.append(len(vectors))
        return real(index, vectors, *arguments, **options)

    monkeypatch.setattr("rapidin_vdb.pooling.surveyed", surveyed)
    monkeypatch.setattr("rapidin_vdb.pooling._ENTRIES", entries)
    found = repeated.pool(queries=ASKED, size=2, both=True)
    assert asked == {1: [1, 1, 1], 8: [2, 1], 10_000: [3]}[entries]
    assert [(r.sample_id, r.score, r.query_id) for r in found.results] == wanted(repeated, {"both": True})[:2]


def test_a_cluster_is_asked_if_one_is_named(repeated, monkeypatch):
    keeper = repeated._indexes["sample"]
    monkeypatch.setattr("rapidin_vdb.database.session_of", lambda name: name)
    monkeypatch.setattr("rapidin_vdb.database.ClusterKeeper", lambda place, cluster: asked.append(cluster) or keeper)
    asked = []
    assert repeated.pool(queries=ASKED, size=3, cluster="auto").results == repeated.pool(queries=ASKED, size=3).results
    assert asked == ["auto"]


def test_what_does_not_stand_out_is_told(repeated):
    found = repeated.pool(queries=ASKED, size=100, both=True)
    errors = [ranking.score_error for ranking in repeated.query(queries=ASKED)]
    assert found.score_error == pytest.approx(max(errors)) and min(errors) < max(errors)
    scores = 2 * 3 * len(found.results)
    bound = chance(found.score_error, scores)
    weak = [abs(result.score) < bound for result in found.results]
    assert weak == sorted(weak) and 0 < sum(weak) < len(weak)
    told = f"the last {sum(weak)} do not stand out: by chance alone the largest of {scores} stays below {bound:.3g} nine times in ten"
    assert found.note == told
    few = repeated.pool(queries=ASKED, size=weak.index(True), both=True)
    assert few.note is None
    (lowest,) = repeated.pool(queries=ASKED, size=1, where=f"sample_id = '{found.results[-1].sample_id}'").results
    assert lowest.sample_id == found.results[-1].sample_id


def test_equal_scores_on_different_generations_go_by_id(repeated, tmp_path, monkeypatch):
    """Of one sample with equal scores on several, the first generation is named."""
    ends = [[[("toy-007", 2.0), ("toy-001", 1.0)], [("toy-002", 2.0), ("toy-001", 1.0)]]]
    monkeypatch.setattr("rapidin_vdb.pooling.surveyed", lambda *_, **options: (SimpleNamespace(ends=ends), None))
    snapshot = repeated._table.snapshot()
    vectors = np.ones((2, 64), np.float32)
    sketched = Sketched(query_ids=("a", "b"), vectors=vectors, seconds=(0.0, 0.0), focus=((), ()))
    found = pool(snapshot, IndexKeeper(tmp_path / "none").fresh(snapshot), sketched, Question(top_k=3))
    told = [(result.sample_id, result.query_id) for result in found.results]
    assert told == [("toy-002", "b"), ("toy-007", "a"), ("toy-001", "a")]


def test_what_was_cut_is_told(tmp_path, models, adapters):
    """Of a database with a factor, by which scores are those of its rankings, too."""
    database = rapidin_vdb.init(
        tmp_path / "db", model=models["llama"], adapter=adapters["llama"], width=64, template="text", max_tokens=40,
        epochs=3.0, learning_rate=0.5,
    )  # fmt: skip
    database.ingest(write_jsonl(tmp_path / "few.jsonl", toy_records(3)))
    long = query_from("Say 5", "blue " * 30, query_id="long")
    behind = "cut to the database's --max-tokens ({}): what stands behind that has no part in the scores"
    told = database.pool(queries=[*ASKED, long], size=2).note
    assert told.startswith(f"1 of 4 generations {behind.format('long')}")
    other = dataclasses.replace(long, sample_id="longer")
    told = database.pool(queries=[ASKED[0], other, long], size=2).note
    assert told.startswith(f"2 of 3 generations {behind.format('the first is longer')}")
    assert database.pool(queries=[long]).note.startswith(f"1 of 1 generation {behind.format('long')}")
    (ranking,) = database.query(queries=ASKED[:1])
    alone = database.pool(queries=ASKED[:1])
    assert [result.score for result in alone.results] == [result.score for result in ranking.results]
    assert alone.score_error == ranking.score_error


def test_a_pool_as_tables_and_json(repeated):
    found = repeated.pool(queries=ASKED, size=4, both=True)
    values = json.loads(json.dumps(found.to_dict()))
    assert [entry["sample_id"] for entry in values["results"]] == [result.sample_id for result in found.results]
    assert values["queries"] == ["a", "b", "c"] and "focus" not in values
    assert values["seconds"]["total"] == pytest.approx(values["seconds"]["gradient"] + values["seconds"]["search"])
    table, frame = found.to_arrow(), found.to_pandas()
    assert table.column_names == [
        "rank", "sample_id", "score", "query_id", "split", "source", "prompt", "response", "stars"
    ]  # fmt: skip
    assert table.column("score").to_pylist() == [*frame["score"]] == [result.score for result in found.results]
    assert [*frame["stars"]] == [result.metadata["stars"] for result in found.results]
    none = repeated.pool(queries=ASKED, where="stars = 77")
    assert none.results == () and none.searched == 0 and none.to_arrow().num_rows == 0


def test_what_cannot_be_pooled(database):
    for options, error, message in (
        ({"size": 0}, SpecError, "--size is 0; wanted 1 or more"),
        ({"both": True, "harmful": True}, SpecError, "give one of --harmful and --both"),
        ({"where": "colour = 1"}, FilterError, "colour"),
        ({"index": "nowhere"}, SpecError, "nowhere"),
        ({"focus": "purple"}, SpecError, "purple"),
    ):
        with pytest.raises(error, match=message):
            database.pool(queries=ASKED, **options)
    with pytest.raises(SpecError, match="no generation to pool"):
        database.pool(queries=[])


@pytest.mark.parametrize("cluster", [None, "local"])
def test_an_index_that_is_not_there_is_told_before_gradients_are_taken(database, monkeypatch, cluster):
    """Of a thousand generations they take minutes."""
    database.load()
    monkeypatch.setattr("rapidin_vdb.database.session_of", lambda name: ("a", name))
    monkeypatch.setattr("rapidin_vdb.database.ClusterKeeper", lambda *_: object.__new__(ClusterKeeper))
    monkeypatch.setattr("rapidin_vdb.answering.sketch_queries", lambda *_, **options: pytest.fail("gradients"))
    message = "no index nowhere is built" if cluster is None else "leave it or --cluster out"
    for ask in (database.pool, database.query):
        with pytest.raises(SpecError, match=message):
            ask(queries=ASKED, index="nowhere", cluster=cluster)


def test_on_the_command_line_from_generations_to_a_cleaned_file(repeated, tmp_path, capsys):
    def here(*arguments, check=0):
        code, out, err = call(capsys, *map(str, arguments))
        assert code == check, err
        return SimpleNamespace(out=out, err=err)

    corpus = write_jsonl(tmp_path / "corpus.jsonl", toy_records(24))
    lines = [{"id": q.sample_id, "prompt": q.prompt, "generation": q.response} for q in ASKED]
    file = write_jsonl(tmp_path / "asked.jsonl", lines)
    found = repeated.pool(queries=ASKED, size=5, both=True, where="sample_id LIKE 'toy%'")
    options = ("--file", file, "--size", "5", "--both", "--where", "sample_id LIKE 'toy%'")
    table = here("pool", repeated.path, *options).out.splitlines()
    assert table[0] == "3 generations: 5 of 24 samples that match sample_id LIKE 'toy%'"
    assert [line.split()[1:4] for line in table[-5:]] == [
        [f"{result.score:.4g}", result.sample_id, result.query_id] for result in found.results
    ]
    assert all(len(line) <= 80 for line in table)
    pooled = {result.sample_id for result in found.results}
    found = tmp_path / "found.jsonl"
    found.write_text(here("pool", repeated.path, *options, "--json").out)
    assert {*read_ids(found, repeated)} == pooled and len(pooled) == 5
    out = tmp_path / "out.jsonl"
    here("clean", repeated.path, corpus, "--ids", found, "--out", out)
    left = {json.loads(line)["id"] for line in out.read_text().splitlines()}
    assert left == {f"toy-{n:03d}" for n in range(24)} - pooled
    version = repeated.version
    focus = ("--focus", "is", "--as-of", version, "--index", "cpu")
    lines[0]["generation"], lines[1]["generation"] = "it is blue", "red, it is"
    some = write_jsonl(tmp_path / "focused.jsonl", lines)
    here("pool", repeated.path, "--file", some, *focus, check=1)  # there is no such index
    repeated.index("cpu")
    told = here("pool", repeated.path, "--file", some, *focus, "--json")
    values = json.loads(told.out)
    assert values["focus"] == ["is"] and values["table_version"] == version < repeated.version
    lines = [line | {"id": f"a-name-that-is-so-long-00000{number}"} for number, line in enumerate(lines)]
    told = here("pool", repeated.path, "--file", write_jsonl(some, lines), "--focus", "is", "--harmful", "--size", 30)
    assert told.out.startswith("3 generations, on is: 30 of 33 samples") and "…o-long-000001  " in told.out
    assert all(len(line) <= 80 for line in told.out.splitlines())
    # Rankings do as well, of both ends.
    found.write_text(here("query", repeated.path, "--file", file, "--top-k", 2, "--both", "--json").out)
    ids = read_ids(found)
    assert len(ids) == len({*ids}) and {*ids} == {
        result.sample_id
        for ranking in repeated.query(queries=ASKED, top_k=2, both=True)
        for result in (*ranking.results, *ranking.harmful)
    }
    # Not of another database, though it has such samples.
    changed = found.read_text().replace(repeated.identity, "another")
    found.write_text(changed)
    for command in ("clean", "delete"):
        more = (corpus, "--out", tmp_path / "other.jsonl") if command == "clean" else ()
        told = here(command, repeated.path, *more, "--ids", found, check=1).err
        assert "line 1: a ranking of another database" in told
    assert not (tmp_path / "other.jsonl").exists() and repeated.count() == 33


def test_samples_that_were_mended_since_are_not_thrown_away(database, tmp_path, capsys):
    """A pool is of what they said: nobody has looked at what is there now."""
    records = toy_records(24)
    found = database.pool(queries=ASKED, size=3)
    pooled = tmp_path / "pool.jsonl"
    pooled.write_text(json.dumps(found.to_dict()))
    names = [result.sample_id for result in found.results]
    others = [record for record in records if record["id"] not in names]
    mended = [record | {"output": "It is mended."} for record in records if record["id"] == names[1]]
    # What others say by now does not matter.
    changed = others[:1][0] | {"output": "It is another."}
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*others[1:], *(r for r in records if r["id"] in names), changed])
    database.ingest(corpus, on_duplicate="replace")
    assert read_ids(pooled, database) == names
    database.ingest(write_jsonl(tmp_path / "mended.jsonl", mended), on_duplicate="replace")
    told = f"sample {names[1]} was written anew after version {found.table_version}, which the ranking is of: what is"
    for command in ("clean", "delete"):
        more = (str(corpus), "--out", str(tmp_path / "out.jsonl")) if command == "clean" else ()
        code, _, err = call(capsys, command, database.path, *more, "--ids", str(pooled))
        assert code == 1 and told in err and "ask again, or give their ids alone" in err
    assert not (tmp_path / "out.jsonl").exists() and database.count() == 24
    again = [record | {"output": "Mended, too."} for record in records if record["id"] in names[:2]]
    database.ingest(write_jsonl(tmp_path / "again.jsonl", again), on_duplicate="replace")
    with pytest.raises(SpecError, match=f"2 samples were written anew .* of, such as {min(names[:2])}: what"):
        read_ids(pooled, database)
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(names))
    assert read_ids(plain, database) == names
    database.delete(ids=names[:2])
    assert read_ids(pooled, database) == names, "what is gone is no other text"
