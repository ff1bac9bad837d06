"""When an ingest commits what it has made."""

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb.ingest


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_what_has_waited_long_enough_is_committed(database, tmp_path, monkeypatch, seconds):
    """However small it is: a slow ingest that is killed loses a minute, not 64 MiB."""
    monkeypatch.setattr(rapidin_vdb.ingest, "_COMMIT_SECONDS", seconds)
    lines = write_jsonl(tmp_path / "more.jsonl", toy_records(20, first=30))
    batches = database.ingest(lines, batch_tokens=900, dry_run=True).batches
    assert batches > 3
    before = database.version
    assert database.ingest(lines, batch_tokens=900).table_version - before == (batches if seconds == 0 else 1)
    assert database.count() == 44
