"""Beside a purge, and beside who builds an index: nothing comes back, nobody's work is taken away, readers are right."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from filelock import FileLock

import rapidin_vdb
from rapidin_vdb.errors import FilterError, PurgedError, TableError
from rapidin_vdb.index import list_manifests
from rapidin_vdb.recipe import read_recipe
from rapidin_vdb.store import Snapshot, size_of

ASKED = ("Say 5", "blue 35")


@pytest.fixture(scope="module")
def made(tmp_path_factory, models, adapters):
    """The database of all tests here, made once and copied."""
    folder = tmp_path_factory.mktemp("made")
    database = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    database.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    return database


@pytest.fixture
def database(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "db")
    shutil.copy(Path(made.path).parent / "toy.jsonl", tmp_path)
    copy = rapidin_vdb.open(tmp_path / "db")
    copy._engine = made._engine
    return copy


@pytest.fixture
def paused(monkeypatch):
    """The first build of an index stops with its first rows read, until it is let go on."""
    real, begun, goes_on = rapidin_vdb.freshness.batches_of, threading.Event(), threading.Event()

    def batches(snapshot, row_ids=None):
        for batch in real(snapshot, row_ids):
            if not begun.is_set():
                begun.set()
                assert goes_on.wait(60)
            yield batch

    monkeypatch.setattr("rapidin_vdb.freshness.batches_of", batches)
    yield begun, goes_on
    goes_on.set()


def in_thread(function, *arguments, **options) -> tuple[threading.Thread, list]:
    results: list = []

    def run():
        try:
            results.append(function(*arguments, **options))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def vector_of(database, name: str) -> bytes:
    return database._table.snapshot().vector_of(name).tobytes()


def holding(path, needle: bytes) -> list[str]:
    return [str(file) for file in Path(path).rglob("*") if file.is_file() and needle in file.read_bytes()]


def test_verify_leaves_an_index_alone_that_somebody_builds(database, paused):
    begun, goes_on = paused
    building, results = in_thread(rapidin_vdb.open(database.path).index, "cpu")
    assert begun.wait(60)
    report = rapidin_vdb.open(database.path).verify()
    assert (report.findings, report.mended) == ((), ())
    goes_on.set()
    building.join(60)
    assert results[0].fresh and [index.fresh for index in database.info().indexes] == [True], results
    assert database.query(*ASKED)[0].searched == 24


@pytest.mark.parametrize("built", [False, True])
def test_a_build_that_began_before_a_purge_brings_nothing_back(database, paused, tmp_path, built):
    """Neither a first one, nor one that extends what is there."""
    begun, goes_on = paused
    if built:
        goes_on.set()
        database.index("cpu")
        begun.clear()
        goes_on.clear()
        database.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(3, first=24)))
    name = "toy-025" if built else "toy-005"
    vector = vector_of(database, name)
    building, results = in_thread(rapidin_vdb.open(database.path).index, "cpu")
    assert begun.wait(60)
    purging, purged = in_thread(rapidin_vdb.open(database.path).delete, ids=[name], purge=True)
    for _ in range(600):
        if purged or len(list(Path(database.path, "samples.lance", "_versions").glob("*.manifest"))) == 1:
            break
        purging.join(0.1)
    goes_on.set()
    building.join(60)
    purging.join(60)
    assert purged == [[name]] and not isinstance(results[0], Exception), (purged, results)
    assert holding(database.path, vector) == []
    (index,) = database.info().indexes
    assert (index.fresh, index.samples) == (True, 26 if built else 23)
    assert rapidin_vdb.open(database.path).verify().mended == ()


def test_a_build_that_a_purge_takes_away_before_it_is_read_begins_again(database, monkeypatch):
    """The purge builds it anew later, which may take long; until then there is none."""
    real, other = rapidin_vdb.freshness.load_index, rapidin_vdb.open(database.path)

    def load(folder, manifest):
        if other.count() == 24:
            other.delete(ids=["toy-005"])
            other._table.purge()
            assert other._indexes["sample"].remove("cpu")[0]
        return real(folder, manifest)

    monkeypatch.setattr("rapidin_vdb.freshness.load_index", load)
    made = database.index("cpu")
    assert (made.samples, made.fresh) == (23, True) and other.info().indexes == (made,)


def test_a_build_does_not_keep_what_a_purge_that_died_had_removed(database, paused):
    """It was killed between the tables and the indexes: nobody comes for the index any more."""
    begun, goes_on = paused
    vector = vector_of(database, "toy-005")
    keeper, snapshot = rapidin_vdb.open(database.path)._indexes["sample"], database._table.snapshot()
    building, results = in_thread(keeper.build, snapshot, read_recipe("cpu"))
    assert begun.wait(60)
    other = rapidin_vdb.open(database.path)
    other.delete(ids=["toy-005"])
    other._table.purge()
    goes_on.set()
    building.join(60)
    assert isinstance(results[0], PurgedError)
    assert holding(database.path, vector) == []


def test_what_a_killed_build_left_goes_with_a_purge(database):
    database.index("cpu")
    database.index("streamed")
    vector = vector_of(database, "toy-005")
    indexes = Path(database.path, "indexes")
    (indexes / "cpu" / f"{'a' * 32}.rows.npy").write_bytes(b"x" * 80 + vector)
    (indexes / "streamed" / "manifest.json").unlink()
    (indexes / "first").mkdir()
    (indexes / "first" / f"{'b' * 32}.rows.npy").write_bytes(vector)
    (indexes / "elsewhere").symlink_to(Path(database.path).parent / "kept")
    kept = Path(database.path).parent / "kept"
    kept.mkdir()
    (kept / "file").write_text("not of this database")
    assert len(holding(indexes, vector)) == 4
    database.delete(ids=["toy-005"], purge=True)
    assert holding(database.path, vector) == []
    assert [(index.name, index.fresh) for index in database.info().indexes] == [("cpu", True)]
    assert (kept / "file").exists() and not (indexes / "elsewhere").exists()


def test_verify_removes_what_a_killed_build_left_and_says_which_it_was(database):
    database.index("cpu")
    indexes = Path(database.path, "indexes")
    for name in ("first", "damaged", "held", "waiting"):
        (indexes / name).mkdir()
        (indexes / name / ".lock").write_bytes(b"")
        if name != "waiting":
            (indexes / name / ("manifest.json" if name == "damaged" else "x.rows.npy")).write_text("x")
    with FileLock(indexes / "held" / ".lock"):
        report = rapidin_vdb.open(database.path).verify()
    assert report.findings == () and [(finding.place, finding.what) for finding in report.mended] == [
        ("index damaged", "its manifest is damaged or of another version (it was removed)"),
        ("index first", "a build that died has left files without a manifest (it was removed)"),
    ]
    assert (indexes / "held" / "x.rows.npy").exists()


def test_an_index_that_is_replaced_while_it_is_verified_is_not_called_damaged(database, tmp_path, monkeypatch):
    database.index("cpu")
    (before,) = list_manifests(tmp_path / "db" / "indexes")
    real = rapidin_vdb.verification.verify_rows

    def replaced(folder, manifest):
        if manifest == before:
            rapidin_vdb.open(database.path).delete(ids=["toy-001"], purge=True)
        return real(folder, manifest)

    monkeypatch.setattr("rapidin_vdb.verification.verify_rows", replaced)
    report = database.verify()
    assert (report.findings, report.mended) == ((), ())


READS = {
    "rows": lambda s: s.count("stars = 1"),
    "an index": lambda s: s.count("split = 'train'"),
    "ids": lambda s: s.samples(["toy-003"]),
    "a page": lambda s: s.page(None, offset=0, limit=5),
    "tokens": lambda s: s.encoded(["toy-003"]),
    "a vector": lambda s: s.vector_of("toy-003"),
    "vectors": lambda s: list(s.vectors()),
    "some vectors": lambda s: list(s.vectors(np.arange(3))),
    "whole rows": lambda s: list(s.whole_rows()),
    "its digest": lambda s: s.digest,
}


def test_a_version_that_a_purge_removed_is_told_as_such(database):
    """And a filter that nobody could understand, as that."""
    database.index("cpu")
    other = rapidin_vdb.open(database.path)
    held = {name: other._table.snapshot() for name in READS}
    database.delete(ids=["toy-001"], purge=True)
    for name, read in READS.items():
        with pytest.raises(PurgedError, match=f"version .* of the table samples of {database.path} is gone: a purge"):
            read(held[name])
    with pytest.raises(FilterError, match="No field named nosuch"):
        held["rows"].count("nosuch = 1")


@pytest.mark.parametrize("where", ["CAST(response AS INT) > 3", "split = 'train' AND stars / 0 > 1"])
def test_what_cannot_be_had_of_some_row_is_the_filters_fault(database, where):
    database.index("cpu")
    with pytest.raises(FilterError, match="is not understood"):
        database.count(where)


def test_files_that_are_gone_are_not_the_filters_fault(database):
    database.index("cpu")
    shutil.rmtree(Path(database.path, "samples.lance", "_indices"))
    with pytest.raises(TableError, match="cannot be read: .*ot found") as raised:
        rapidin_vdb.open(database.path).count("split = 'train'")
    assert not isinstance(raised.value, FilterError | PurgedError)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("options", [{}, {"where": "split = 'train'"}, {"group_by": "source"}], ids=str)
def test_a_query_beside_a_purge_answers_from_what_is_left(database, monkeypatch, indexed, options):
    if indexed:
        database.index("cpu")
    real, times = rapidin_vdb.answering.sketch_queries, []

    def purged(*arguments, **others):
        times.append(1)
        if len(times) == 1:
            rapidin_vdb.open(database.path).delete(ids=["toy-005"], purge=True)
        return real(*arguments, **others)

    monkeypatch.setattr("rapidin_vdb.answering.sketch_queries", purged)
    (found,) = database.query(*ASKED, top_k=99, **options)
    assert len(times) == 2
    assert found.results == database.query(*ASKED, top_k=99, **options)[0].results
    assert found.searched == 23 and "toy-005" not in [result.sample_id for result in found.results]


def test_verify_beside_writers_finds_no_damage(database, tmp_path, monkeypatch):
    """Tokens and samples are of one moment, and a purge in the middle begins it anew."""
    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16)
    database.index("cpu")
    real, times = Snapshot.whole_rows, []

    def disturbed(self):
        for row in real(self):
            times.append(1)
            if len(times) == 3:
                rapidin_vdb.open(database.path).delete(ids=["toy-001"], purge=True)
            yield row

    monkeypatch.setattr(Snapshot, "whole_rows", disturbed)
    report = database.verify()
    assert (report.samples, report.findings, report.mended) == (23, (), ())

    # Somebody deletes between the look at the one table and the look at the other.
    tokens, looks = type(database._table.tokens), []
    taken = tokens.snapshot

    def late(self):
        looks.append(1)
        if len(looks) == 1:
            rapidin_vdb.open(database.path).ingest(
                write_jsonl(tmp_path / "other.jsonl", [toy_records(1)[0] | {"output": "other"}]),
                on_duplicate="replace", token_gradients=True,
            )  # fmt: skip
        return taken(self)

    monkeypatch.setattr(tokens, "snapshot", late)
    report = database.verify()
    assert (report.findings, report.mended) == ((), ())


def test_what_could_not_be_mended_is_told_with_the_rest(database, monkeypatch):
    database.index("cpu")
    next(Path(database.path, "indexes", "cpu").glob("*.rows.npy")).write_bytes(b"x")
    database._table._table.update(where="sample_id = 'toy-003'", values={"split": "x"})

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rapidin_vdb.freshness.write_index", full)
    report = rapidin_vdb.open(database.path).verify()
    first, second = report.findings
    assert (first.place, first.what) == ("toy-003", "its row is not what was written")
    assert second.place == "index cpu" and "is damaged" in second.what
    assert "it could not be built anew: the index cpu cannot be written" in second.what and report.mended == ()


def test_sizes_are_told_while_files_come_and_go(database, tmp_path):
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            folder = Path(database.path, "indexes", "x")
            folder.mkdir(parents=True)
            for number in range(20):
                (folder / str(number)).write_bytes(b"1")
            shutil.rmtree(folder)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all(size_of(database.path) > 0 for _ in range(300))
    finally:
        stop.set()
        thread.join()
    assert size_of(database.path) == sum(
        file.stat().st_size for file in Path(database.path).rglob("*") if file.is_file()
    )


def test_wide_rows_are_read_in_small_batches(database, tmp_path, monkeypatch):
    """Lance reads 8,192 rows at once by itself, several times over: of a width of 65,536 that is a gibibyte each."""
    from lance.dataset import DatasetOptimizer

    from rapidin_vdb.store import purging

    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16)
    compact, asked = DatasetOptimizer.compact_files, []

    def watched(self, **options):
        asked.append(options["batch_size"])
        return compact(self, **options)

    monkeypatch.setattr(DatasetOptimizer, "compact_files", watched)
    database.delete(where="sample_id = 'toy-003'", purge=True)
    assert asked == [8192, 8192]
    monkeypatch.setattr(purging, "BATCH_BYTES", 1024)
    database.delete(where="sample_id = 'toy-004'", purge=True)
    assert asked[2:] == [8, 32], "samples are of width 64 here, tokens of 16"
    monkeypatch.setattr(purging, "BATCH_BYTES", 1)
    database.delete(where="sample_id = 'toy-005'", purge=True)
    assert asked[4:] == [1, 1] and database.count() == 21
    assert database.verify().findings == ()


def test_what_a_killed_writer_left_in_the_table_is_gone_too(database):
    """No version names it, and it is too young for Lance to take it away by itself."""
    table = Path(database.path) / "samples.lance"
    left = [
        table / "data" / "left.lance",
        table / "_indices" / "left" / "page.lance",
        table / "_transactions" / "0-x.txn",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an ingest that was killed before its commit")
    database.delete(ids=["toy-003"], purge=True)
    assert [path.name for path in left if path.exists()] == []
    assert database.count() == 23 and not database.verify().findings
