"""Commits that fail: tried again in an object store, with all that waits, and nothing twice."""

from contextlib import contextmanager

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import GradientError, TableError
from rapidin_vdb.store import SampleTable, TokenTable
from rapidin_vdb.store.place import Folder


@pytest.fixture
def more(tmp_path, monkeypatch):
    """Records that are not in the database, and no long waits."""
    monkeypatch.setattr("rapidin_vdb.ingest._FIRST_PAUSE", 0.01)
    return write_jsonl(tmp_path / "more.jsonl", toy_records(6, first=40))


def failing(monkeypatch, kind, name: str, *, times: int, done_before: bool = False, words="503 SlowDown") -> list[int]:
    """Let a method fail so many times, before or after it has done its work; return what counts the calls."""
    real, calls = getattr(kind, name), []

    def tried(table, *arguments, **options):
        calls.append(1)
        if len(calls) > times:
            return real(table, *arguments, **options)
        if done_before:
            real(table, *arguments, **options)
        raise OSError(words)

    monkeypatch.setattr(kind, name, tried)
    return calls


def interrupted_between(monkeypatch) -> None:
    """Let the first commit fail, and a Ctrl-C come in the pause behind it."""

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "patience", 30.0)
    failing(monkeypatch, SampleTable, "append", times=1)
    monkeypatch.setattr("rapidin_vdb.ingest.wait", interrupted)


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
    monkeypatch.setattr(Folder, "patience", 1.0)
    with pytest.raises(TableError, match="503 SlowDown"):
        database.ingest(more)
    assert 3 <= len(calls) <= 9 and database.info().samples == 24


@pytest.mark.parametrize(
    "words",
    [
        f"{'s3://a-long-address/' * 20}: status code: 403 Forbidden",
        "status code: 404 Not Found: <?xml version='1.0'?><Error><Code>NoSuchBucket</Code></Error>",
    ],
)
def test_what_will_not_pass_is_not_tried_again(database, more, monkeypatch, words):
    monkeypatch.setattr(Folder, "patience", 30.0)
    calls = failing(monkeypatch, SampleTable, "append", times=100, words=words)
    with pytest.raises(TableError):
        database.ingest(more)
    assert len(calls) == 1


@pytest.fixture
def half_bad(database, tmp_path, monkeypatch):
    """Records of which the last gives no gradient."""
    monkeypatch.setattr("rapidin_vdb.ingest._FIRST_PAUSE", 0.01)
    records = [*toy_records(3, first=40), toy_records(1, first=50)[0] | {"output": "a much longer answer, " * 5}]
    make = database._loaded().maker.make_batch

    def made(batch, **options):
        if len(batch[0].input_ids) > 200:
            return [GradientError(f"sample {sample.sample_id}: the gradient is not finite") for sample in batch]
        return make(batch, **options)

    monkeypatch.setattr(database._loaded().maker, "make_batch", made)
    return write_jsonl(tmp_path / "some.jsonl", records)


def test_an_error_of_something_else_does_not_cost_the_rows_before_it(database, half_bad, monkeypatch):
    """The store may be away for the moment that a gradient cannot be had."""
    monkeypatch.setattr(Folder, "patience", 30.0)
    calls = failing(monkeypatch, SampleTable, "append", times=2)
    with pytest.raises(GradientError, match="toy-050: the gradient is not finite"):
        database.ingest(half_bad, batch_tokens=190)
    assert len(calls) == 3 and database.count() == 27


def test_where_it_does_both_are_told(database, half_bad, monkeypatch):
    failing(monkeypatch, SampleTable, "append", times=100)
    both = "toy-050: the gradient is not finite.*; and what was done since the last commit is lost: .*503 SlowDown"
    with pytest.raises(TableError, match=both):
        database.ingest(half_bad, batch_tokens=190)
    assert database.count() == 24


def test_an_interruption_of_that_is_no_reason_either(database, half_bad, monkeypatch):
    interrupted_between(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        database.ingest(half_bad, batch_tokens=190)
    assert database.count() == 27


def test_an_answer_that_is_lost_behind_the_commit_doubles_nothing(database, more, monkeypatch):
    """The rows are there, what was seen is the version that they made, and the lock was let go of as after success."""
    monkeypatch.setattr(Folder, "patience", 30.0)
    real, failed, within = SampleTable.committing, [], []

    @contextmanager
    def committing(table):
        before = database.count()
        within.append(1)
        try:
            with real(table):
                yield
        finally:
            within.pop()
        # Behind the outermost only: by then the writer knows the version that it has made.
        if database.count() > before and not within and not failed:
            failed.append(1)
            raise TableError("the lease cannot be read") from OSError("503 SlowDown")

    monkeypatch.setattr(SampleTable, "committing", committing)
    report = database.ingest(more)
    assert failed and database.count() == 30 and (report.added, report.unchanged) == (0, 6)
    assert len(set(contents(database))) == 30


def test_an_interruption_between_two_tries_is_no_reason_to_lose_rows(database, more, monkeypatch):
    interrupted_between(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        database.ingest(more)
    assert database.count() == 30 and len(set(contents(database))) == 30


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
