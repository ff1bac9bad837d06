"""Which sample each row of the table of tokens belongs to: against a plain loop, and read once a version.

And which samples may have tokens, for who writes them.
"""

import random
from contextlib import nullcontext

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from test_store import FINGERPRINT, row

from rapidin_vdb.store import SampleTable, TokenRows
from rapidin_vdb.store.owners import Having, named, owners_of
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


def test_names_may_be_more_text_than_an_array_of_plain_strings_holds():
    """Such an array ends at 2 GiB, as do all of its joins."""
    owners = owners_of(batches_of([(1, "a", "x"), (2, "b", "y")], 1), "_rowid")
    assert owners.samples.type == pa.large_string()
    plain = pa.chunked_array([["a\0x"], ["c\0x"]], pa.string())
    for samples in (plain, plain.cast(pa.large_string())):
        found, having = owners.tokens_of(samples)
        assert (found.tolist(), having) == ([1], 1)
    nothing = owners_of([], "_rowid")
    assert nothing.samples.type == pa.large_string() and nothing.tokens_of(plain)[1] == 0


@pytest.mark.parametrize("seed", range(20))
def test_who_may_have_tokens_is_whoever_has(seed):
    chosen = random.Random(seed)
    there = {f"s{chosen.randrange(40)}" for _ in range(chosen.randrange(30))}
    having = Having(1, [*there, *there])
    for _ in range(3):
        new = [f"s{chosen.randrange(40)}" for _ in range(chosen.randrange(10))]
        having.add(new)
        there |= set(new)
        asked = [f"s{chosen.randrange(50)}" for _ in range(chosen.randrange(50))]
        assert having.among(asked) == sorted(set(asked) & there)


@pytest.fixture
def table(tmp_path):
    made = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    made.tokens.ensure(8)
    return made


@pytest.fixture
def looks(monkeypatch):
    """What looked through the table of tokens: readers, and deletions."""
    found, search, delete = [], lancedb.table.LanceTable.search, lance.LanceDataset.delete

    def searched(table, *arguments, **options):
        found.extend(["read"] if table.name == "tokens" else [])
        return search(table, *arguments, **options)

    def deleted(dataset, where, **options):
        found.extend(["deleted"] if dataset.uri.endswith("tokens.lance") else [])
        return delete(dataset, where, **options)

    monkeypatch.setattr(lancedb.table.LanceTable, "search", searched)
    monkeypatch.setattr(lance.LanceDataset, "delete", deleted)
    return found


def tokens_of(*names, content="c"):
    vectors = np.ones((2, 8), np.float16)
    return [TokenRows(encoded=row(name).encoded, content_hash=content, vectors=vectors) for name in names]


def stored(table):
    rows = table.place.open_table("tokens").to_arrow()
    return sorted(zip(rows["sample_id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True))


def test_a_writer_looks_once_at_the_tokens_that_are_there(table, looks):
    table.tokens.write(tokens_of("from before"))
    writer = SampleTable(table.uri)
    looks.clear()
    for number in range(5):
        assert writer.tokens.write(tokens_of(f"s{number}", f"t{number}")) == 4
    assert looks == ["read"]
    # Rows of samples without tokens are replaced as if there were no such table.
    looks.clear()
    writer.append([row("plain"), row("s0")], seen=0)
    for number in range(3):
        writer.replace([row("plain", content=f"{number}")], seen=0)
    assert looks == []
    # What it wrote itself is known, too.
    assert writer.tokens.write(tokens_of("s3", "new")) == 2
    writer.replace([row("s0", content="other")], seen=0)
    assert looks == ["read", "deleted"]
    looks.clear()
    assert writer.tokens.write(tokens_of("last")) == 2
    assert looks == []
    names = ["from before", "last", "new", *(f"s{number}" for number in range(1, 5)), *(f"t{n}" for n in range(5))]
    assert stored(table) == sorted((name, "c") for name in names for _ in range(2))
    # And what is deleted may come back.
    assert writer.tokens.write(tokens_of("s0")) == 2


@pytest.mark.parametrize("others", ["write", "delete", "purge"])
def test_a_writer_looks_again_where_others_wrote_tokens(table, looks, others):
    table.append([row("s0"), row("s1")], seen=0)
    table.tokens.write(tokens_of("s0"))
    other = SampleTable(table.uri)
    if others == "write":
        assert other.tokens.write(tokens_of("s1", "s2")) == 4
    elif others == "delete":
        other.delete_ids(["s0"])
    else:
        other.purge()
    looks.clear()
    assert table.tokens.write(tokens_of("s0", "s1", "s2")) == {"write": 0, "delete": 6, "purge": 4}[others]
    assert "read" in looks
    assert stored(table) == [(name, "c") for name in ("s0", "s1", "s2") for _ in range(2)]


def test_nobodys_version_is_taken_for_our_own(table, looks, monkeypatch):
    """One whose lease another took over may commit on top of what it has not looked at."""
    table.tokens.write(tokens_of("s0"))
    other, add = SampleTable(table.uri), lancedb.table.LanceTable.add
    monkeypatch.setattr(other.tokens, "_committing", nullcontext)

    def late(self, rows, **options):
        monkeypatch.setattr(lancedb.table.LanceTable, "add", add)
        other.tokens.write(tokens_of("s1"))
        return add(self, rows, **options)

    monkeypatch.setattr(lancedb.table.LanceTable, "add", late)
    table.tokens.write(tokens_of("s2"))
    assert table.tokens.write(tokens_of("s1", "s2")) == 0


def test_content_that_is_spared_may_hold_a_quote(table):
    """Or whatever else stands in SQL otherwise than in Python."""
    contents = ['it\'s "so"', "back\\slash", "gone"]
    table.tokens.write([rows for number in range(3) for rows in tokens_of(f"s{number}", content=contents[number])])
    with table.committing():
        table.tokens.delete_of(["s0", "s1", "s2"], but=contents[:2])
    assert stored(table) == [("s0", contents[0])] * 2 + [("s1", contents[1])] * 2
