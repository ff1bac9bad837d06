"""Commits of several writers in turn: each sample once, as a plain dict has it, and no row looked at twice for it."""

import random

import lance
import numpy as np
import pytest
from reference import ids_in
from test_owners import tokens_of
from test_store import FINGERPRINT, row

from rapidin_vdb.store import SampleTable, meanwhile
from rapidin_vdb.store.meanwhile import came_since
from rapidin_vdb.store.snapshot import Snapshot
from rapidin_vdb.store.version import TableVersion


@pytest.fixture
def table(tmp_path):
    made = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    made.append([row(f"old{number:03d}") for number in range(300)], seen=made.snapshot().version)
    return made


@pytest.fixture
def read(monkeypatch):
    """How many rows were read of each table, and by their row ids; cleared by who looks at it."""
    found, scan, taken = [], TableVersion._scan, Snapshot._taken

    def scanned(self, columns, *others, **options):
        for batch in scan(self, columns, *others, **options):
            found.append((self.name, batch.num_rows))
            yield batch

    def took(self, row_ids, *columns):
        found.append((self.name, len(row_ids)))
        return taken(self, row_ids, *columns)

    monkeypatch.setattr(TableVersion, "_scan", scanned)
    monkeypatch.setattr(Snapshot, "_taken", took)
    return found


def rows_of(read, name="samples"):
    total = sum(count for of, count in read if of == name)
    read.clear()
    return total


def named(writer, commit, count=10):
    return [row(f"{writer}-{commit}-{number}") for number in range(count)]


def test_a_commit_looks_at_what_changed_since_the_last(table, read):
    """Of both writers', whatever the table holds, and however long ago others began to write."""
    writers = {name: SampleTable(table.uri) for name in ("one", "two")}
    seen = dict.fromkeys(writers, table.snapshot().version)
    looked_at = []
    for commit in range(8):
        for name, writer in writers.items():
            done = writer.append(named(name, commit), seen=seen[name])
            assert (done.written, done.other) == (10, ())
            seen[name] = done.seen
            looked_at.append(rows_of(read))
    # The first of all finds nobody's; later ones find those of the other since their last look, and their own.
    assert looked_at == [0, 10, 10, *[20] * 13]
    assert table.snapshot().rows() == 300 + 160 == len(set(ids_in(table.snapshot())))


def test_of_commits_that_bring_no_rows_nothing_is_read(table, read):
    for commit in range(3):
        table.append(named("old", commit), seen=table.snapshot().version)
    looked_at = table.snapshot().version
    table.ensure_scalar_indices()
    table.delete_ids(["old000"])
    table.ensure_columns({"stars": "int"})
    table.place.dataset("samples").optimize.compact_files()
    newest, made = table.snapshot(), []
    dataset = table.place.dataset("samples")
    for version in range(looked_at + 1, newest.version + 1):
        made.append(type(dataset.read_transaction(version).operation).__name__)
    assert {"CreateIndex", "Delete", "Merge", "Rewrite"} < set(made)
    read.clear()
    assert list(came_since(newest, looked_at)) == [] == read
    table.append([row("new")], seen=0)
    read.clear()
    (batch,) = came_since(table.snapshot(), looked_at)
    assert batch["sample_id"].to_pylist() == ["new"] and rows_of(read) == 1


def test_one_foreign_commit_is_not_paid_for_by_every_later_one(table, read):
    seen = table.append(named("ours", 0), seen=table.snapshot().version).seen
    SampleTable(table.uri).delete_ids(["old007"])
    rows_of(read)
    counts = []
    for commit in range(1, 6):
        done = table.append(named("ours", commit), seen=seen)
        assert (done.written, done.seen) == (10, seen)
        counts.append(rows_of(read))
    assert counts == [0, 10, 10, 10, 10]


def test_rows_that_others_wrote_are_found_by_their_ids(table, read):
    """Those that ours meet are read, and no others; of each what it is now."""
    seen, other = table.snapshot().version, SampleTable(table.uri)
    other.append(named("x", 0, 50), seen=seen)
    other.replace([row("x-0-1", content="theirs"), row("old001", content="theirs")], seen=seen)
    other.delete_ids(["x-0-2"])
    other.delete_ids(["x-0-3"])
    other.append([row("x-0-3", content="again")], seen=0)
    read.clear()
    done = table.append(named("x", 0, 5), seen=seen)
    assert [one.sample.sample_id for one in done.other] == ["x-0-1", "x-0-3"]
    assert (done.written, done.unchanged) == (1, 2)
    # 49 that came and are there, one of before that was replaced; then the rows that ours may meet.
    assert [count for _, count in read] == [50, 4]
    assert dict(table.snapshot().each_content(["x-0-2"])) == {"x-0-2": "c"}


@pytest.mark.parametrize("bringing_back", ["restore", "purge"])
def test_what_may_have_come_back_is_looked_for_among_all_rows(table, bringing_back):
    """A sample that was gone when the ingest was planned, and whose row is older than that."""
    there = table.snapshot().version
    table.delete_ids(["old005"])
    seen, other = table.snapshot().version, SampleTable(table.uri)
    restored = lance.Transaction(seen, lance.LanceOperation.Restore(there))
    lance.LanceDataset.commit(table.place.dataset("samples").uri, restored)
    if bringing_back == "purge":
        other.purge()  # nobody knows any more what was committed
    done = table.append([row("old005"), row("new")], seen=seen)
    assert (done.written, done.unchanged) == (1, 1)
    assert table.snapshot().rows() == 301


def test_tokens_that_others_wrote_are_looked_at_once(table, read):
    table.tokens.ensure(8)
    table.tokens.write(tokens_of(*(f"s{number}" for number in range(40))))
    writers = [SampleTable(table.uri), SampleTable(table.uri)]
    for writer in writers:
        writer.tokens.write(tokens_of(f"begun {id(writer)}"))
    read.clear()
    counts = []
    for commit in range(4):
        for number, writer in enumerate(writers):
            assert writer.tokens.write(tokens_of(f"{number} {commit}", f"{number} {commit} b")) == 4
            counts.append(rows_of(read, "tokens"))
    # Two tokens of a sample: first what the other began with, then what it has written since.
    assert counts == [2, 4, *[4] * 6]
    assert writers[0].tokens.write(tokens_of("1 3", "s7", "0 0")) == 0
    assert rows_of(read, "tokens") == 4
    table.place.dataset("tokens").optimize.compact_files()
    assert writers[1].tokens.write(tokens_of("0 3", "last")) == 2
    assert rows_of(read, "tokens") == 0


class Writer:
    """An ingest: a plan for one version, and what is left of it to write."""

    def __init__(self, table):
        self.table, self.seen, self.left = table, 0, []


def content_of(table):
    pairs = list(table.snapshot().each_content())
    assert len(pairs) == len({name for name, _ in pairs}) == table.snapshot().rows()
    return dict(pairs)


@pytest.mark.parametrize("hashes", ["apart", "equal"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_interleaved_writers_do_what_a_dict_does(tmp_path, monkeypatch, seed, shared, hashes):
    """Two ingests, and whoever else adds, replaces, deletes, indexes, compacts, purges and restores beside them.

    Ids are few, so that they meet all the time; with `shared`, both ingests are of one process. Hashes of different ids
    may be equal.
    """
    draw = random.Random(f"{seed} {shared} {hashes}")
    if hashes == "equal":
        monkeypatch.setattr(meanwhile, "hashes_of", lambda names: np.array([len(name) for name in names], np.int64))
    names = [f"s{number}" for number in range(30)]
    first = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    writers = [Writer(first), Writer(first if shared else SampleTable(first.uri))]
    other, model, states = SampleTable(first.uri), {}, {}
    met = {"unchanged": 0, "other": 0, "written": 0}

    def some(of, most=5):
        of = sorted(of)
        return draw.sample(of, min(len(of), draw.randint(1, most)))

    def filled(chosen):
        return {name: f"c{draw.randint(0, 1)}" for name in chosen}

    def rows(contents):
        return [row(name, value=len(content), content=content) for name, content in contents.items()]

    def append(writer):
        if not writer.left:
            writer.seen = writer.table.snapshot().version
            writer.left = draw.sample(sorted(set(names) - set(model)), len(set(names) - set(model)))
        chunk, writer.left = filled(writer.left[:3]), writer.left[3:]
        done = writer.table.append(rows(chunk), seen=writer.seen)
        writer.seen = done.seen
        new = {name: content for name, content in chunk.items() if name not in model}
        differing = [name for name, content in chunk.items() if model.get(name, content) != content]
        assert done.written == len(new) and [one.sample.sample_id for one in done.other] == differing
        assert done.unchanged == len(chunk) - len(new) - len(differing)
        met["unchanged"] += done.unchanged
        met["other"] += len(differing)
        met["written"] += len(new)
        model.update(new)
        if differing and draw.random() < 0.5:  # as with --on-duplicate replace
            writer.seen = writer.table.replace(list(done.other), seen=writer.seen)
            model.update({name: chunk[name] for name in differing})

    def add():
        new = filled(some(set(names) - set(model)))
        other.append(rows(new), seen=other.snapshot().version)
        model.update(new)

    def replace():
        changed = filled(some(names))
        other.replace(rows(changed), seen=0)
        model.update(changed)

    def delete():
        gone = some(names)
        assert other.delete_ids(gone) == sorted(set(gone) & set(model))
        for name in gone:
            model.pop(name, None)

    def restore():
        newest = other.place.dataset("samples")
        version = draw.choice(sorted(states))
        made = lance.Transaction(newest.version, lance.LanceOperation.Restore(version))
        lance.LanceDataset.commit(newest.uri, made)
        model.clear()
        model.update(states[version])

    def purge():
        other.purge()
        states.clear()

    actions = [
        (12, lambda: append(writers[0])), (12, lambda: append(writers[1])), (4, add), (4, replace), (4, delete),
        (2, lambda: (delete(), add())), (1, other.ensure_scalar_indices), (1, restore), (1, purge),
        (2, lambda: other.place.dataset("samples").optimize.compact_files()),
        (1, lambda: other.ensure_columns({"stars": draw.choice(["int", "float"])})),
    ]  # fmt: skip
    weights = [weight for weight, _ in actions]
    for _ in range(70):
        if not set(names) - set(model):
            delete()
        if not model or not states:
            add() if set(names) - set(model) else None
            states[other.snapshot().version] = dict(model)
        draw.choices([act for _, act in actions], weights)[0]()
        assert content_of(other) == model
        states[other.snapshot().version] = dict(model)
    assert min(met.values()) > 5, met


def test_hashes_alone_tell_nothing(table, monkeypatch):
    monkeypatch.setattr(meanwhile, "hashes_of", lambda names: np.zeros(len(list(names)), np.int64))
    seen = table.snapshot().version
    SampleTable(table.uri).append([row("one"), row("two", content="d"), row("three")], seen=seen)
    assert table.written_since(["two", "four"], seen=seen) == {"two": "d"}


def test_a_row_that_is_replaced_again_and_again_is_noted_once(table):
    seen, other = table.snapshot().version, SampleTable(table.uri)
    for number in range(4):
        other.replace([row(name, content=f"{number}") for name in ("old003", "new 1", "new 2")], seen=0)
        assert table.written_since(["new 2", "new 3"], seen=seen) == {"new 2": f"{number}"}
    assert len(table._since._row_ids) == 3
