"""The table: filters, fingerprints, columns that grow, and what is refused."""

import json
import shutil
import subprocess
import sys
from datetime import datetime

import lance
import lancedb
import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from reference import ids_in

from rapidin_vdb.errors import FilterError, TableError, TableExistsError, TableNotFoundError
from rapidin_vdb.records import Encoded, Fingerprint, ParameterShape, Sample, SketchSpec
from rapidin_vdb.store import Row, SampleTable, merge_kinds
from rapidin_vdb.store.changes import delete_rows
from rapidin_vdb.store.commits import word_for
from rapidin_vdb.store.filters import checked_filter
from rapidin_vdb.store.place import place_of

FINGERPRINT = Fingerprint(
    model="m", model_hash="1", adapter=None, adapter_hash=None, quantization="none", dtype="float32",
    tokenizer_hash="2", template="text", template_text="", max_tokens=9, loss="mean", normalize="layer",
    parameters="all", theta=(ParameterShape(name="w", shape=(4, 4)),), sketch=SketchSpec(width=8),
    epochs=1.0, learning_rate=1.0,
)  # fmt: skip


def row(sample_id: str, *, value: float = 1.0, split: str = "train", content: str = "c", **metadata) -> Row:
    return Row(
        sample=Sample(
            sample_id=sample_id,
            prompt=None,
            response="ab",
            split=split,
            source=None,
            metadata=metadata,
            content_hash=content,
        ),
        encoded=Encoded(sample_id=sample_id, input_ids=(1, 5, 6), offsets=((0, 1), (1, 2)), truncated=False),
        loss=0.5,
        vector=np.full(8, value, np.float16),
    )


@pytest.fixture
def table(tmp_path):
    made = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    made.ensure_columns({"stars": "int", "lang": "str", "ok": "bool"})
    made.append(
        seen=0,
        rows=[
            row("a", stars=1, lang="en", ok=True),
            row("b", stars=2, lang="it's", split="test"),
            row("c\nd", value=2.0, ok=False),
        ],
    )
    return made


def test_lance_holds_little_however_many_commits_there_were(tmp_path, monkeypatch):
    """Of each it would keep a manifest, which names all that is there: what they take grows with their square."""
    sessions, make = [], lancedb.Session

    def noted(**options):
        sessions.append(make(**options))
        return sessions[-1]

    monkeypatch.setattr(lancedb, "Session", noted)
    monkeypatch.setattr("rapidin_vdb.store.place._METADATA_BYTES", 1 << 20)
    made = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    seen = 0
    for number in range(120):
        seen = made.append([row(str(number))], seen=seen).seen
    assert made.snapshot().rows() == 120
    held = [session.size_bytes for session in sessions]
    assert 0 < max(held) < 2 << 20, held


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, {"a", "b", "c\nd"}),
        ("split = 'train'", {"a", "c\nd"}),
        ("SPLIT = 'test' OR stars < 2", {"a", "b"}),
        ("lang = 'it''s'", {"b"}),
        ("lang IS NULL", {"c\nd"}),
        ("NOT ok", {"c\nd"}),
        ("lang = ';--/*'", set()),
        ("sample_id IN ('a', 'zz')", {"a"}),
        ("tokens = 2 AND loss BETWEEN 0.4 AND 0.6 AND response LIKE 'a%'", {"a", "b", "c\nd"}),
    ],
)
def test_filters(table, where, expected):
    found = ids_in(table.snapshot(), where)
    assert sorted(found) == sorted(expected)
    assert table.snapshot().count(where) == len(expected)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nosuch = 1", "No field named nosuch.*Columns are: sample_id .string., split .string.*stars .int64."),
        ("split = ", "is not understood: .*an expression"),
        ("split", "does not return a boolean"),
        ("split = 'train' garbage", "is not understood"),
        ("split = 'train'; DROP TABLE samples", "holds a second statement"),
        ("split = 'train' -- and more", "holds a comment"),
        ("split = 'train' /* x */", "holds a comment"),
        ("split = 'train') OR (true", "the parentheses do not match"),
        ("split = 'train", "a quote is not closed"),
        ("  ", "the filter is empty"),
        ("sample_id IN (SELECT 1)", "not supported"),
        ('split = "train"', "No field named train"),
        ("stars = 'x'", "is not understood"),
    ],
)
def test_filters_that_are_refused(table, where, message):
    with pytest.raises(FilterError, match=message):
        ids_in(table.snapshot(), where)
    with pytest.raises(FilterError, match=message):
        table.delete_where(where)
    assert table.snapshot().count() == 3


def test_a_filter_stays_inside_its_parentheses():
    assert checked_filter("a = '(' OR b = 2") == "(a = '(' OR b = 2)"


def test_what_is_written_is_read(table):
    found = table.snapshot().samples(["a", "c\nd", "zz"])
    assert sorted(found) == ["a", "c\nd"]
    assert found["a"].to_dict() == {
        "sample_id": "a", "split": "train", "source": None, "prompt": None, "response": "ab",
        "token_offsets": ((0, 1), (1, 2)), "tokens": 2, "truncated": False, "loss": 0.5,
        "metadata": {"stars": 1, "lang": "en", "ok": True},
    }  # fmt: skip
    assert found["c\nd"].metadata == {"ok": False}
    vectors = {
        name: vector[0]
        for batch in table.snapshot().vectors()
        for name, vector in zip(batch.keys, batch.vectors, strict=True)
    }
    assert vectors == {"a": 1.0, "b": 1.0, "c\nd": 2.0}
    assert SampleTable(table.uri).fingerprint == FINGERPRINT


def test_rows_that_somebody_else_added_meanwhile_are_not_added_again(table):
    """Two ingests of one file at once: the later commit leaves out what the earlier wrote."""
    seen = table.snapshot().version
    other = SampleTable(table.uri)
    done = other.append([row("x"), row("y"), row("late")], seen=seen)
    assert (done.written, done.unchanged, done.other, done.seen) == (3, 0, (), seen + 1)
    # Not the version now: what the other wrote may come up again.
    done = table.append([row("y", value=5.0), row("z")], seen=seen)
    assert (done.written, done.unchanged, done.other, done.seen) == (1, 1, (), seen)
    done = table.append([row("late", value=5.0)], seen=done.seen)
    assert (done.written, done.unchanged, done.seen) == (0, 1, seen)
    differing = row("x", content="other")
    done = table.append([differing, row("v")], seen=seen)
    assert (done.written, done.unchanged, done.other) == (1, 0, (differing,)), "left out, and said"
    assert sorted(ids_in(table.snapshot())) == ["a", "b", "c\nd", "late", "v", "x", "y", "z"]
    assert table.replace([row("z", value=6.0)], seen=seen) == seen
    alone = table.snapshot().version
    done = table.append([row("w")], seen=alone)
    assert (done.written, done.seen) == (1, alone + 1)
    assert table.replace([row("w", value=7.0)], seen=alone + 1) > alone + 1


def test_what_lance_raises_is_told(table, tmp_path):
    (data,) = (tmp_path / "db" / "samples.lance" / "data").iterdir()
    data.unlink()
    with pytest.raises(TableError, match="the vectors of .* cannot be read: .*Not found"):
        list(table.snapshot().vectors())


def test_a_folder_may_be_named_by_a_uri_and_other_schemes_are_refused(table):
    assert SampleTable(f"file://{table.uri}").snapshot().count() == 3
    with pytest.raises(TableError, match="ftp://host/db: databases on ftp:// are not supported"):
        SampleTable("ftp://host/db")


def test_copies_that_went_their_own_ways_have_other_digests(table, tmp_path):
    shutil.copytree(table.uri, tmp_path / "copy")
    copy = SampleTable(str(tmp_path / "copy"))
    assert copy.snapshot().digest == table.snapshot().digest
    copy.delete_ids(["a"])
    table.delete_ids(["b"])
    assert copy.snapshot().version == table.snapshot().version
    assert copy.snapshot().digest != table.snapshot().digest


def test_a_snapshot_does_not_see_later_commits(table):
    before = table.snapshot()
    table.append([row("late")], seen=0)
    table.delete_ids(["a"])
    assert sorted(ids_in(before)) == ["a", "b", "c\nd"]
    assert sorted(ids_in(table.snapshot())) == ["b", "c\nd", "late"]
    assert "a" in before.samples(["a"])


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_a_change_is_not_tried_again_on_a_version_that_nobody_looked_at(table, monkeypatch, change):
    """Lance would do so by itself where another commit came between."""
    stale = table.place.dataset("samples")
    table.replace([row("a", value=7.0)], seen=0)
    monkeypatch.setattr(table.place, "dataset", lambda name: stale)
    with pytest.raises(TableError, match="another writer took over meanwhile"), table.committing():
        if change == "delete":
            delete_rows(table.place, "samples", "sample_id = 'a'")
        else:
            table.replace([row("a", value=8.0)], seen=0)
    assert SampleTable(table.place.uri).snapshot().vector_of("a")[0] == 7.0


def test_replace_and_delete(table):
    table.replace([row("a", value=9.0), row("new")], seen=0)
    assert sorted(ids_in(table.snapshot())) == ["a", "b", "c\nd", "new"]
    assert {
        vector[0]
        for batch in table.snapshot().vectors()
        for name, vector in zip(batch.keys, batch.vectors, strict=True)
        if name == "a"
    } == {9.0}
    assert table.delete_ids(["b", "zz", "c\nd"]) == ["b", "c\nd"]
    assert table.delete_where("sample_id = 'new'") == 1
    assert table.delete_where("sample_id = 'new'") == 0
    assert ids_in(table.snapshot()) == ["a"]


def test_rows_keep_their_ids_and_say_when_they_changed(table):
    """What an index is kept fresh by."""
    before = table.snapshot()
    row_ids, versions = before.row_keys()
    table.replace([row("a", value=9.0), row("new")], seen=0)
    table.delete_ids(["b"])
    table.ensure_scalar_indices()  # a version of its own, in which no row changes
    after = table.snapshot()
    changed = dict(zip(*(part.tolist() for part in after.row_keys()), strict=True))
    names = {one: name for name, one in zip(*after.keys_in_order()[:2], strict=True)}
    assert sorted(names.values()) == ["a", "c\nd", "new"]
    stayed = {one: version for one, version in zip(row_ids.tolist(), versions.tolist(), strict=True)}
    assert {names[one] for one in changed if changed[one] == stayed.get(one)} == {"c\nd"}
    assert {names[one] for one in changed if one in stayed} == {"a", "c\nd"}
    taken = [batch for batch in after.vectors(np.array(sorted(one for one in names if names[one] == "a")))]
    assert [(batch.keys, batch.vectors[0, 0]) for batch in taken] == [(["a"], 9.0)]
    assert before.digest == after.digest_of(before.version) != after.digest
    assert after.digest_of(10**6) is None


def test_many_rows_taken_are_those_asked_for(table):
    table.append([row(f"m{number:03d}", value=number) for number in range(100)], seen=table.snapshot().version)
    snapshot = table.snapshot()
    names, row_ids, _ = snapshot.keys_in_order()
    for wanted in (3, 60):  # one by one, and in a scan
        chosen = np.random.default_rng(0).choice(row_ids, wanted, replace=False)
        got = {
            name: vector[0]
            for batch in snapshot.vectors(chosen)
            for name, vector in zip(batch.keys, batch.vectors, strict=True)
        }
        assert sorted(got) == sorted(names[row_ids.tolist().index(one)] for one in chosen)
        assert all(value == int(name[1:]) for name, value in got.items() if name.startswith("m"))


def test_older_versions_and_columns_to_group_by(table):
    before = table.snapshot()
    table.delete_ids(["a"])
    assert sorted(ids_in(table.snapshot(before.version))) == ["a", "b", "c\nd"]
    for version in (999, 0, -3, 2**70):
        with pytest.raises(TableError, match=f"has no version {version}, or no longer; wanted one from 1 to "):
            table.snapshot(version)
    row_ids, values = table.snapshot().group_of("SPLIT")
    assert (len(row_ids), sorted(values)) == (2, ["test", "train"])
    with pytest.raises(FilterError, match="no column 'vector' to group by. Columns are: sample_id"):
        table.snapshot().group_of("vector")


def test_scalar_indices_change_no_answer(table):
    table.ensure_scalar_indices()
    version = table.snapshot().version
    table.ensure_scalar_indices()
    assert table.snapshot().version == version, "nothing to catch up with"
    before = table.snapshot().count("split = 'train'")
    table.append([row(f"m{number:03d}", split="train") for number in range(20)], seen=version)
    assert table.snapshot().count("split = 'train'") == before + 20
    table.ensure_scalar_indices()
    assert table.snapshot().version > version + 1
    assert table.snapshot().count("split = 'train'") == before + 20
    assert 0 < before < 3


def test_columns_grow_and_widen_but_never_change_their_meaning(table):
    table.ensure_columns({"stars": "float", "extra": "str", "Two Words": "int"})
    table.ensure_columns({"Two Words": "float"})
    table.append([row("f", stars=2.5, extra="e", lang=7)], seen=0)
    found = table.snapshot().samples(["a", "f"])
    assert (found["a"].metadata, found["f"].metadata) == (
        {"stars": 1.0, "lang": "en", "ok": True},
        {"stars": 2.5, "lang": "7", "extra": "e"},
    )
    with pytest.raises(TableError, match="the records' field ok is str, but the column ok holds bool"):
        table.ensure_columns({"ok": "str", "more": "int"})
    table.ensure_columns({"Lang": "str"})
    table.append([row("g", LANG="de")], seen=0)
    assert table.snapshot().samples(["g"])["g"].metadata == {"lang": "de"}, "names are one when only case differs"
    assert "more" not in table.snapshot().schema.names
    assert SampleTable(table.uri).fingerprint == FINGERPRINT, "a new column keeps the fingerprint"


@pytest.mark.parametrize(
    ("value", "fits"), [(1 << 53, True), (-(1 << 53), True), ((1 << 53) + 1, False), (-(1 << 62), False)]
)
def test_whole_numbers_that_floating_point_cannot_hold_are_not_widened(table, value, fits):
    table.ensure_columns({"huge": "int"})
    table.append([row("f", huge=value)], seen=0)
    if fits:
        table.ensure_columns({"huge": "float"})
    else:
        with pytest.raises(TableError, match="the column huge holds whole numbers beyond 9007199254740992"):
            table.ensure_columns({"huge": "float"})
    assert table.snapshot().samples(["f"])["f"].metadata == {"huge": value}


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("writer", ["columns", "append", "replace", "delete", "ids", "purge", "indices"])
def test_a_widening_that_was_cut_short_is_finished(table, dropped, writer):
    """Killed after the copy was made, or after the old column went: readers see neither, and no writer loses a field."""
    seen = table.snapshot().version
    table._table.add_columns({"_widened_stars": "CAST(stars AS DOUBLE)"})
    if dropped:
        table._table.drop_columns(["stars"])
    half = table.snapshot()
    assert (
        half.version == seen
        and "stars (int64)" in half.columns
        and not any("_widened" in name for name in half.columns)
    )
    assert half.samples(["b"])["b"].metadata["stars"] == 2 and ids_in(half, "stars = 2") == ["b"]
    {
        "columns": lambda: table.ensure_columns({"stars": "float"}),
        "append": lambda: table.append([row("new", stars=7)], seen=seen),
        "replace": lambda: table.replace([row("new", stars=7)], seen=seen),
        "delete": lambda: table.delete_where("sample_id = 'a'"),
        "ids": lambda: table.delete_ids(["a"]),
        "purge": lambda: table.purge(),
        "indices": lambda: table.ensure_scalar_indices(),
    }[writer]()
    after = table.snapshot()
    assert "stars (double)" in after.columns and "_widened_stars" not in after.schema.names
    found = after.samples(["b", "new"])
    assert found["b"].metadata == {"stars": 2.0, "lang": "it's"}
    assert ("new" in found) == (writer in ("append", "replace"))
    assert all(sample.metadata["stars"] == 7.0 for name, sample in found.items() if name == "new")


def test_kinds_merge():
    kinds = {}
    for metadata in ({"a": 1, "b": True, "c": "x"}, {"A": 2.5, "b": None, "c": 1}, {"b": 1}):
        kinds = merge_kinds(kinds, metadata)
    assert kinds == {"a": "float", "b": "str", "c": "str"}


def test_places(tmp_path, table):
    with pytest.raises(TableExistsError, match="a database is already at .*; add to it with: rapidin-vdb ingest"):
        SampleTable.create(table.uri, FINGERPRINT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    with pytest.raises(TableExistsError, match="is not empty, and what it holds is no database"):
        SampleTable.create(str(tmp_path / "full"), FINGERPRINT)
    with pytest.raises(TableNotFoundError, match="no database at .*nowhere; make one with: rapidin-vdb init"):
        SampleTable(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    # What an init that died leaves is no database, and is begun again.
    (tmp_path / "db2" / "samples.lance" / "data").mkdir(parents=True)
    with pytest.raises(TableNotFoundError, match="no database at .*db2"):
        SampleTable(str(tmp_path / "db2"))
    assert SampleTable.create(str(tmp_path / "db2"), FINGERPRINT).snapshot().count() == 0
    next((tmp_path / "db2" / "samples.lance" / "_versions").glob("*.manifest")).write_bytes(b"x")
    with pytest.raises(TableError, match="cannot be opened"):
        SampleTable(str(tmp_path / "db2"))


def test_a_table_of_somebody_else_is_refused(tmp_path):
    import lancedb

    lancedb.connect(str(tmp_path / "other")).create_table("samples", [{"x": 1}])
    with pytest.raises(TableError, match="has no fingerprint; it was not made by rapidin-vdb init"):
        SampleTable(str(tmp_path / "other"))


CHAINS = {
    "sums": ("stars = 1", " + 1"), "signs": ("stars = ", "- "), "comparisons": ("stars", " = stars"), "casts": ("stars = 1", "::int"),
    "texts": ("sample_id = 'a'", " || 'a'"), "nulls": ("stars", " IS NULL"), "lists": ("stars", " IN (1)"),
    "ranges": ("stars", " BETWEEN 1 AND 2"), "patterns": ("sample_id", " LIKE 'x'"), "negations": ("", "NOT "),
}  # fmt: skip
ENDS = {"signs": "1", "negations": "ok"}
ASK = """
import json, sys
from rapidin_vdb.errors import FilterError
from rapidin_vdb.store import SampleTable
snapshot = SampleTable(sys.argv[1]).snapshot()
for number, where in enumerate(json.load(sys.stdin)):
    try:
        snapshot.count(where)
        print(number, flush=True)
    except FilterError as error:
        print(number, error, flush=True)
"""


def test_an_expression_too_deep_for_lance_does_not_end_the_process(table):
    """In a process of its own: beyond some thousand operators Lance's recursion ends it with a signal."""
    asked = [("stars" + " = stars" * 60 + " + 1" * 60, False)]
    for kind, (first, further) in CHAINS.items():
        for count, refused in ((110, False), (1100, True)):
            asked.append((first + count * further + ENDS.get(kind, ""), refused))
    wheres = json.dumps([where for where, _ in asked])
    done = subprocess.run([sys.executable, "-c", ASK, table.uri], input=wheres, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert done.returncode == 0, (asked[len(told)][0][:60], done.returncode, done.stderr[-300:])
    assert ["operators" in line for line in told] == [refused for _, refused in asked], told


def test_many_alternatives_are_no_deep_expression(table):
    assert table.snapshot().count(" OR ".join(f"sample_id = '{name}'" for name in [*"ab", *map(str, range(900))])) == 2


def test_a_database_that_somebody_else_made_meanwhile_is_not_removed(table, monkeypatch):
    """Two inits of one place: both found it free, and the other was faster."""
    real, looks = SampleTable.check_free, []

    def check_free(uri):
        looks.append(uri)
        if len(looks) > 1:
            real(uri)

    monkeypatch.setattr(SampleTable, "check_free", staticmethod(check_free))
    before = sorted(ids_in(table.snapshot()))
    with pytest.raises(TableExistsError, match="a database is already at"):
        SampleTable.create(table.uri, FINGERPRINT)
    assert sorted(ids_in(SampleTable(table.uri).snapshot())) == before != []


def test_the_versions_that_can_be_asked(database, tmp_path):
    """Each is listed with what a query as of it searches, also where only an answer changed."""
    first, begun = database.info().table_version, datetime.now().astimezone()
    new = toy_records(1, first=50)
    database.ingest(write_jsonl(tmp_path / "more.jsonl", new))
    for answer in ("another", "a third"):
        database.ingest(write_jsonl(tmp_path / "new.jsonl", [new[0] | {"output": answer}]), on_duplicate="replace")
    database.delete(ids=["toy-050"])
    before = datetime.now().astimezone()
    kept = {version.version: version for version in database.versions()}
    assert sorted(kept) == list(range(min(kept), database.version + 1)) and first in kept
    assert database.version == database.info().table_version == max(kept)
    assert [kept[first + more].samples for more in (0, 1, 2, 3, 4)] == [24, 25, 25, 25, 24]
    assert [kept[first + more].made_by for more in (1, 2, 3, 4)] == ["ingest", "replace", "replace", "delete"]
    assert kept[first].made < begun < kept[first + 1].made < kept[max(kept)].made <= before
    for version in kept.values():
        (ranking,) = database.query("Say 5", "blue 35", top_k=99, as_of=version.version)
        assert ranking.searched == len(ranking.results) == version.samples
    said = [
        [r.response for r in database.query("Say 5", "blue 35", top_k=99, as_of=version)[0].results if r.sample_id == "toy-050"]
        for version in range(first, first + 5)
    ]  # fmt: skip
    assert said == [[], [new[0]["output"]], ["another"], ["a third"], []]
    database.delete(where="stars = 2", purge=True)
    (newest,) = database.versions()
    assert (newest.samples, newest.made_by) == (database.info().samples, "purge")
    wide = [toy_records(1, first=60 + number)[0] | {"weight": weight} for number, weight in enumerate((1, 1.5))]
    for record in wide:
        database.ingest(write_jsonl(tmp_path / "wide.jsonl", [record]))
    made = [version.made_by for version in database.versions()]
    assert list(dict.fromkeys(made)) == ["purge", "columns", "ingest"] and made[-1] == "ingest"


def test_what_made_a_version_is_only_said_where_it_is_known():
    def word(operation, **marks) -> str:
        return word_for(lance.Transaction(1, operation, transaction_properties=marks))

    restored = lance.LanceOperation.Restore(1)
    assert [word_for(None), word(restored), word(restored, **{"rapidin_vdb.fence": ""})] == ["", "", "fence"]
    appended = lance.LanceOperation.Append([])
    assert [word(appended), word(appended, **{"rapidin_vdb.purged": "now"})] == ["ingest", "purge"]


def test_a_list_of_versions_beside_a_purge(database, monkeypatch):
    """One that goes away meanwhile is no error: the list is read anew."""
    read, calls = type(database._table.snapshot()).history, []

    def history(snapshot):
        if not calls:
            database.delete(where="stars = 1", purge=True)
        calls.append(snapshot.version)
        return read(snapshot)

    monkeypatch.setattr(type(database._table.snapshot()), "history", history)
    (newest,) = database.versions()
    assert newest.version == database.version and calls == sorted(calls)


def test_values_of_a_column_are_looked_at_until_there_are_too_many(database, monkeypatch):
    from rapidin_vdb.store import snapshot as module

    snapshot, read = database._table.snapshot(), []
    for column in ("source", "stars", "sample_id"):
        wanted = sorted({*snapshot.group_of(column)[1]} - {None})
        assert snapshot.values_of(column, most=len(wanted)) == wanted
        assert snapshot.values_of(column, most=len(wanted) - 1) is None
    original = type(snapshot)._scan

    def watched(self, *arguments, **options):
        for batch in original(self, *arguments, **options):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(type(snapshot), "_scan", watched)
    monkeypatch.setattr(module, "_COUNTS_A_BATCH", 4)
    assert snapshot.values_of("sample_id", most=5) is None
    assert sum(read) < snapshot.rows(), "and no further"


def test_whether_there_is_a_table_is_known_by_its_first_version(table, tmp_path, monkeypatch):
    """The folder has a file for every commit."""
    import os

    place, taken, scandir = table.place, [], os.scandir

    class Counted:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                taken.append(entry.name)
                yield entry

    # Beside what Lance notes about the newest.
    assert len(list((tmp_path / "db" / "samples.lance" / "_versions").glob("*.manifest"))) > 2
    monkeypatch.setattr(os, "scandir", Counted)
    assert place.has_table("samples") and len(taken) <= 2
    assert not place.has_table("tokens") and not place_of(str(tmp_path / "none")).has_table("samples")
    (tmp_path / "file.lance").write_text("")
    assert not place_of(str(tmp_path)).has_table("file")
