"""Rankings as tables: every computed column, whatever the records call their fields, with results and without."""

import dataclasses
import hashlib
import json
import shutil

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.question import Question
from rapidin_vdb.results import RankedSample, RankedToken, Ranking, Seconds, TokenScore
from rapidin_vdb.results.rankings import COMPUTED
from rapidin_vdb.results.tables import arrow_table

ASKED = ("Say 5", "blue 35")


def ranked(*metadata, **more) -> Ranking:
    results = tuple(
        RankedSample(
            rank=number, sample_id=f"s{number}", score=-0.5 / number, exact_score=None, split="train", source=None,
            prompt=None, response="blue", metadata=fields, tokens=None, **more,
        )
        for number, fields in enumerate(metadata, start=1)
    )  # fmt: skip
    seconds = Seconds(gradient=0.0, search=0.0, tokens=0.0, total=0.0)
    return Ranking(query_id="q", score_unit="", searched=9, where=None, seconds=seconds, results=results)


def tokens_of(ranking: Ranking) -> Ranking:
    """The same of tokens."""
    results = []
    for result in ranking.results:
        values = {
            field.name: getattr(result, field.name)
            for field in dataclasses.fields(RankedToken)
            if hasattr(result, field.name)
        }
        results.append(RankedToken(**values | {"token_index": 3, "text": "lu", "start": 1, "end": 3}))
    return dataclasses.replace(ranking, results=tuple(results), matching=9, without_tokens=0)


@pytest.mark.parametrize("level", ["sample", "token"])
@pytest.mark.parametrize("both", [False, True])
def test_no_field_of_a_record_takes_the_place_of_what_is_computed(level, both):
    names = {name for kind in (RankedSample, RankedToken) for name in (f.name for f in dataclasses.fields(kind))}
    assert names | {"query_id", "end", "side"} == COMPUTED | {"metadata"}
    fields = {name: f"mine: {name}" for name in (*sorted(COMPUTED), "stars", "Start", "record_start")}
    ranking = ranked(fields, fields)
    if level == "token":
        ranking = tokens_of(ranking)
    plain = dataclasses.replace(ranking, results=tuple(dataclasses.replace(r, metadata={}) for r in ranking.results))
    if both:
        ranking, plain = (dataclasses.replace(one, harmful=one.results[::-1]) for one in (ranking, plain))
    table, own = ranking.to_arrow(), plain.to_arrow()
    assert table.select(own.column_names).equals(own), "as of records that have no such fields"
    kept = {name: table[name][0].as_py() for name in table.column_names if name not in own.column_names}
    assert kept == {f"record_{name}": f"mine: {name}" for name in COMPUTED} | {
        "stars": "mine: stars", "record_Start": "mine: Start", "record_record_start": "mine: record_start"
    }  # fmt: skip
    if both:
        assert own["side" if level == "token" else "end"].to_pylist() == ["helpful"] * 2 + ["harmful"] * 2
    if level == "token":
        assert (own["end"].to_pylist(), own["token_index"].to_pylist()) == ([3] * len(own), [3] * len(own))


def test_fields_that_the_first_result_lacks_are_columns():
    table = ranked({}, {"stars": 4}, {"lang": "en"}).to_arrow()
    assert table["stars"].to_pylist() == [None, 4, None] and table["lang"].to_pylist() == [None, None, "en"]
    frame = ranked({}, {"stars": 4}).to_pandas()
    assert list(frame["stars"].dropna()) == [4]


@pytest.mark.parametrize("values", [(True, 1), (1, "a"), (2**60, 0.5), (2**70, None), ("\ud800", 3)])
def test_values_without_a_type_in_common_are_json(values):
    found = ranked(*({"note": value} for value in values)).to_arrow()["note"].to_pylist()
    assert [None if text is None else json.loads(text) for text in found] == list(values)


def test_so_are_lists_beside_numbers():
    """No database has them; a ranking that was made by hand may."""
    table = arrow_table([{"a": 1, "b": {"c": 1}}, {"a": [2], "b": "d"}, {}], {"score": float})
    assert table["a"].to_pylist() == ["1", "[2]", None] and table["b"].to_pylist() == ['{"c": 1}', '"d"', None]
    assert table["score"].to_pylist() == [None] * 3


def test_a_table_of_no_results_has_its_columns():
    some, nobody = ranked({}), dataclasses.replace(ranked(), harmful=())
    table, frame = nobody.to_arrow(), nobody.to_pandas()
    assert table.num_rows == len(frame) == len(frame["score"]) == 0
    assert table.schema.remove(1) == some.to_arrow().schema and table.column_names[1] == "end"
    assert {name: str(some.to_arrow().schema.field(name).type) for name in ("score", "exact_score", "rank", "prompt", "truncated")} == {
        "score": "double", "exact_score": "double", "rank": "int64", "prompt": "string", "truncated": "bool"
    }  # fmt: skip
    token = tokens_of(ranked()).to_arrow()
    assert token.schema == tokens_of(ranked({})).to_arrow().schema and token["start"].to_pylist() == []


def test_tokens_matrices_and_differences_are_columns(database):
    options = {"tokens": True, "matrix": True}
    (ranking,) = database.query(*ASKED, top_k=3, **options)
    (nobody,) = database.query(*ASKED, where="stars > 99", **options)
    table = ranking.to_arrow()
    assert nobody.to_arrow().schema.equals(table.schema.remove(table.schema.get_field_index("stars")))
    for row, result in zip(table.to_pylist(), ranking.results, strict=True):
        assert [TokenScore(**token) for token in row["tokens"]] == list(result.tokens)
        assert row["matrix"] == result.to_dict()["matrix"] and row["truncated"] is False
        assert row["difference"] == result.to_dict()["difference"] == result.score - result.exact_score != 0
    (plain,) = database.query(*ASKED, top_k=3)
    assert plain.to_arrow()["difference"].to_pylist() == [None] * 3 and "difference" not in plain.results[0].to_dict()
    (few,) = database.query(*ASKED, top_k=3, refine=1)
    assert [result.difference is None for result in few.results] == [False, True, True]


def test_records_whose_fields_are_named_like_ours_come_out_whole(database, tmp_path):
    """Also those that make a crash, as a list of spans and a text in one column would."""
    clashing = {"tokens": "many", "matrix": "of films", "end": "happy", "start": 7, "text": "t", "token_index": 1.5}
    some = [record | clashing for record in toy_records(2, first=50)]
    database.ingest(write_jsonl(tmp_path / "more.jsonl", some), token_gradients=True, token_width=16)
    asked = {"where": "end = 'happy'", "top_k": 4, "both": True}
    for options in ({"matrix": True, "tokens": True}, {}, {"level": "token"}):
        (ranking,) = database.query(*ASKED, **asked, **options)
        rows = ranking.to_arrow().to_pylist()
        assert [row["score"] for row in rows] == [r.score for r in (*ranking.results, *ranking.harmful)]
        for row in rows:
            assert {name: row[f"record_{name}"] for name in clashing} == clashing


def stored_identity(database) -> str:
    """What was written into the table when the database was made."""
    return database._table._table.schema.metadata[b"rapidin_vdb.identity"].decode()


def test_a_ranking_says_of_which_version_it_is_and_can_be_repeated(database, tmp_path):
    first = database.info().table_version
    (before,) = database.query(*ASKED, top_k=5)
    changed = [record | {"output": "other"} for record in toy_records(6)]
    database.ingest(write_jsonl(tmp_path / "changed.jsonl", changed), on_duplicate="replace")
    (after,) = database.query(*ASKED, top_k=5)
    near = database.nearest("toy-009", Question(top_k=5))
    now = database.versions()[-1].version
    assert (before.table_version, after.table_version, near.table_version) == (first, now, now) and first < now
    assert before.results != after.results
    for one in (database, rapidin_vdb.open(database.path)):
        (again,) = one.query(*ASKED, top_k=5, as_of=before.table_version)
        assert again == dataclasses.replace(before, seconds=again.seconds)
    for options in ({"tokens": True}, {"refine": 3}, {"group_by": "source", "histogram": 3}, {"where": "stars > 99"}):
        (found,) = database.query(*ASKED, top_k=2, **options)
        assert list(found.to_dict())[-2:] == ["table_version", "identity"]
        assert (found.table_version, found.identity) == (now, stored_identity(database))
    assert not {"table_version", "identity"} & set(ranked({}).to_dict()), (
        "of one that was made by hand nothing is known"
    )


def test_a_ranking_says_of_which_database_it_is(database, tmp_path, models, adapters):
    """Not where that is: a copy has the same samples, and another one at the same place has not."""
    (here,) = database.query(*ASKED)
    assert here.identity == stored_identity(database) == database.identity
    shutil.copytree(tmp_path / "db", tmp_path / "copy")
    (there,) = rapidin_vdb.open(tmp_path / "copy").query(*ASKED)
    assert there == dataclasses.replace(here, seconds=there.seconds)
    shutil.rmtree(tmp_path / "db")
    anew = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    anew.ingest(tmp_path / "toy.jsonl")
    (other,) = anew.query(*ASKED)
    assert [result.sample_id for result in other.results] == [result.sample_id for result in here.results]
    assert other.identity == stored_identity(anew) != here.identity


def test_a_database_of_before_there_was_a_mark_is_known_by_where_and_what_it_is(
    tmp_path, models, adapters, monkeypatch
):
    monkeypatch.setattr("rapidin_vdb.store.table.new_identity", lambda: {})
    made = rapidin_vdb.init(tmp_path / "old", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(3)))
    written = made._table._table.schema.metadata
    assert b"rapidin_vdb.identity" not in written
    mark = hashlib.sha256(made.path.encode() + written[b"rapidin_vdb.fingerprint"]).hexdigest()[:32]
    (found,) = made.query(*ASKED)
    assert found.identity == mark == made.identity
