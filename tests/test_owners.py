"""Which sample each row of the table of tokens belongs to: against a plain loop, and read once a version."""

import random

import pyarrow as pa
import pytest

from rapidin_vdb.store.owners import named, owners_of
from rapidin_vdb.store.version import TableVersion


def batches_of(rows, size):
    columns = {
        "_rowid": pa.array([row for row, _, _ in rows], pa.uint64()),
        "sample_id": pa.array([name for _, name, _ in rows], pa.string()),
        "content_hash": pa.array([content for _, _, content in rows], pa.string()),
    }
    return pa.table(columns).to_batches(max_chunksize=size)


@pytest.mark.parametrize("seed", range(20))
def test_tokens_of_samples_equal_a_plain_loop(seed):
    chosen = random.Random(seed)
    # Some lie in several runs, some have two contents, and row ids go up and down.
    pairs = [(f"s{chosen.randrange(6)}", f"{chosen.randrange(2)}") for _ in range(chosen.randrange(30))]
    rows = [pair for pair in pairs for _ in range(chosen.randrange(1, 5))]
    numbers = chosen.sample(range(1000), len(rows))
    rows = [(number, *pair) for number, pair in zip(numbers, rows, strict=True)]
    wanted = {(f"s{chosen.randrange(8)}", f"{chosen.randrange(2)}") for _ in range(chosen.randrange(12))}
    owners = owners_of(batches_of(rows, chosen.randrange(1, 9)), "_rowid")
    columns = ("sample_id", "content_hash")
    table = pa.table({name: [pair[at] for pair in sorted(wanted)] for at, name in enumerate(columns)})
    samples = named(table.cast(pa.schema([(name, pa.string()) for name in columns])))
    found, having = owners.tokens_of(samples)
    assert found.tolist() == [number for number, *pair in rows if tuple(pair) in wanted]
    assert having == len({tuple(pair) for _, *pair in rows} & wanted)


def test_they_are_read_once_a_version(database, tmp_path, monkeypatch):
    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16)
    read, scan = [], TableVersion._scan

    def watched(self, columns, *others):
        read.append((self.name, tuple(columns)))
        return scan(self, columns, *others)

    def ask(**options):
        (ranking,) = database.query("Say 5", "blue 35", level="token", top_k=3, **options)
        return ranking.searched

    monkeypatch.setattr(TableVersion, "_scan", watched)
    everything = ask()
    scanned = [columns for name, columns in read if name == "tokens"]
    assert scanned == [("_rowid", "sample_id", "content_hash")]
    part = ask(where="source = 'odd'")
    assert 0 < part < everything == ask()
    assert [columns for name, columns in read if name == "tokens"] == scanned
    database.delete(ids=["toy-003"])
    assert 0 < ask() < everything
    assert [columns for name, columns in read if name == "tokens"] == 2 * scanned
