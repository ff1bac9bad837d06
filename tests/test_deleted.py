"""Samples that were deleted, and stand in files that are ingested again."""

from pathlib import Path

import pytest
from conftest import toy_records, write_jsonl
from test_store import FINGERPRINT, row
from test_whole import make
from typer.testing import CliRunner

from rapidin_vdb.cli.main import app
from rapidin_vdb.errors import CorpusError, TableError
from rapidin_vdb.store import SampleTable
from rapidin_vdb.store import snapshot as snapshots
from rapidin_vdb.store.place import manifest_name


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


def read_by(function) -> int:
    """Return how many bytes the process reads meanwhile."""

    def read():
        (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
        return int(line.split()[1])

    before = read()
    function()
    return read() - before


def test_no_more_versions_are_read_than_it_takes(tmp_path, monkeypatch):
    """Each names all files of the table: those of all versions are many times what is in it."""
    table = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    table.append([row(f"first {number}") for number in range(4)], seen=0)
    commits, seen = 60, 0
    for number in range(commits):
        seen = table.append([row(f"s{number}")], seen=seen).seen
        if number in (3, 56):
            table.delete_ids([f"first {number % 4}", f"s{number}"])
            table.append([row("between")], seen=0)
            table.delete_ids(["between"])
            seen = 0
    both = table.snapshot().deletions()
    assert len(both) == 4 and max(both) == both[-1]
    # A table of its own each time: Lance keeps what it has read.
    monkeypatch.setattr(snapshots, "_DELETIONS", 2)
    opening = read_by(lambda: SampleTable(table.uri).snapshot())
    everything = read_by(lambda: SampleTable(table.uri).snapshot()._table.list_versions()) - opening
    assert SampleTable(table.uri).snapshot().deletions() == both[2:]
    assert read_by(lambda: SampleTable(table.uri).snapshot().deletions()) - opening < 0.7 * everything
    monkeypatch.setattr(snapshots, "_DELETIONS", 32)
    monkeypatch.setattr(snapshots, "_LATELY", 12)
    assert SampleTable(table.uri).snapshot().deletions(lately=True) == both[2:]
    assert read_by(lambda: SampleTable(table.uri).snapshot().deletions(lately=True)) - opening < 0.7 * everything
    monkeypatch.setattr(snapshots, "_LATELY", 2)
    assert SampleTable(table.uri).snapshot().deletions(lately=True) == []


def test_whoever_asks_for_it_has_all_deletions_looked_at(filled, monkeypatch):
    """Where they are only told of, those of the last versions are enough."""
    database, path = filled
    monkeypatch.setattr(snapshots, "_LATELY", 1)
    gone = database.delete(where="stars > 2")
    assert told(database.ingest(path, dry_run=True)) == (gone, 12 - gone, gone, 0)
    database.delete(where="stars = 0")
    database.ingest(write_jsonl(path.parent / "new.jsonl", [toy_records(1)[0] | {"id": "new"}]))
    assert told(database.ingest(path, dry_run=True))[2] == 0
    assert told(database.ingest(path, on_deleted="skip"))[0] == 0


def test_a_version_that_cannot_be_read_is_not_one_that_is_gone(tmp_path):
    table = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    table.append([row("a"), row("b")], seen=0)
    table.delete_ids(["a"])
    snapshot = table.snapshot()
    (deletion,) = snapshot.deletions()
    manifest = tmp_path / "db" / "samples.lance" / "_versions" / manifest_name(deletion[0])
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-20] + bytes(20))
    with pytest.raises(TableError, match="the versions of .* cannot be read"):
        SampleTable(table.uri).snapshot().deletions()
    manifest.unlink()
    assert SampleTable(table.uri).snapshot().deletions() == []
