"""A query answers from exactly the version asked for, whatever was built before and whatever came since."""

import gc
import json
import logging
import shutil
import threading
import weakref

import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from filelock import FileLock
from reference import ids_in, top_k

import rapidin_vdb
from rapidin_vdb import answering
from rapidin_vdb.errors import SpecError, TableError
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.index import ShardedIndex, list_manifests, with_recall
from rapidin_vdb.recipe import IndexRecipe
from rapidin_vdb.table_index import batches_of

RECIPES = {
    "cpu": IndexRecipe(name="cpu"),
    "float32": IndexRecipe(name="float32", element_type="float32", shards_per_device=2),
    "mapped": IndexRecipe(name="mapped", residence="mapped"),
    "streamed": IndexRecipe(name="streamed", residence="streamed", shards_per_device=1),
    "all_candidates": IndexRecipe(name="all_candidates", coarse_width=32, refine=100),
}
ASKED = ("Say 5", "blue 35")


def brute_force(database, k=100, as_of=None, where=None):
    """From the vectors of the table alone."""
    snapshot = database._table.snapshot(as_of)
    allowed = set(ids_in(snapshot, where))
    vectors = {
        name: vector
        for batch in snapshot.vectors()
        for name, vector in zip(batch.keys, batch.vectors, strict=True)
        if name in allowed
    }
    engine = database._loaded()
    from rapidin_vdb.query import encode_queries, query_from, sketch_queries

    encoded = encode_queries(
        [query_from(*ASKED)], tokenizer=engine.loaded.tokenizer, template=engine.template, max_tokens=512
    )
    return top_k(vectors, sketch_queries(engine.maker, encoded).vectors[0], k)


def assert_answers(database, *, k=100, as_of=None, where=None, **options):
    (ranking,) = database.query(*ASKED, top_k=k, as_of=as_of, where=where, **options)
    expected = brute_force(database, k, as_of, where)
    assert [result.sample_id for result in ranking.results] == [name for name, _ in expected]
    np.testing.assert_allclose([result.score for result in ranking.results], [score for _, score in expected])
    return ranking


def change(database, tmp_path, round_number):
    """Add a few, replace one, delete one; a small part of the table each."""
    more = [
        {"id": f"r{round_number}-{n}", "instruction": f"Say {n}", "output": f"red {round_number} {n}"} for n in (1, 2)
    ]
    more.append({"id": "toy-002", "instruction": "Say 2", "output": f"changed {round_number}"})
    path = write_jsonl(tmp_path / f"more{round_number}.jsonl", more)
    database.ingest(path, on_duplicate="replace")
    database.delete(ids=[f"toy-{10 + round_number:03d}"])


@pytest.mark.parametrize("name", RECIPES)
def test_changes_reach_a_built_index_and_only_they(database, tmp_path, name, monkeypatch):
    database.index(RECIPES[name])
    assert_answers(database)
    read = []
    real = rapidin_vdb.freshness.batches_of

    def counted(snapshot, row_ids=None):
        read.append(None if row_ids is None else len(row_ids))
        return real(snapshot, row_ids)

    monkeypatch.setattr("rapidin_vdb.freshness.batches_of", counted)
    first = database.info().table_version
    for number in range(2):
        change(database, tmp_path, number)
        assert [index.fresh for index in database.info().indexes] == [False]
        # From memory, and in a process that finds the older index on disk.
        for one in (database, rapidin_vdb.open(database.path)):
            assert_answers(one)
            assert_answers(one, where="sample_id LIKE 'r%' OR stars > 2", k=3)
        assert [(index.fresh, index.samples) for index in database.info().indexes] == [(True, 25 + number)]
    assert read and None not in read and max(read) <= 3, "nothing but the difference is read"
    database.index(RECIPES[name])
    assert_answers(database)
    assert None not in read
    # An older version, and back.
    assert_answers(database, as_of=first)
    ranking = assert_answers(rapidin_vdb.open(database.path), as_of=first)
    assert ranking.searched == 24
    assert_answers(database)
    assert [index.fresh for index in database.info().indexes] == [True], "an older version is never put on disk"
    with pytest.raises(TableError, match="has no version 99999"):
        database.query(*ASKED, as_of=99999)
    with pytest.raises(TableError, match="version 1 of the database .* is empty"):
        database.query(*ASKED, as_of=1)


def test_an_older_version_does_not_push_out_the_newest(database, tmp_path, monkeypatch):
    read = []

    def counted(snapshot, row_ids=None):
        read.append(None if row_ids is None else len(row_ids))
        return batches_of(snapshot, row_ids)

    first = database.info().table_version
    change(database, tmp_path, 0)
    assert_answers(database)
    monkeypatch.setattr("rapidin_vdb.table_index.batches_of", counted)
    for _ in range(2):
        assert_answers(database, as_of=first)
        assert_answers(database)
    assert read == [None], "each is read once"
    # Where there is no room for both, one is made of the other.
    monkeypatch.setattr("rapidin_vdb.table_index.free_bytes", lambda device: 3 * 2 * 64 * 24)
    database._indexes["sample"]._residents.older = None
    assert_answers(database, as_of=first)
    assert_answers(database)
    assert_answers(database, as_of=first)
    residents = database._indexes["sample"]._residents
    assert residents.older is None and residents.newest.held.version == first
    assert read[1:] and None not in read[1:], "by the rows in which they differ"


def test_a_version_that_only_brings_scalar_indices_reads_no_row(database, monkeypatch):
    database.index("cpu")
    database._table._table.create_index("tokens", config=__import__("lancedb").index.BTree())
    assert [index.fresh for index in database.info().indexes] == [False]
    monkeypatch.setattr(
        "rapidin_vdb.store.version.TableVersion.vectors", lambda *a, **k: pytest.fail("vectors are read from the table")
    )
    again = rapidin_vdb.open(database.path)
    assert again.query(*ASKED)[0].searched == 24
    assert [index.fresh for index in database.info().indexes] == [True]


def test_many_parts_are_put_together_by_the_next_index(database, tmp_path, monkeypatch):
    monkeypatch.setattr("rapidin_vdb.freshness._MOST_PARTS", 3)
    database.index(RECIPES["streamed"])
    place = tmp_path / "db" / "indexes" / "streamed"
    for number in range(3):
        change(database, tmp_path, number)
        assert_answers(rapidin_vdb.open(database.path))
        assert len(list(place.glob("*.rows.npy"))) == 2 + number
    database.index(RECIPES["streamed"])
    assert len(list(place.glob("*.rows.npy"))) == 1
    assert_answers(rapidin_vdb.open(database.path))


def test_most_of_a_table_changed_is_made_anew(database, tmp_path):
    database.index("cpu")
    before = {path.name for path in (tmp_path / "db" / "indexes" / "cpu").glob("*.rows.npy")}
    database.delete(where="stars > 2")
    assert_answers(database)
    info = database.index("cpu")
    after = {path.name for path in (tmp_path / "db" / "indexes" / "cpu").glob("*.rows.npy")}
    assert not before & after
    assert (info.fresh, info.samples) == (True, database.info().samples)
    assert_answers(rapidin_vdb.open(database.path))


def test_a_folder_that_cannot_be_written_is_updated_in_memory(database, tmp_path, monkeypatch, caplog):
    for recipe in RECIPES.values():
        database.index(recipe)
    change(database, tmp_path, 1)

    def refused(*arguments, **options):
        raise PermissionError("read-only file system")

    monkeypatch.setattr("rapidin_vdb.freshness.extend_index", refused)
    for name in RECIPES:
        assert_answers(rapidin_vdb.open(database.path), index=name)
    assert "cannot be brought up to date on disk: read-only file system" in caplog.text
    assert [index.fresh for index in database.info().indexes] == [False] * len(RECIPES)


def test_the_index_is_chosen_by_name_or_an_exact_one_is(database, caplog):
    database.index(IndexRecipe(name="a_coarse", coarse_width=8, refine=2))
    database.query(*ASKED)
    assert "the index a_coarse is not exact: it found" in caplog.text
    built = database.info().indexes[0]
    assert 0 < built.recall["recall"] <= 1 and built.recall["at"] == 10
    database.index("cpu")
    caplog.clear()
    assert_answers(database)
    assert_answers(rapidin_vdb.open(database.path))
    assert "not exact" not in caplog.text
    database.query(*ASKED, index="a_coarse")
    assert "not exact" in caplog.text
    with pytest.raises(SpecError, match=r"no index gpu is built \(built: a_coarse, cpu\)"):
        database.query(*ASKED, index="gpu")
    with pytest.raises(SpecError, match="coarse_width is 64, but the database's RapidGrads are only 64 wide"):
        database.index(IndexRecipe(name="b", coarse_width=64))


def test_many_queries_are_as_one_by_one_whatever_is_searched(database, tmp_path, monkeypatch):
    """More than go through the loop for few: also where rows are read-only memory of the table's reader."""
    asked = [{"id": f"q{n}", "prompt": f"Say {n}", "generation": f"blue {n}"} for n in range(40)]
    path = write_jsonl(tmp_path / "asked.jsonl", asked)

    def answers(one):
        return [[(r.sample_id, r.score) for r in ranking.results] for ranking in one.query(file=path, top_k=5)]

    # Gradients are made once: it is what is searched that makes a difference, and who asks alone has one of his own.
    made, sketch = {}, answering.sketch_queries

    def once(maker, encoded, **options):
        key = tuple((query.sample_id, query.input_ids) for query in encoded)
        if key not in made:
            made[key] = sketch(maker, encoded, **options)
        return made[key]

    monkeypatch.setattr(answering, "sketch_queries", once)
    first = answers(database)
    assert first == [
        [(r.sample_id, r.score) for r in database.query(a["prompt"], a["generation"], top_k=5)[0].results]
        for a in asked
    ]
    assert len(made) > 40
    monkeypatch.setattr("rapidin_vdb.table_index.free_bytes", lambda device: 4000)
    assert answers(rapidin_vdb.open(database.path)) == first
    for recipe in RECIPES.values():
        database.index(recipe)
        assert answers(database) == first


def test_a_table_larger_than_memory_is_streamed(database, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("rapidin_vdb.table_index.free_bytes", lambda device: 4000)
    assert_answers(database)
    assert_answers(database, where="stars > 2", k=3)
    assert "larger than the memory that is free: streaming it" in caplog.text
    monkeypatch.undo()
    assert_answers(rapidin_vdb.open(database.path))


def test_an_index_that_somebody_else_replaces_meanwhile(database, tmp_path, monkeypatch):
    """Its files vanish between reading the manifest and reading them."""
    database.index("cpu")
    real, calls = rapidin_vdb.freshness.load_index, []

    def load(folder, manifest):
        calls.append(manifest)
        if len(calls) == 1:
            shutil.rmtree(tmp_path / "db" / "indexes" / "cpu")
            rapidin_vdb.open(database.path).index("cpu")
        return real(folder, manifest)

    other = rapidin_vdb.open(database.path)
    monkeypatch.setattr("rapidin_vdb.freshness.load_index", load)
    assert_answers(other)
    assert calls[0] != calls[-1]


@pytest.mark.parametrize("suffix", ["rows.npy", "keys.npy", "ids.npy", "ends.npy"])
def test_a_damaged_index_is_built_anew(database, tmp_path, suffix, caplog):
    """Also by the command that its message names."""
    database.index("cpu")
    next((tmp_path / "db" / "indexes" / "cpu").glob(f"*.{suffix}")).write_bytes(b"x")
    again = rapidin_vdb.open(database.path)
    assert again.index("cpu").fresh
    assert "the index cpu is damaged" in caplog.text
    assert_answers(rapidin_vdb.open(database.path))


def test_an_index_that_cannot_be_written_is_told(database, tmp_path):
    (tmp_path / "db" / "indexes").write_text("a file in the way")
    with pytest.raises(SpecError, match="the index cpu cannot be written to .*indexes: .*; the tables need none"):
        database.index("cpu")
    assert_answers(database)


def test_both_ends_and_groups(database, tmp_path):
    (ranking,) = database.query(*ASKED, top_k=4, both=True, group_by="Source", where="stars > 1")
    assert ranking.results == database.query(*ASKED, top_k=4, where="stars > 1")[0].results
    assert ranking.harmful == database.query(*ASKED, top_k=4, where="stars > 1", harmful=True)[0].results
    everything = {r.sample_id: r for r in database.query(*ASKED, top_k=99, where="stars > 1")[0].results}
    records = {record["id"]: record for record in toy_records(24)}
    sums = {}
    for sample_id, result in everything.items():
        sums.setdefault(records[sample_id]["source"], []).append(result.score)
    found = {group.value: (group.samples, group.score) for group in ranking.groups}
    assert found == {value: (len(scores), pytest.approx(sum(scores), abs=1e-5)) for value, scores in sums.items()}
    assert [group.score for group in ranking.groups] == sorted((g.score for g in ranking.groups), reverse=True)
    (mean,) = database.query(*ASKED, group_by="source", aggregate="mean", where="stars > 1")
    assert {group.value: group.score for group in mean.groups} == {
        value: pytest.approx(np.mean(scores), abs=1e-6) for value, scores in sums.items()
    }
    assert [row["end"] for row in ranking.to_rows()] == ["helpful"] * 4 + ["harmful"] * 4
    json.dumps(ranking.to_dict())
    (nobody,) = database.query(*ASKED, both=True, group_by="source", where="stars > 1000")
    assert (nobody.results, nobody.harmful, nobody.groups) == ((), (), ())
    with pytest.raises(SpecError, match="give one of --harmful and --both"):
        database.query(*ASKED, both=True, harmful=True)


def test_an_index_is_never_half_shared(database):
    """An updated index does not change the one that it came from, as far as that may still be used."""
    database.index("cpu")
    index = database._indexes["sample"]._residents.newest.index
    assert isinstance(index, ShardedIndex)
    keys, missing = index.keys.difference(index.keys.row_ids[1:], index.keys.versions[1:])
    assert len(missing) == 0
    assert (index.updated(keys, []).samples, index.samples) == (23, 24)


def test_an_update_that_fails_half_way_leaves_the_index_as_it_was(database, tmp_path, monkeypatch):
    """Single precision is FAISS's, to which rows are added in place."""
    database.index(IndexRecipe(name="single", element_type="float32", shards_per_device=2))
    assert_answers(database)

    def failing(snapshot, row_ids=None):
        yield from ()
        raise KeyboardInterrupt

    change(database, tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr("rapidin_vdb.freshness.batches_of", failing)
        with pytest.raises(KeyboardInterrupt):
            database.query(*ASKED)
    assert_answers(database)
    assert_answers(database, where="stars > 1", k=4)
    # And no file of the attempt is left.
    (manifest,) = list_manifests(tmp_path / "db" / "indexes")
    files = {path.name.split(".")[0] for path in (tmp_path / "db" / "indexes" / "single").glob("*.rows.npy")}
    assert files == {part.name for part in manifest.parts}


def test_a_query_does_not_wait_for_who_is_building(database, tmp_path):
    database.index("cpu")
    change(database, tmp_path, 0)
    with FileLock(tmp_path / "db" / "indexes" / "cpu" / ".lock"):
        assert_answers(rapidin_vdb.open(database.path))
    assert [index.fresh for index in database.info().indexes] == [False], "left to the one who builds"
    assert_answers(rapidin_vdb.open(database.path))
    assert [index.fresh for index in database.info().indexes] == [True]


def test_mapped_rows_do_not_pile_up_in_memory(database, tmp_path):
    database.index(RECIPES["mapped"])
    for number in range(3):
        change(database, tmp_path, number)
        assert_answers(database)
        assert [index.fresh for index in database.info().indexes] == [True], "brought up to date on disk"
    index = database._indexes["sample"]._residents.newest.index
    assert all(
        isinstance(array, np.memmap) and not array.flags.writeable for s in index.shards for array in s.source.arrays
    )


@pytest.mark.parametrize("harm", ["keys", "ids", "gone"])
def test_empty_files_are_damage_that_index_mends(database, tmp_path, harm, caplog):
    database.index("cpu")
    change(database, tmp_path, 0)
    assert_answers(rapidin_vdb.open(database.path))
    folder = tmp_path / "db" / "indexes" / "cpu"
    next(folder.glob("gone-*.npy" if harm == "gone" else f"*.{harm}.*")).write_bytes(b"")
    assert_answers(rapidin_vdb.open(database.path))
    assert "the index cpu is damaged" in caplog.text
    assert rapidin_vdb.open(database.path).index("cpu").fresh
    caplog.clear()
    assert_answers(rapidin_vdb.open(database.path))
    assert not caplog.records


def test_a_damaged_exact_index_is_not_answered_for_by_a_coarse_one(database, tmp_path):
    database.index("cpu")
    database.index(IndexRecipe(name="coarse", coarse_width=2, refine=1))
    next((tmp_path / "db" / "indexes" / "cpu").glob("*.rows.npy")).write_bytes(b"")
    assert_answers(rapidin_vdb.open(database.path), k=5)


def test_a_fresh_exact_index_goes_before_a_stale_one(database, tmp_path, monkeypatch):
    database.index("cpu")
    database.ingest(write_jsonl(tmp_path / "many.jsonl", toy_records(30, first=100)))
    database.index(RECIPES["mapped"])
    monkeypatch.setattr("rapidin_vdb.table_index.of_table", lambda *a: pytest.fail("the table is read"))
    monkeypatch.setattr("rapidin_vdb.freshness.of_table", lambda *a: pytest.fail("the table is read"))
    assert_answers(rapidin_vdb.open(database.path))


def test_the_table_is_read_once_where_no_index_serves(database, tmp_path, monkeypatch):
    database.index(RECIPES["streamed"])
    database.ingest(write_jsonl(tmp_path / "many.jsonl", toy_records(30, first=100)))
    read = []
    real = rapidin_vdb.table_index.batches_of

    def counted(snapshot, row_ids=None):
        read.append(snapshot.version)
        return real(snapshot, row_ids)

    monkeypatch.setattr("rapidin_vdb.table_index.batches_of", counted)
    for _ in range(3):
        database.query(*ASKED)
    assert len(read) == 1


def test_recall_is_not_written_over_what_somebody_else_built(database, tmp_path):
    folder = tmp_path / "db" / "indexes"
    recipe = IndexRecipe(name="coarse", coarse_width=2, refine=1)
    database.index(recipe)
    (before,) = list_manifests(folder)
    change(database, tmp_path, 0)
    database.index(recipe)
    (now,) = list_manifests(folder)
    assert now != before
    with_recall(folder, before, {"recall": 0.0})
    assert list_manifests(folder) == [now]


COARSE = IndexRecipe(name="zcoarse", coarse_width=2, refine=1)


def test_a_coarse_index_just_built_answers_only_who_names_it(database, tmp_path):
    database.index("cpu")
    database.index(COARSE)
    assert_answers(database, k=5)
    assert database._indexes["sample"]._residents.newest.index.recipe.name == "cpu"
    database.query(*ASKED, index="zcoarse")
    assert_answers(database, k=5)
    database.index(COARSE)
    shutil.rmtree(tmp_path / "db" / "indexes" / "cpu")
    database.query(*ASKED)
    assert database._indexes["sample"]._residents.newest.index.recipe == COARSE, "nothing else is built"
    shutil.rmtree(tmp_path / "db" / "indexes")
    assert_answers(database, k=5)


def test_recall_that_cannot_be_written_is_told(database, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rapidin_vdb.freshness.with_recall", full)
    with pytest.raises(SpecError, match="the index zcoarse cannot be written to .*No space left on device"):
        database.index(COARSE)
    (ranking,) = database.query(*ASKED, both=True)
    unknown = "the index zcoarse is not exact, and what it finds was not measured"
    assert unknown in caplog.text and ranking.note.startswith(f"{unknown}, so that samples may be missing here; ")


@pytest.fixture
def read(monkeypatch):
    """Of whatever is read of the table, how many rows; None for all."""
    real, read = rapidin_vdb.table_index.batches_of, []

    def counted(snapshot, row_ids=None):
        read.append(None if row_ids is None else len(row_ids))
        yield from real(snapshot, row_ids)

    monkeypatch.setattr("rapidin_vdb.freshness.batches_of", counted)
    monkeypatch.setattr("rapidin_vdb.table_index.batches_of", counted)
    return read


@pytest.fixture
def far(database, tmp_path, monkeypatch):
    """As for a database in an object store: its index is kept here, and may go."""
    monkeypatch.setenv("RAPIDIN_VDB_CACHE", str(tmp_path / "cache"))
    database._indexes["sample"] = IndexKeeper(tmp_path / "cache" / "db-1" / "indexes", cached=True)
    return database


def test_a_far_table_is_not_read_again_while_its_index_is_in_memory(far, tmp_path, read):
    assert_answers(far)
    assert read == [None]
    shutil.rmtree(tmp_path / "cache")  # others took its place
    assert_answers(far)
    assert read == [None]
    change(far, tmp_path, 0)
    assert_answers(far)
    assert read == [None, 3], "the difference"


def test_a_far_table_is_read_once_where_no_index_can_be_kept(far, tmp_path, read, monkeypatch, caplog):
    def full(folder, recipe, held, batches, **_):
        list(batches)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rapidin_vdb.freshness.write_index", full)
    for _ in range(3):
        assert_answers(far)
    assert read == [None, None] and caplog.text.count("No space left on device") == 1
    # No longer in memory, as after an older version was asked for: what failed is not tried again.
    far._indexes["sample"]._residents.let_go()
    assert_answers(far)
    assert read == [None, None, None] and caplog.text.count("No space left on device") == 1


def test_a_far_table_is_kept_anew_after_a_purge_elsewhere(far, tmp_path, read):
    """The version that its index holds is gone: each process would read all of the table for each of its answers."""
    assert_answers(far)
    change(far, tmp_path, 0)
    rapidin_vdb.open(far.path).delete(purge=True)
    read.clear()
    for _ in range(2):
        far._indexes["sample"] = IndexKeeper(far._indexes["sample"].folder, cached=True)  # as in another process
        assert_answers(far)
    assert read == [None]


def test_what_is_kept_of_a_far_table_is_made_anew_where_it_is_of_another(far, tmp_path, read):
    """Removed and made anew at the same place, with fewer versions; or damaged."""
    assert_answers(far)
    for _ in range(3):
        far.ingest(write_jsonl(tmp_path / "one.jsonl", toy_records(1, first=300)))
        far.delete(ids=["toy-300"])
    assert_answers(far)
    folder = far._indexes["sample"].folder
    shutil.rmtree(far.path)
    again = rapidin_vdb.init(
        far.path, model=far.fingerprint.model, adapter=far.fingerprint.adapter, width=64, shuffles=3
    )
    again.ingest(tmp_path / "toy.jsonl")
    read.clear()
    for _ in range(2):
        again._indexes["sample"] = IndexKeeper(folder, cached=True)
        assert_answers(again)
    assert read == [None]
    (part, *_) = sorted((folder / "cpu").glob("*.npy"))
    part.write_bytes(bytes(len(part.read_bytes())))
    read.clear()
    for _ in range(2):
        again._indexes["sample"] = IndexKeeper(folder, cached=True)
        assert_answers(again)
    assert read == [None]


def test_what_is_kept_of_a_far_table_stays_when_an_older_version_is_asked_for(far, tmp_path, read):
    assert_answers(far)
    older = far.info().table_version
    far.ingest(write_jsonl(tmp_path / "many.jsonl", toy_records(60, first=100)))
    assert_answers(far)
    kept = list_manifests(far._indexes["sample"].folder)
    assert [known.samples for known in kept] == [84]
    far.query(*ASKED, as_of=older)
    assert list_manifests(far._indexes["sample"].folder) == kept
    # Nor beside an index that was chosen.
    far.index(IndexRecipe(name="zchosen"))
    shutil.rmtree(far._indexes["sample"].folder / "cpu")
    far.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(80, first=200)))
    assert_answers(far)
    assert [known.name for known in list_manifests(far._indexes["sample"].folder)] == ["zchosen"]


@pytest.mark.parametrize("name", [None, "float32"])
def test_rows_are_let_go_before_others_are_read(database, tmp_path, monkeypatch, request, name):
    """Two copies of a table might not fit."""
    database.index("cpu")
    database.index(RECIPES["float32"])
    database.query(*ASKED, index=name)
    # As the exception does by which LanceDB ends a read, from Python 3.12 on.
    cycle = [database._indexes["sample"]._residents.newest.index]
    cycle.append(cycle)
    del cycle
    gc.disable()
    request.addfinalizer(gc.enable)
    real, before = rapidin_vdb.freshness.load_index, []

    def load(folder, manifest):
        before.append(held())
        return real(folder, manifest)

    monkeypatch.setattr("rapidin_vdb.freshness.load_index", load)
    if name is None:
        held = weakref.ref(database._indexes["sample"]._residents.newest.index)
        database.query(*ASKED, index="float32")
        held = weakref.ref(database._indexes["sample"]._residents.newest.index)
        database.index("cpu")
    else:
        held = weakref.ref(database._indexes["sample"]._residents.newest.index)
        change(database, tmp_path, 0)  # no rows are added in place where others may search
        assert_answers(database, index=name)
    assert before and before == [None] * len(before)


@pytest.mark.parametrize("built", [True, False])
def test_of_two_who_index_at_once_one_writes(database, tmp_path, read, monkeypatch, built):
    """The second waits for the first, and finds it done."""
    folder, others = tmp_path / "db" / "indexes", []
    if built:
        database.index("cpu")
        change(database, tmp_path, 0)
    del read[:]
    before = list_manifests(folder)
    (folder / "cpu").mkdir(parents=True, exist_ok=True)
    other, come, real = rapidin_vdb.open(database.path), threading.Semaphore(0), rapidin_vdb.index.writing.holding

    def holding(lock, what):
        come.release()
        return real(lock, what)

    monkeypatch.setattr("rapidin_vdb.index.writing.holding", holding)
    with FileLock(folder / "cpu" / ".lock", is_singleton=False) as lock:
        threads = [
            threading.Thread(target=lambda one=one: others.append(one.index("cpu"))) for one in (database, other)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert come.acquire(timeout=60), "both have looked at what is there, and want the lock"
        lock.release()
        for thread in threads:
            thread.join(60)
    (now,) = list_manifests(folder)
    assert now not in before and [info.fresh for info in others] == [True, True]
    assert read.count(None) == (0 if built else 1), "and not all of it a second time"
    assert len(now.parts) == (len(before[0].parts) + 1 if built else now.shards)
    assert_answers(rapidin_vdb.open(database.path))
