"""An ingest with single tokens beside another writer reads no row of samples twice to see what that wrote."""

from conftest import toy_records, write_jsonl

import rapidin_vdb
import rapidin_vdb.ingest
from rapidin_vdb.store.version import TableVersion


def test_tokens_of_new_samples_ask_for_no_other_rows(database, tmp_path, monkeypatch):
    monkeypatch.setattr(rapidin_vdb.ingest, "_COMMIT_SECONDS", 0.0)
    records = [record | {"id": f"new-{number}"} for number, record in enumerate(toy_records(12))]
    ours, theirs = write_jsonl(tmp_path / "ours.jsonl", records), write_jsonl(tmp_path / "theirs.jsonl", records[:2])
    other, read, scan = rapidin_vdb.open(database.path), [], TableVersion._scan
    done = []

    def scanned(self, columns, *others, **options):
        for batch in scan(self, columns, *others, **options):
            read.append(batch.num_rows if done and self.name == "samples" else 0)
            yield batch

    def beside(stage, at, total):
        if stage == "ingest" and at and not done:
            other.ingest(theirs, on_duplicate="skip")
            other.delete(ids=["toy-003"])
            done.append(True)

    monkeypatch.setattr(TableVersion, "_scan", scanned)
    report = database.ingest(ours, token_gradients=True, batch_tokens=200, progress=beside)
    monkeypatch.undo()
    assert report.added + report.unchanged == 12 and database.count() == 24 - 1 + 12
    assert database.verify().findings == ()
    having = {name for name, _ in set(database._table.tokens.snapshot().each_content())}
    assert having == {record["id"] for record in records}
    # What came: theirs, and each of ours in the look after its commit.
    assert 0 < sum(read) <= 12
