"""Commits that fail: tried again in an object store, with all that waits, and nothing twice."""

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import TableError
from rapidin_vdb.store import SampleTable, TokenTable
from rapidin_vdb.store.place import Folder


@pytest.fixture
def more(tmp_path, monkeypatch):
    """Records that are not in the database, and no long waits."""
    monkeypatch.setattr("rapidin_vdb.ingest._FIRST_PAUSE", 0.01)
    return write_jsonl(tmp_path / "more.jsonl", toy_records(6, first=40))


def failing(monkeypatch, kind, name: str, *, times: int, done_before: bool = False) -> list[int]:
    """Let a method fail so many times, before or after it has done its work; return what counts the calls."""
    real, calls = getattr(kind, name), []

    def tried(table, *arguments, **options):
        calls.append(1)
        if len(calls) > times:
            return real(table, *arguments, **options)
        if done_before:
            real(table, *arguments, **options)
        raise TableError("503 SlowDown")

    monkeypatch.setattr(kind, name, tried)
    return calls


def contents(database) -> list[str]:
    return sorted(sample.sample_id for sample in database.samples(limit=100)[0])


@pytest.mark.parametrize("done_before", [False, True], ids=["not written", "written, but the answer was lost"])
def test_a_commit_is_tried_again(database, more, monkeypatch, caplog, done_before):
    monkeypatch.setattr(Folder, "patience", 30.0)
    calls = failing(monkeypatch, SampleTable, "append", times=3, done_before=done_before)
    report = database.ingest(more)
    assert len(calls) == 4 and caplog.text.count("503 SlowDown; it is tried again") == 3
    assert report.added + report.unchanged == 6 and report.unchanged == (6 if done_before else 0)
    assert contents(database) == contents(rapidin_vdb.open(database.path)) and len(set(contents(database))) == 30
    assert database.info().samples == 30


def test_a_replacement_is_tried_again(database, tmp_path, more, monkeypatch):
    monkeypatch.setattr(Folder, "patience", 30.0)
    calls = failing(monkeypatch, SampleTable, "replace", times=1, done_before=True)
    changed = write_jsonl(
        tmp_path / "new.jsonl", [toy_records(1)[0] | {"output": "another answer"}, *toy_records(2, first=60)]
    )
    report = database.ingest(changed, on_duplicate="replace")
    assert len(calls) == 2 and (report.added, report.replaced) == (2, 1)
    assert database.info().samples == 26
    assert database.samples(where="sample_id = 'toy-000'")[0][0].response == "another answer"


def test_patience_ends(database, more, monkeypatch, caplog):
    """In a folder at once: what fails there goes on to fail, and each try may leave the disk fuller."""
    calls = failing(monkeypatch, SampleTable, "append", times=100)
    with pytest.raises(TableError, match="503 SlowDown"):
        database.ingest(more)
    assert len(calls) == 1 and not caplog.text
    monkeypatch.setattr(Folder, "patience", 0.05)
    with pytest.raises(TableError, match="503 SlowDown"):
        database.ingest(more)
    assert 3 <= len(calls) <= 5 and database.info().samples == 24


@pytest.mark.parametrize("patience", [0.0, 30.0])
def test_samples_never_come_without_the_tokens_that_were_asked_for(database, more, monkeypatch, patience):
    monkeypatch.setattr(Folder, "patience", patience)
    failing(monkeypatch, TokenTable, "write", times=1 if patience else 100)
    if patience:
        assert database.ingest(more, token_gradients=True, token_width=16).token_gradients > 0
    else:
        with pytest.raises(TableError, match="503 SlowDown"):
            database.ingest(more, token_gradients=True, token_width=16)
    assert database.info().samples == (30 if patience else 24)
    tokens = database._table.tokens.snapshot()
    assert tokens is None or {*tokens.sample_ids()} == {*contents(database)} - {f"toy-{n:03d}" for n in range(24)}
