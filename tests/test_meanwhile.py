"""What others write while an ingest goes on, at the moment when it has looked at the table and not yet written."""

import pytest
from conftest import toy_records, write_jsonl
from reference import ids_in

import rapidin_vdb
from rapidin_vdb.errors import CorpusError, TableError


@pytest.fixture
def files(tmp_path):
    """Two files of six samples, of which one has the same content in both, and five differ."""
    records = [record | {"id": f"new-{number}"} for number, record in enumerate(toy_records(6))]
    theirs = [records[0], *({**record, "output": "theirs"} for record in records[1:])]
    return write_jsonl(tmp_path / "ours.jsonl", records), write_jsonl(tmp_path / "theirs.jsonl", theirs)


def beside(action):
    """Return a progress that does something once the plan is made."""
    done = []

    def progress(stage: str, at: int, total: int) -> None:
        if not done:
            done.append(action())

    return progress


def responses(database) -> dict[str, str]:
    snapshot = database._table.snapshot()
    found = snapshot.samples([f"new-{number}" for number in range(6)])
    assert len(set(ids_in(snapshot))) == snapshot.count()
    return {name: sample.response for name, sample in found.items()}


@pytest.mark.parametrize("token_gradients", [False, True])
@pytest.mark.parametrize("on_duplicate", ["error", "skip", "replace"])
def test_other_content_under_the_same_id(database, files, on_duplicate, token_gradients):
    ours, theirs = files
    other = rapidin_vdb.open(database.path)
    options = {"on_duplicate": on_duplicate, "token_gradients": token_gradients}

    def ingest():
        return database.ingest(ours, **options, progress=beside(lambda: other.ingest(theirs, limit=4)))

    if on_duplicate == "error":
        with pytest.raises(CorpusError, match="new-1 was written with other content while .* and 2 more.*run it again"):
            ingest()
    else:
        report = ingest()
        counts = (report.added, report.replaced, report.unchanged, report.kept)
        assert counts == ((2, 0, 1, 3) if on_duplicate == "skip" else (2, 3, 1, 0))
    found = responses(database)
    theirs_stay = {f"new-{number}" for number in (1, 2, 3)} if on_duplicate != "replace" else set()
    assert set(found) == {f"new-{number}" for number in range(6)}
    assert {name for name, response in found.items() if response == "theirs"} == theirs_stay
    assert database.verify().findings == ()
    if token_gradients:
        hashes = dict(database._table.snapshot().each_content())
        pairs = set(database._table.tokens.snapshot().each_content())
        assert pairs and all(hashes[name] == content for name, content in pairs), "no tokens of what was left out"


def test_single_tokens_of_samples_that_are_gone_meanwhile_are_not_written(database, files):
    ours, _ = files
    database.ingest(ours)
    other = rapidin_vdb.open(database.path)
    database.ingest(
        ours, token_gradients=True, progress=beside(lambda: other.delete(ids=["new-0", "new-3"], purge=True))
    )
    having = {name for name, _ in set(database._table.tokens.snapshot().each_content())}
    assert having == {"new-1", "new-2", "new-4", "new-5"}
    assert database._table.snapshot().samples(["new-0"]) == {}


def test_an_ingest_that_is_refused_does_not_settle_the_width_of_tokens(database, tmp_path):
    record = toy_records(1)[0]
    database.ingest(write_jsonl(tmp_path / "huge.jsonl", [record | {"id": "y", "huge": (1 << 53) + 1}]))
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [record | {"id": "x", "huge": 0.5}])
    with pytest.raises(TableError, match="the column huge holds whole numbers beyond"):
        database.ingest(wrong, token_gradients=True, token_width=16)
    assert not database._table.tokens


def test_another_ingest_begins_with_another_width(database):
    """Both were told that there were no tokens yet; the second may have left the width out."""
    database._table.tokens.ensure(16)
    with pytest.raises(TableError, match="of width 16 by now, .*run it again, with --token-width 16 or without"):
        database._table.tokens.ensure(32)
