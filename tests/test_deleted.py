"""Samples that were deleted, and stand in files that are ingested again."""

import pytest
from conftest import toy_records, write_jsonl
from test_whole import make
from typer.testing import CliRunner

from rapidin_vdb.cli.main import app
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.store import snapshot as snapshots


@pytest.fixture
def filled(tmp_path, models, adapters):
    database = make(tmp_path / "db", models, adapters)
    path = write_jsonl(tmp_path / "all.jsonl", toy_records(12))
    database.ingest(path)
    return database, path


def told(report) -> tuple[int, int, int, int]:
    """Return what there is to write, what was there, what is back, and what stays away."""
    written = report.samples if hasattr(report, "samples") else report.added + report.replaced
    return written, report.unchanged, report.brought_back, report.left_deleted


def test_what_comes_back_is_told_and_may_stay_away(filled):
    database, path = filled
    gone = database.delete(where="stars > 2")
    assert 0 < gone < 12
    assert told(database.ingest(path, dry_run=True)) == (gone, 12 - gone, gone, 0)
    assert told(database.ingest(path, dry_run=True, on_deleted="skip")) == (0, 12 - gone, 0, gone)
    assert told(database.ingest(path, on_deleted="skip")) == (0, 12 - gone, 0, gone) and database.count() == 12 - gone
    assert told(database.ingest(path)) == (gone, 12 - gone, gone, 0) and database.count() == 12
    # Whatever is there is there, though it was deleted once.
    assert told(database.ingest(path, on_deleted="skip")) == (0, 12, 0, 0)


def test_only_what_was_deleted_is_told(filled, tmp_path):
    database, path = filled
    names = [record["id"] for record in toy_records(12)]
    database.delete(ids=names[:2])
    database.delete(ids=names[1:3])
    replaced = write_jsonl(tmp_path / "b.jsonl", [toy_records(5)[4] | {"output": "other"}])
    assert told(database.ingest(replaced, on_duplicate="replace")) == (1, 0, 0, 0)
    new = write_jsonl(tmp_path / "new.jsonl", [record | {"id": f"new-{n}"} for n, record in enumerate(toy_records(3))])
    assert told(database.ingest(new, on_deleted="skip")) == (3, 0, 0, 0)
    # By its id, whatever it says now, and once, however often it stands there.
    again = write_jsonl(tmp_path / "c.jsonl", [toy_records(2)[1] | {"output": "other"}] * 2 + toy_records(1))
    twice = database.ingest(again, dry_run=True)
    assert (told(twice), twice.repeated) == ((2, 0, 2, 0), 1)
    assert told(database.ingest(again, dry_run=True, on_deleted="skip")) == (0, 0, 0, 3)
    database.delete(where="true")
    assert told(database.ingest(path, dry_run=True)) == (12, 0, 12, 0)


def test_versions_that_hide_it(filled, monkeypatch, tmp_path):
    database, path = filled
    names = [record["id"] for record in toy_records(12)]
    for name in names[:3]:
        database.delete(ids=[name])
    assert told(database.ingest(path, dry_run=True))[2] == 3
    # Commits that deleted nothing do not count among the last deletions.
    for number in range(4):
        database.ingest(write_jsonl(tmp_path / "one.jsonl", [toy_records(1)[0] | {"id": f"new-{number}"}]))
    monkeypatch.setattr(snapshots, "_DELETIONS", 3)
    assert told(database.ingest(path, dry_run=True))[2] == 3
    database.delete(where="sample_id LIKE 'new-%'")
    # Deletions one behind the other are one, as when many ids are deleted.
    monkeypatch.setattr(snapshots, "_DELETIONS", 2)
    assert told(database.ingest(path, dry_run=True))[2] == 3
    monkeypatch.setattr(snapshots, "_DELETIONS", 1)
    assert told(database.ingest(path, dry_run=True))[2] == 0  # the last one
    monkeypatch.undo()
    # Fewer rows because a commit was taken back are no deletion.
    dataset = database._table.place.dataset("samples")
    before = dataset.version
    assert database.ingest(path).added == 3
    dataset = database._table.place.dataset("samples")
    dataset.checkout_version(before).restore()
    assert database.count() == 9
    assert told(database.ingest(path, dry_run=True)) == (3, 9, 3, 0)
    monkeypatch.setattr(snapshots, "_DELETIONS", 1)
    assert told(database.ingest(path, dry_run=True))[2] == 0
    monkeypatch.undo()
    database.delete(where="stars > 2", purge=True)
    assert told(database.ingest(path))[2:] == (0, 0)


def test_single_tokens_of_what_comes_back(filled):
    database, path = filled
    database.ingest(path, token_gradients=True)
    gone = database.delete(where="stars > 2")
    report = database.ingest(path, token_gradients=True, on_deleted="skip")
    assert told(report) == (0, 12 - gone, 0, gone) and report.token_gradients == 0
    report = database.ingest(path, token_gradients=True)
    assert told(report) == (gone, 12 - gone, gone, 0) and report.token_gradients > 0
    assert database.verify().findings == ()


def test_the_command_line_says_so(filled):
    database, path = filled
    gone = database.delete(where="stars > 2")

    def said(*options):
        done = CliRunner().invoke(app, ["ingest", database.path, str(path), *options])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    assert f"; {12 - gone} are there already" in said("--dry-run")
    assert f"{gone} of them had been deleted before, and would be back; leave such records" in said("--dry-run")
    assert f"{gone} left out, for they had been deleted" in said("--dry-run", "--on-deleted", "skip")
    assert f"{gone} left out, for they had been deleted, in " in said("--on-deleted", "skip")
    assert f"{gone} of them had been deleted before, and are back; leave such records out with: --on-deleted" in said()
    assert "deleted" not in said()


def test_a_file_that_changes_between_the_readings_is_told(filled, tmp_path, monkeypatch):
    """What was done is kept, and what is missing is no success."""
    from rapidin_vdb import ingest as module

    database, _ = filled
    path = write_jsonl(tmp_path / "more.jsonl", toy_records(6, first=50))
    original = module._write

    def meanwhile(planned, *rest, **options):
        write_jsonl(path, toy_records(4, first=50))
        return original(planned, *rest, **options)

    monkeypatch.setattr(module, "_write", meanwhile)
    with pytest.raises(
        CorpusError, match="2 of 6 samples that were read first were not in the files when they were read"
    ):
        database.ingest(path)
    assert database.count() == 16
    monkeypatch.undo()
    assert database.ingest(path).unchanged == 4
