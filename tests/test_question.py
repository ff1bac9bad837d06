"""What may be asked: values out of range are refused, whatever their type; nothing is answered to no question."""

import pytest

from rapidin_vdb.errors import SampleNotFoundError, SpecError, TableError
from rapidin_vdb.question import Question


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 0}, "--top-k is 0; wanted 1 or more"),
        ({"top_k": 2.5}, "--top-k is 2.5; wanted a whole number, 1 or more"),
        ({"top_k": "3"}, "--top-k is '3'"),
        ({"top_k": True}, "--top-k is True"),
        ({"refine": -1}, "--refine is -1; wanted 0 or more"),
        ({"refine": 1.0}, "--refine is 1.0"),
        ({"histogram": 1001}, "histogram is 1001; wanted a number of bins from 0 .none. to 1000"),
        ({"most_groups": -1}, "most_groups is -1"),
        ({"level": "tokens"}, "--level is 'tokens'; wanted sample or token"),
        ({"aggregate": "median"}, "--aggregate is 'median'; wanted sum or mean"),
        ({"aggregate": "mean"}, "--aggregate mean goes with --group-by"),
        ({"where": 5}, "--where is 5; wanted an expression of SQL, as a text"),
        ({"as_of": 1.5}, "--as-of is 1.5"),
        ({"as_of": True}, "--as-of is True"),
    ],
)
def test_what_is_out_of_range_is_refused(changed, message):
    question = Question()
    for name, value in changed.items():  # by this road, for the tests' own check of types is not there otherwise
        object.__setattr__(question, name, value)
    with pytest.raises(SpecError, match=message):
        question.__post_init__()


def test_no_queries_have_no_rankings(database):
    assert database.query(queries=[]) == []
    database.load()
    assert list(database.ask(Question(), [])) == []


def test_ids_with_half_of_a_surrogate_pair_are_of_no_sample(database):
    with pytest.raises(SampleNotFoundError, match="no sample"):
        database.show("a\udcff")
    with pytest.raises(SampleNotFoundError, match="no sample"):
        database.nearest("a\udcff", Question())
    snapshot = database._table.snapshot()
    assert (
        list(snapshot.samples(["a\udcff", "toy-001"])) == list(snapshot.encoded(["a\udcff", "toy-001"])) == ["toy-001"]
    )


def test_after_a_purge_it_is_said_which_version_there_is(database):
    database.delete(ids=["toy-001"], purge=True)
    newest = database.info().table_version
    assert newest > 1
    with pytest.raises(TableError, match=f"no longer; only the newest is kept, {newest} .see"):
        database.query("Say 5", "blue 35", as_of=1)


def test_only_the_column_is_looked_for_before_a_model_is_loaded(database, monkeypatch):
    """Its values are read once, where they are needed."""
    reads, read = [], type(database._table.snapshot()).group_of
    monkeypatch.setattr(
        type(database._table.snapshot()), "group_of", lambda self, column: (reads.append(column), read(self, column))[1]
    )
    assert len(database.query("Say 5", "blue 35", group_by="Source")[0].groups) == 2
    assert reads == ["Source"]


def test_the_groups_of_largest_influence(database):
    (whole,) = database.query("Say 5", "blue 35", group_by="sample_id")
    (some,) = database.ask(Question(group_by="sample_id", most_groups=5), _asked())
    far = sorted(whole.groups, key=lambda group: -abs(group.score))[:5]
    assert some.groups == tuple(group for group in whole.groups if group in far)
    assert (some.groups_left_out, some.to_dict()["groups_left_out"]) == (19, 19)
    assert whole.groups_left_out is None and "groups_left_out" not in whole.to_dict()


def _asked():
    from rapidin_vdb.query import query_from

    return [query_from("Say 5", "blue 35")]
