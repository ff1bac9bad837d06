"""What was said to be done is on the disk, and outlives a loss of power."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import toy_records, write_jsonl
from test_store import FINGERPRINT, row

import rapidin_vdb
from rapidin_vdb.errors import TableError
from rapidin_vdb.store import SampleTable


@pytest.fixture
def synced(monkeypatch):
    """The paths that were made to be on the disk, in order."""
    found: list[str] = []
    real = os.fsync

    def fsync(handle):
        found.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def files_of(folder):
    return {str(path) for path in folder.rglob("*") if path.is_file() and ".lance" in str(path)}


def test_each_commit_is_on_the_disk_with_the_folders_it_is_in(tmp_path, synced):
    folder = tmp_path / "deep" / "db"
    table = SampleTable.create(str(folder), FINGERPRINT)
    there = files_of(folder)
    assert there and there <= set(synced)
    assert {str(folder), str(folder.parent), str(folder / "samples.lance" / "_versions")} <= set(synced)

    for change in (
        lambda: table.append(seen=0, rows=[row("a"), row("b")]),
        lambda: table.replace([row("a", value=2.0, content="d")], seen=0),
        lambda: table.delete_ids(["b"]),
        lambda: table.ensure_columns({"stars": "int"}),
        lambda: table.purge(),
    ):
        before = files_of(folder)
        synced.clear()
        change()
        new = files_of(folder) - before
        assert new and new <= set(synced)
        # A file's own contents come before the entry that says it is there.
        assert all(synced.index(name) < synced.index(str(Path(name).parent)) for name in new)
        # What was there is not written again, however long the database is.
        assert not before & set(synced)


def test_a_commit_that_fails_leaves_those_before_it_on_the_disk(tmp_path, synced):
    table = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    before = files_of(tmp_path)
    synced.clear()
    with pytest.raises(ZeroDivisionError), table.committing():
        table.append(seen=0, rows=[row("a")])
        assert not synced  # not yet: whoever holds the lock goes on
        raise ZeroDivisionError
    new = files_of(tmp_path) - before
    assert new and new <= set(synced)


def test_a_disk_that_fails_in_the_end_is_told(tmp_path, monkeypatch):
    table = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)

    def fsync(handle):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(TableError, match="cannot be written; what was committed before stays: .*Input/output"):
            table.append(seen=0, rows=[row("a")])
    table.append(seen=0, rows=[row("b")])  # the lock was let go of


def test_an_empty_newest_manifest_is_told_and_the_version_before_is_whole(tmp_path):
    """As power leaves it that ends between a manifest's name and its contents."""
    table = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    table.append(seen=0, rows=[row("a")])
    newest = min((tmp_path / "db" / "samples.lance" / "_versions").glob("*.manifest"))
    table.append(seen=0, rows=[row("b")])
    broken = min((tmp_path / "db" / "samples.lance" / "_versions").glob("*.manifest"))
    assert broken != newest
    broken.write_bytes(b"")
    with pytest.raises(TableError, match=f"{broken} is empty, as a loss of power .* Move this file away"):
        SampleTable(str(tmp_path / "db"))
    broken.unlink()
    again = SampleTable(str(tmp_path / "db"))
    assert list(again.snapshot().each_content(["a", "b"])) == [("a", "c")]
    again.append(seen=0, rows=[row("b")])
    assert len(list(again.snapshot().each_content(["a", "b"]))) == 2


def test_another_database_at_the_same_place_is_not_taken_for_this_one(tmp_path, models, adapters):
    """Its rows would be compared with gradients of another model, and written beside them."""

    def made():
        database = rapidin_vdb.init(
            tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, shuffles=3
        )
        database.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(6)))
        return database

    first = made()
    assert first.query("Say 5", "blue 35")
    shutil.rmtree(tmp_path / "db")
    second = made()
    for change in (
        lambda: first.query("Say 5", "blue 35"),
        lambda: first.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(3, first=6))),
        lambda: first.delete(ids=["0"]),
    ):
        with pytest.raises(TableError, match="another database was made at .*db meanwhile"):
            change()
    assert second.info().samples == 6


def test_an_index_is_on_the_disk_before_the_manifest_that_names_it(tmp_path, synced):
    """Whole, and what is added to it, and which of its rows are gone."""
    from rapidin_vdb.freshness import IndexKeeper
    from rapidin_vdb.recipe import IndexRecipe

    table = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    table.append(seen=0, rows=[row(f"s{number}") for number in range(20)])
    folder = tmp_path / "indexes"
    keeper, recipe = IndexKeeper(folder), IndexRecipe(name="cpu", shards_per_device=2)

    def named() -> set[str]:
        return {str(path) for path in (folder / "cpu").glob("*.npy")}

    before: set[str] = set()
    for change in (
        lambda: None,
        lambda: table.append(seen=table.snapshot().version, rows=[row("more")]),
        lambda: table.delete_ids(["s3"]),
    ):
        change()
        synced.clear()
        keeper.build(table.snapshot(), recipe)
        new = named() - before
        written = [path for path in synced if path.startswith(str(folder))]
        assert new and written[-1].endswith(".json"), "the manifest comes last"
        # The list of what is gone is on the disk by the name that it has in the end.
        assert new <= set(written[:-1]), (new, written)
        before = named()
    assert any(Path(path).name.startswith("gone-") for path in before)
