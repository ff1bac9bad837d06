"""A database in an object store: moto's server on the loopback address stands in for S3."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest
from children import Running, check, content
from conftest import SECRET, toy_records, write_jsonl
from test_cli import call

import rapidin_vdb
from rapidin_vdb.errors import TableError, TableExistsError, TableNotFoundError
from rapidin_vdb.locks import while_waiting
from rapidin_vdb.store.lease import LEASE_SECONDS, RENEWAL_SECONDS
from rapidin_vdb.store.place import place_of
from rapidin_vdb.store.telling import told

pytest.importorskip("moto.server", reason="moto is not installed: pip install 'rapidin-vdb[dev]'")
pytest.importorskip("obstore", reason="obstore is not installed: pip install 'rapidin-vdb[cloud]'")


def made(uri, models, adapters, width=64):
    return rapidin_vdb.init(uri, model=str(models["llama"]), adapter=str(adapters["llama"]), width=width)


def lease(uri):
    """A lease on a place of its own, which runs out soon, and who has fenced."""
    from rapidin_vdb.store.place import place_of

    return lease_in(place_of(uri)._store)


def lease_in(store):
    from rapidin_vdb.store.lease import Lease

    fenced = []

    def fence(holding, taken_over):
        if taken_over:
            fenced.append(1)
        return holding()

    return Lease(store, "lease", place="there", fence=fence, seconds=0.6), fenced


def test_a_database_in_a_bucket_is_that_of_a_folder(bucket, database, tmp_path, models, adapters):
    """Made, filled, queried, deleted from and verified, it holds and says what a folder does."""
    toy = tmp_path / "toy.jsonl"
    far = made(bucket, models, adapters)
    with pytest.raises(TableExistsError, match="a database is already at s3://"):
        made(bucket, models, adapters)
    assert far.ingest(toy).added == 24
    assert far.ingest(toy).unchanged == 24
    assert content(bucket) == content(tmp_path / "db")
    question = {"prompt": "Say 3", "generation": "黄 21", "top_k": 5, "where": "source = 'odd'"}

    def answers(from_database):
        return [(found.sample_id, found.score) for found in from_database.query(**question)[0].results]

    assert answers(far) == answers(database)
    cached = list((tmp_path / "cache").glob("db-*/indexes/cpu/manifest.json"))
    assert len(cached) == 1, "its index lies here, not there"
    far.delete(where="sample_id = 'toy-003'")
    database.delete(where="sample_id = 'toy-003'")
    assert answers(rapidin_vdb.open(bucket)) == answers(database)
    # Which samples were deleted takes a request for every version: it is looked up where it is asked for.
    assert (far.ingest(toy, on_deleted="skip").left_deleted, far.ingest(toy, dry_run=True).brought_back) == (1, 0)
    assert database.ingest(toy, dry_run=True).brought_back == 1
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(4, first=24))
    far.ingest(more, token_gradients=True, token_width=16)
    database.ingest(more, token_gradients=True, token_width=16)
    assert content(bucket) == content(tmp_path / "db")
    assert answers(far) == answers(database)
    far.delete(purge=True)
    assert content(bucket) == content(tmp_path / "db")
    check(bucket)
    assert far.info().bytes > 24 * 128 and far.info().indexes[0].fresh


def test_commands_take_the_uri_and_keep_secrets(bucket, tmp_path, models, adapters, capsys):
    options = ["--model", models["llama"], "--adapter", adapters["llama"], "--width", 64]
    toy = write_jsonl(tmp_path / "toy.jsonl", toy_records(6))
    said = ""

    def answer(*arguments):
        nonlocal said
        code, out, err = call(capsys, *arguments)
        assert code == 0, err
        said += out + err
        return [json.loads(line) for line in out.splitlines()] if "--json" in arguments else out + err

    answer("init", bucket, *options)
    answer("ingest", bucket, toy)
    assert answer("info", bucket, "--json")[0]["samples"] == 6
    assert "6 samples" in answer("index", bucket)
    asked = ("query", bucket, "--prompt", "Say 3", "--generation", "黄 21", "--json")
    assert answer(*asked)[0]["results"][0]["sample_id"] == "toy-003"
    assert answer("show", bucket, "toy-003", "--json")[0]["response"] == "黄 21"
    answer("delete", bucket, "--where", "source = 'odd'", "--purge")
    (found,) = answer(*asked)
    assert {result["sample_id"] for result in found["results"]} == {"toy-000", "toy-002", "toy-004"}
    assert answer("verify", bucket, "--json")[0]["samples"] == 3
    assert answer("info", bucket, "--json")[0]["samples"] == 3
    code, out, err = call(capsys, "info", bucket + "-not")
    assert code == 1 and "no database at s3://" in err
    assert SECRET not in said + out + err


@pytest.mark.slow
def test_writers_that_contend_lose_nothing_and_write_nothing_twice(bucket, tmp_path, models, adapters, context):
    """Two ingests with some samples in common, a commit for every two samples, and a deletion in their midst."""
    far = made(bucket, models, adapters, width=256)
    far.ingest(write_jsonl(tmp_path / "old.jsonl", toy_records(8, first=100)))
    files = [
        write_jsonl(tmp_path / f"{place}.jsonl", toy_records(16, first=first)) for place, first in enumerate((0, 8))
    ]
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "RAPIDIN_"))}
    together = context.Barrier(3)
    commands = [["ingest", bucket, file, "--batch-tokens", 200] for file in files]
    commands.append(["delete", bucket, "--where", "sample_id >= 'toy-100'"])
    children = [Running(context, command, before=partial(prepared, environment, together)) for command in commands]
    for child in children:
        ended = child.end()
        assert ended.code == 0, ended.err
        assert SECRET not in ended.out + ended.err
    check(bucket)
    assert {name for name, _ in content(bucket)} == {f"toy-{number:03d}" for number in range(24)}
    keys, _, versions = far._table.snapshot().keys_in_order()
    came = dict(zip(keys, versions.tolist(), strict=True))
    first, second = ([came[f"toy-{number:03d}"] for number in numbers] for numbers in (range(8), range(16, 24)))
    assert min(first) < max(second) and min(second) < max(first), "one was done before the other began"


def prepared(environment, together):
    """In a child: the environment of the test, which whoever forks it does not have; and all begin at once.

    Computing takes longer than writing, as it does for real: who commits without a pause may keep others waiting.
    """
    import rapidin_vdb.ingest

    os.environ.update(environment)
    commit = rapidin_vdb.ingest._Writer.commit
    rapidin_vdb.ingest._Writer.commit = lambda writer, **how: (commit(writer, **how), time.sleep(1))[0]
    together.wait(100)


@pytest.mark.slow
def test_a_writer_that_was_killed_blocks_nobody_for_long(bucket, tmp_path, models, adapters, monkeypatch):
    """One that dies holding the lease is waited for, then passed by, and what it had begun cannot come after."""
    from rapidin_vdb.store import lease as module

    far = made(bucket, models, adapters)
    code = (
        "import rapidin_vdb, sys, time\n"
        f"with rapidin_vdb.open({bucket!r})._table.committing():\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        child.send_signal(signal.SIGKILL)
    late = far._table.place.open_table("samples")
    monkeypatch.setattr(far._table.place.lock, "_seconds", 1.0)
    started = time.monotonic()
    assert far.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(4))).added == 4
    assert 1.0 < time.monotonic() - started < module.LEASE_SECONDS
    with pytest.raises(RuntimeError, match="ncompatible"):
        late.add(late.to_arrow().slice(0, 0))
    check(bucket)


@pytest.fixture
def in_between(monkeypatch):
    """Let something happen after a fence has opened a table and before it commits anything; once."""
    import lance

    real, acts = lance.dataset, {}

    def dataset(uri, **options):
        found = real(uri, **options)
        act = acts.pop(uri.rpartition("/")[2], None)
        if act is not None:
            act()
        return found

    monkeypatch.setattr(lance, "dataset", dataset)
    return acts


def small(bucket, tmp_path, models, adapters):
    """A database of eight samples with tokens, whose lease runs out soon."""
    far = made(bucket, models, adapters)
    far.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(8)), token_gradients=True, token_width=16)
    far._table.place.lock._seconds = 0.6
    return far


def names_of(bucket):
    """The samples, and those that have tokens."""
    found = content(bucket)
    return [sorted({int(name[4:]) for name, token in found if (token is None) == plain}) for plain in (True, False)]


def newest_rows(bucket) -> int:
    """How many rows the newest version of the samples has, whether it counts or not."""
    return rapidin_vdb.open(bucket)._table.place.open_table("samples").count_rows()


def fell_silent(far, name):
    """A table as a holder of the lease has it that has seen that the lease is its own, and then stands still."""
    place = far._table.place
    place.lock.__enter__()
    late = place.open_table(name)
    place.lock._stop_renewing()
    return late


@pytest.mark.parametrize("name", ["samples", "tokens"])
def test_a_commit_while_the_lease_is_taken_over_stays(bucket, tmp_path, models, adapters, in_between, name):
    """A restore passes all that was committed since its version was looked up; what was acknowledged stays."""
    late = fell_silent(small(bucket, tmp_path, models, adapters), name)
    successor = rapidin_vdb.open(bucket)
    successor._table.place.lock._seconds = 0.6

    def commit():
        late.delete("sample_id = 'toy-000'")
        late.delete("sample_id = 'toy-001'")

    in_between[f"{name}.lance"] = commit
    assert successor.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(1, first=8))).added == 1
    assert not in_between
    expected = [[*range(2, 9)], [*range(2, 8)]] if name == "samples" else [[*range(9)], [*range(2, 8)]]
    assert names_of(bucket) == expected
    with pytest.raises(RuntimeError, match="ncompatible"):
        late.delete("sample_id = 'toy-002'")
    assert names_of(bucket) == expected
    check(bucket)


def killed_after_one(real):
    """A commit that goes through once; then the process is as good as dead."""
    committed = []

    def commit(*arguments, **options):
        if committed:
            raise KeyboardInterrupt
        committed.append(real(*arguments, **options))
        return committed[0]

    return commit


def test_a_fence_that_is_killed_halfway_is_finished_by_the_next(
    bucket, tmp_path, models, adapters, in_between, monkeypatch
):
    """Between its restores the newest version is that before the former writer's last commit, which readers pass over."""
    import lance

    late = fell_silent(small(bucket, tmp_path, models, adapters), "samples")
    in_between["samples.lance"] = lambda: late.delete("sample_id = 'toy-000'")
    successor = rapidin_vdb.open(bucket)
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(1, first=8))
    with monkeypatch.context() as patch:
        patch.setattr(lance.LanceDataset, "commit", killed_after_one(lance.LanceDataset.commit))
        successor._table.place.lock._seconds = 0.6
        with pytest.raises(KeyboardInterrupt):
            successor.ingest(more)
    assert newest_rows(bucket) == 8 and names_of(bucket)[0] == [*range(1, 8)]
    check(bucket)
    third = rapidin_vdb.open(bucket)
    third._table.place.lock._seconds = 0.6
    assert third.ingest(more).added == 1
    assert names_of(bucket)[0] == [*range(1, 9)]
    check(bucket)


def fence_without_a_look(place):
    """What whoever stood still after its last look at the lease does."""
    place._fence(lambda: True, taken_over=True)


def test_a_fence_that_comes_late_undoes_nothing(bucket, tmp_path, models, adapters, in_between):
    """Who takes over may stand still itself, while another takes over from it, writes, and is done."""
    far = small(bucket, tmp_path, models, adapters)
    late, place = far._table.place.open_table("samples"), rapidin_vdb.open(bucket)._table.place

    def others():
        late.delete("sample_id = 'toy-000'")
        fence_without_a_look(far._table.place)
        far.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(2, first=8)))
        far.delete(ids=["toy-001"])

    in_between["samples.lance"] = others
    fence_without_a_look(place)
    assert names_of(bucket)[0] == [*range(2, 10)]
    far.delete(purge=True)
    fence_without_a_look(place)
    fence_without_a_look(place)
    far.delete(ids=["toy-002"], purge=True)
    assert names_of(bucket)[0] == [*range(3, 10)]
    check(bucket)


def test_a_fence_that_comes_late_and_is_killed_is_finished_by_the_next_write(
    bucket, tmp_path, models, adapters, in_between, monkeypatch
):
    """The others are done and have let go of the lease: who takes it then takes it from nobody."""
    import lance

    far = small(bucket, tmp_path, models, adapters)
    place = rapidin_vdb.open(bucket)._table.place
    real = lance.LanceDataset.commit

    def others():
        fence_without_a_look(far._table.place)
        far.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(2, first=8)))
        far.delete(ids=["toy-001"])
        monkeypatch.setattr(lance.LanceDataset, "commit", killed_after_one(real))

    in_between["samples.lance"] = others
    with pytest.raises(KeyboardInterrupt):
        fence_without_a_look(place)
    monkeypatch.setattr(lance.LanceDataset, "commit", real)
    assert newest_rows(bucket) == 8, "until the next write"
    assert names_of(bucket)[0] == [0, *range(2, 10)], "what it undid is read all the same"
    reader = rapidin_vdb.open(bucket)
    assert reader.count() == 9 and reader.count("sample_id = 'toy-001'") == 0
    check(bucket)
    assert far.delete(ids=["toy-002"]) == ["toy-002"]
    assert names_of(bucket)[0] == [0, *range(3, 10)]
    version = rapidin_vdb.open(bucket)._table.snapshot().version
    far.delete(ids=["nobody"])
    assert rapidin_vdb.open(bucket)._table.snapshot().version == version, "a fence that is whole is not done again"
    check(bucket)


def soon(bucket):
    """A writer to a bucket that takes over soon."""
    found = rapidin_vdb.open(bucket)
    found._table.place.lock._seconds = 0.6
    return found


def late_fence(bucket, monkeypatch, *, before, after):
    """A writer whose next fence comes late: it stands still between its last look at the lease and its restore.

    `before` happens in that time, and `after` when the restore is there, before it goes on.
    """
    import lance

    writer, real = soon(bucket), lance.LanceDataset.commit

    def commit(*arguments, **options):
        monkeypatch.setattr(lance.LanceDataset, "commit", real)
        writer._table.place.lock._stop_renewing()
        before()
        made = real(*arguments, **options)
        assert newest_rows(bucket) == 8, "it undid what the others had written"
        assert names_of(bucket)[0] == [0, *range(2, 10)], "which is read all the same"
        after()
        return made

    monkeypatch.setattr(lance.LanceDataset, "commit", commit)
    return writer


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("third", ["none", "opens after it", "opens before it"])
def test_a_late_fence_loses_nothing(bucket, tmp_path, models, adapters, monkeypatch, third, killed):
    """Whoever writes next, or at the moment, restores what it undid; nobody writes on top of it.

    A third has taken the lease before it comes, and opens the table after it, or has opened it and commits after it.
    """
    fell_silent(small(bucket, tmp_path, models, adapters), "samples")
    other, next_one = soon(bucket), soon(bucket)
    lock, opened = next_one._table.place.lock, []

    def before():
        assert other.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(2, first=8))).added == 2
        assert other.delete(ids=["toy-001"]) == ["toy-001"]
        if third != "none":
            lock.__enter__()
            opened.append(next_one._table.place.open_table("samples"))

    def after():
        if third == "opens after it":
            assert next_one.delete(ids=["toy-003"]) == ["toy-003"]
        elif third != "none":
            match = "another writer took over meanwhile. Nothing was lost; run the same command again"
            with pytest.raises(TableError, match=match), told("there"):
                opened[0].delete("sample_id = 'toy-003'")
        if third != "none":
            lock.__exit__()
        if killed:
            raise KeyboardInterrupt

    writer = late_fence(bucket, monkeypatch, before=before, after=after)
    left = {0, *range(3, 10)} - ({3} if third == "opens after it" else set())
    if killed:
        with pytest.raises(KeyboardInterrupt):
            writer.delete(ids=["toy-002"])
        writer = soon(bucket)
    assert writer.delete(ids=["toy-002"]) == ["toy-002"]
    assert names_of(bucket)[0] == sorted(left)
    check(bucket)


def test_a_late_fence_in_the_middle_of_a_purge_loses_nothing(bucket, tmp_path, models, adapters, monkeypatch):
    """What it undid is not removed as an older version."""
    import lance

    from rapidin_vdb.store import bucket as module

    far = small(bucket, tmp_path, models, adapters)
    first = far._table.place.dataset("samples").version
    far.delete(ids=["toy-001"])
    real, came = module.remove_versions, []

    def remove_versions(dataset, **options):
        if not came:
            restore = lance.LanceOperation.Restore(first)
            mark = {"rapidin_vdb.fence": ""}
            made = lance.Transaction(dataset.version, restore, transaction_properties=mark)
            uri, options_of_store = dataset.uri, far._table.place.options
            came.append(lance.LanceDataset.commit(uri, made, storage_options=options_of_store))
            assert newest_rows(bucket) == 8 and 1 not in names_of(bucket)[0]
        real(dataset, **options)

    monkeypatch.setattr(module, "remove_versions", remove_versions)
    with pytest.raises(TableError, match="older versions of the table samples of .* could not be deleted"):
        far.delete(purge=True)
    far.delete(purge=True)
    assert names_of(bucket)[0] == [0, *range(2, 8)]
    assert len(far._table.place.dataset("samples").versions()) == 2
    check(bucket)


def test_a_late_fence_just_before_a_purge_loses_nothing(bucket, tmp_path, models, adapters, monkeypatch):
    """The version that a purge keeps cannot be committed on top of what another undid."""
    import lance

    far = small(bucket, tmp_path, models, adapters)
    first = far._table.place.dataset("samples").version
    far.delete(ids=["toy-001"])
    real = lance.LanceDataset.commit

    def commit(uri, made, **options):
        if isinstance(made.operation, lance.LanceOperation.Append):
            monkeypatch.setattr(lance.LanceDataset, "commit", real)
            mark = {"rapidin_vdb.fence": ""}
            late = lance.Transaction(
                made.read_version, lance.LanceOperation.Restore(first), transaction_properties=mark
            )
            real(uri, late, **options)
            assert newest_rows(bucket) == 8 and 1 not in names_of(bucket)[0]
        return real(uri, made, **options)

    monkeypatch.setattr(lance.LanceDataset, "commit", commit)
    with pytest.raises(TableError, match="another writer took over meanwhile"):
        far.delete(purge=True)
    assert lance.LanceDataset.commit == real
    far.delete(purge=True)
    assert names_of(bucket)[0] == [0, *range(2, 8)]
    check(bucket)


def test_a_late_fence_whose_version_was_purged_begins_again(bucket, tmp_path, models, adapters, monkeypatch):
    fell_silent(small(bucket, tmp_path, models, adapters), "samples")
    other, purged = soon(bucket), []

    def before():
        purged.extend(other.delete(ids=["toy-001"], purge=True))

    writer = late_fence(bucket, monkeypatch, before=before, after=lambda: pytest.fail("it restored what is gone"))
    assert writer.delete(ids=["toy-002"]) == ["toy-002"]
    assert purged == ["toy-001"] and names_of(bucket)[0] == [0, *range(3, 8)]
    check(bucket)


def test_a_commit_that_is_late_by_a_whole_purge_fails(bucket, tmp_path, models, adapters):
    """Of the fence that stopped it nothing is left, but the purge ended with another."""
    late = fell_silent(small(bucket, tmp_path, models, adapters), "samples")
    rows, other = late.to_arrow().slice(0, 1), soon(bucket)
    assert other.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(2, first=8))).added == 2
    other.delete(ids=["toy-001"], purge=True)
    with pytest.raises(RuntimeError, match="ncompatible"):
        late.add(rows)
    assert names_of(bucket)[0] == [0, *range(2, 10)]
    check(bucket)


def test_what_was_committed_without_the_lease_is_not_acknowledged(bucket, tmp_path, models, adapters):
    """A purge may have made room for it among the older versions, where nobody looks."""
    far = small(bucket, tmp_path, models, adapters)
    other = soon(bucket)

    def write():
        with far._table.committing():
            far._table.place.lock._stop_renewing()
            assert other.delete(ids=["toy-001"], purge=True) == ["toy-001"]

    with pytest.raises(TableError, match="another writer took over"):
        write()
    assert far.delete(ids=["toy-002"]) == ["toy-002"]
    assert names_of(bucket)[0] == [0, *range(3, 8)]


def test_behind_an_interruption_is_a_fence_at_once(bucket):
    """What was interrupted may still be committed by threads that know nothing of it."""
    first, _ = lease(bucket)
    second, fenced = lease(bucket)
    second._seconds = 60.0
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), first:
        raise KeyboardInterrupt
    with second:
        pass
    with second:
        pass
    assert fenced == [1] and time.monotonic() - started < 30


def test_behind_an_error_that_was_caught_is_a_fence_too(bucket):
    first, _ = lease(bucket)
    second, fenced = lease(bucket)
    second._seconds = 60.0
    with first:
        with pytest.raises(ValueError, match="in the middle"), first:
            raise ValueError("in the middle")
    with second:
        pass
    assert fenced == [1]


def test_a_purge_that_cannot_end_with_a_fence_removes_nothing(bucket, tmp_path, models, adapters, monkeypatch):
    far = small(bucket, tmp_path, models, adapters)
    before = len(far._table.place.dataset("samples").versions())
    monkeypatch.setattr(far._table.place, "_end_former", lambda name, holding: False)
    with pytest.raises(TableError, match="another writer took over"):
        far.delete(ids=["toy-001"], purge=True)
    assert len(far._table.place.dataset("samples").versions()) > before


def test_an_interruption_leaves_nobody_who_renews(bucket, monkeypatch):
    """It may come while the lease waits for what is being written."""
    first, _ = lease(bucket)

    class Interrupted:
        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *_):
            pass

    def interrupted():
        with first:
            monkeypatch.setattr(first, "_changing", Interrupted())

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert first._stop.is_set() and not first._depth


def test_a_store_that_fails_is_told_by_whatever_looks_at_tokens(bucket, tmp_path, models, adapters, monkeypatch):
    from obstore.exceptions import GenericError

    far = small(bucket, tmp_path, models, adapters)

    def has_table(name):
        raise GenericError("the network is down")

    monkeypatch.setattr(far._table.place, "has_table", has_table)
    match = "the network is down"
    with pytest.raises(TableError, match=match):
        far.info()
    with pytest.raises(TableError, match=match):
        far.verify()
    with pytest.raises(TableError, match=match):
        far.ingest(tmp_path / "toy.jsonl")


def test_a_lease_is_held_by_one(bucket):
    first, fenced = lease(bucket)
    second, _ = lease(bucket)
    with pytest.raises(TableError, match="another writer took over"), first, first:
        assert first.check()
        started = time.monotonic()
        first._stop_renewing()  # it stands still
        with second:
            assert time.monotonic() - started > 0.5
            with pytest.raises(TableError, match="another writer took over"):
                first.check()
    with second:
        pass
    assert fenced == [], "the second one fences, and only where the first had not let go"


def test_a_renewal_that_fails_loses_no_lease(bucket, monkeypatch):
    """One that gets no answer is tried again; of one that was refused, it is asked whose the lease is."""
    import obstore
    from obstore.exceptions import GenericError, PreconditionError

    held, fenced = lease(bucket)
    real, outcomes, seen = obstore.put, [], []

    def put(store, name, content, **options):
        how = outcomes.pop(0) if outcomes else "well"
        if how == "no answer":
            seen.append(how)
            raise GenericError("timed out")
        made = real(store, name, content, **options)
        seen.append(how)  # once it is done: what the store refuses is none
        if how == "answer lost":
            raise PreconditionError("tried twice, and the first had done it")
        return made

    monkeypatch.setattr(obstore, "put", put)
    with held:
        for how in ("no answer", "answer lost"):
            seen.clear()
            outcomes.append(how)
            time.sleep(1.3)  # twice as long as it may stand still
            assert seen[0] == how and seen.count("well") >= 2, "it is renewed again"
            assert held.check()
    assert fenced == []


def test_a_table_is_opened_before_the_lease_is_looked_at(bucket):
    """Else who lost it in between would commit on top of what a successor wrote."""
    order = []
    place = SimpleNamespace(
        _connection=SimpleNamespace(open_table=lambda name: order.append("open") or SimpleNamespace(version=3)),
        lock=SimpleNamespace(check=lambda: order.append("check")),
        _is_whole=lambda name, version: True,
    )
    assert type(place_of(bucket)).open_table(place, "samples").version == 3
    assert order == ["open", "check"]


def test_whoever_waits_for_a_lease_can_give_up(bucket):
    (first, _), (second, _) = lease(bucket), lease(bucket)

    def step(keeping: bool) -> bool:
        raise LookupError

    with first, while_waiting(step), pytest.raises(LookupError), second:
        raise AssertionError("it was held")
    with second:
        pass


def test_a_lease_that_is_renewed_is_waited_for(bucket, caplog):
    first, _ = lease(bucket)
    second, fenced = lease(bucket)
    order = []

    def wait():
        with second:
            order.append("second")

    with first:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(2)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"] and fenced == []
    said = [record.getMessage() for record in caplog.records]
    assert said == ["waiting for the database there, to which another is writing; one that died is passed by after 1 s"]


class Conditional(BaseHTTPRequestHandler):
    """Objects as Google's and Azure's servers keep them, as far as puts go that name what they replace."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict] = {}
    numbers = iter(range(1_700_000_000_000_000, 1_800_000_000_000_000))
    one_by_one = threading.Lock()

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.one_by_one:
            number, tag, _ = self.objects.get(self.path, ("0", None, b""))
            wanted, match = self.headers["x-goog-if-generation-match"], self.headers["If-Match"]
            if wanted not in (None, number) or match not in (None, tag):
                self.answer(412)
            elif self.headers["If-None-Match"] == "*" and tag is not None:
                self.answer(409)
            else:
                new = str(next(self.numbers))
                self.objects[self.path] = new, f'"{new[::-1]}"', content
                self.answer(201, b"", self.path)

    def do_GET(self):
        known = self.objects.get(self.path)
        self.answer(404) if known is None else self.answer(200, known[2], self.path)

    def do_DELETE(self):
        self.answer(404 if self.objects.pop(self.path, None) is None else 204)

    def do_POST(self):
        """Azure's deletion of several; here it is always of one, which nobody misses."""
        self.rfile.read(int(self.headers["Content-Length"]))
        lines = [
            "--one",
            "Content-Type: application/http",
            "Content-ID: 0",
            "",
            "HTTP/1.1 202 Accepted",
            "",
            "",
            "--one--",
            "",
        ]
        self.answer(202, "\r\n".join(lines).encode(), kind="multipart/mixed; boundary=one")

    def answer(self, code, content=b"", path=None, kind="application/octet-stream"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if path is not None:
            number, tag, _ = self.objects[path]
            for name, value in (("ETag", tag), ("x-goog-generation", number)):
                self.send_header(name, value)
            self.send_header("Last-Modified", self.date_time_string())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("cloud", ["gs", "az"])
def test_a_lease_goes_by_what_each_cloud_tells_versions_by(cloud):
    """Google's by the number of a version, Azure's by the entity tag; against a server of ours, not against theirs."""
    from obstore.store import from_url

    from rapidin_vdb.store.lease import check_conditional_puts

    server = ThreadingHTTPServer(("127.0.0.1", 0), Conditional)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    key = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    options = {
        "gs": {"service_account_key": json.dumps(key)},
        "az": {"account_name": "a", "endpoint": address, "skip_signature": True},
    }
    store = from_url(f"{cloud}://place-{cloud}/db", client_options={"allow_http": True}, **options[cloud])
    check_conditional_puts(store, place=cloud)
    first, fenced = lease_in(store)
    second, passed = lease_in(store)
    with pytest.raises(TableError, match="another writer took over"), first:
        time.sleep(0.5)  # it renews
        first.check()
        first._stop_renewing()
        with second, pytest.raises(TableError, match="another writer took over"):
            first.check()
    with first:
        first.check()
    assert (fenced, passed) == ([], [1])
    server.shutdown()
    server.server_close()


def test_stores_in_which_both_would_win_are_refused(monkeypatch):
    import obstore
    from obstore.store import MemoryStore

    from rapidin_vdb.store.lease import check_conditional_puts

    check_conditional_puts(MemoryStore(), place="memory")
    honest = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, path, data, *, mode: honest(store, path, data))
    with pytest.raises(TableError, match=r"does not honour conditional puts \(If-None-Match and If-Match\)"):
        check_conditional_puts(MemoryStore(), place="memory")


@pytest.mark.parametrize(
    "uri, message",
    [
        (f"s3://key:{SECRET}@bucket/db", r"s3://\*\*\*@bucket/db: give credentials in the environment"),
        ("s3://", "wanted a bucket"),
        ("ftp://host/db", "are not supported"),
        ("s3://bucket/db#1", "can have no # here"),
        ("s3://bucket/a//c", r"contained empty path segment$"),
    ],
)
def test_bad_places_are_refused_without_their_secrets(uri, message):
    with pytest.raises(TableError, match=message) as caught:
        rapidin_vdb.open(uri)
    assert SECRET not in str(caught.value)


class Refusing(BaseHTTPRequestHandler):
    """A store that answers everything with an error."""

    protocol_version = "HTTP/1.1"
    status, code = 403, "AccessDenied"

    def do_GET(self):
        text = f'<?xml version="1.0"?>\n<Error><Code>{self.code}</Code><Message>No</Message></Error>'.encode()
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "status, code, message",
    [
        (404, "NoSuchBucket", "there is no such bucket: make it, or mend its name"),
        (403, "AccessDenied", "the store refuses it: check the credentials, and what they allow"),
        (403, "InvalidAccessKeyId", "the store does not know this key"),
        (403, "SignatureDoesNotMatch", "the secret does not fit the key"),
    ],
)
def test_what_a_store_refuses_is_told_in_words(bucket, monkeypatch, models, adapters, status, code, message):
    monkeypatch.setattr(Refusing, "status", status)
    monkeypatch.setattr(Refusing, "code", code)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        for ask in (rapidin_vdb.open, lambda uri: made(uri, models, adapters)):
            with pytest.raises(TableError, match=rf": {message}.* \(.*status code: {status} [A-Za-z ]*\)$"):
                ask(bucket)
    finally:
        server.shutdown()
        server.server_close()


def test_a_probe_that_was_left_is_in_nobodys_way(bucket, models, adapters):
    """By an init that was killed while it tried the store."""
    import obstore

    from rapidin_vdb.store.place import place_of

    obstore.put(place_of(bucket)._store, ".probe-0123", b"1")
    assert made(bucket, models, adapters).count() == 0


def test_who_may_only_read_has_an_index_without_scalar_ones(bucket, models, adapters, tmp_path, monkeypatch, caplog):
    import obstore
    from obstore.exceptions import PermissionDeniedError

    far = made(bucket, models, adapters)
    far.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(8)))

    def put(*_, **__):
        raise PermissionDeniedError("status code: 403 Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", put)
        with pytest.raises(TableError, match="cannot be written; .*: the store refuses it"):
            far.delete(where="sample_id = 'toy-003'")
        assert far.index("cpu").samples == 8
    assert "filters look at every row where scalar indices are missing: " in caplog.text
    assert far._table._table.list_indices() == []
    far.index("cpu")
    assert len(far._table._table.list_indices()) == 3


@pytest.mark.parametrize("patience", [0.0, 30.0])
def test_nothing_is_claimed_of_a_commit_whose_answer_was_lost(
    bucket, models, adapters, tmp_path, monkeypatch, caplog, patience
):
    """It is looked for where there is time to try again, and what it wrote was there already."""
    import lancedb.table

    from rapidin_vdb.store.bucket import Bucket

    monkeypatch.setattr(Bucket, "patience", patience)
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(4))
    far, real = made(bucket, models, adapters), lancedb.table.LanceTable.add

    def add(*arguments, **options):
        real(*arguments, **options)
        raise RuntimeError("the connection was closed")

    monkeypatch.setattr(lancedb.table.LanceTable, "add", add)
    if patience:
        report = far.ingest(corpus)
        assert (report.added, report.unchanged, far.count()) == (0, 4, 4)
        assert "the connection was closed; it is tried again" in caplog.text
        return
    with pytest.raises(
        TableError, match="cannot be written; what was committed before stays: the connection was closed"
    ):
        far.ingest(corpus)
    assert far.count() == 4


def test_no_server_is_an_error_of_ours(monkeypatch, bucket):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TableError, match="cannot be opened"):
        rapidin_vdb.open(bucket)


def test_credentials_from_files(bucket, monkeypatch, tmp_path, server):
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile far]\nregion = us-east-1\nendpoint_url = {server}\n")
    (tmp_path / "keys").write_text(f"[far]\naws_access_key_id = a-key\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "far")
    with pytest.raises(TableNotFoundError, match="no database at s3://"):
        rapidin_vdb.open(bucket)
    place = place_of(bucket)
    # Nodes of a cluster have no such files.
    assert place.settings == {"AWS_ENDPOINT_URL_S3": server, "AWS_REGION": "us-east-1"}
    # Whoever asks AWS's library often gets what lasts: it renews what has less than fifteen minutes left.
    kept = place._store.credential_provider.ttl - timedelta(minutes=5)
    assert timedelta(0) < kept < timedelta(minutes=15)


def test_a_lease_does_not_wait_for_long(bucket, monkeypatch):
    """One request that hangs must not cost whoever holds it the lease."""
    import obstore

    place = place_of(bucket)
    assert place.lock._hasty.client_options["timeout"] == "5s" and LEASE_SECONDS == 4 * RENEWAL_SECONDS
    assert place.lock._store is place._store and "timeout" not in (place._store.client_options or {})
    used, put = [], obstore.put
    monkeypatch.setattr(
        obstore, "put", lambda store, *more, **options: (used.append(store), put(store, *more, **options))[1]
    )
    place.lock._seconds = 0.2
    with place.lock:
        time.sleep(0.5)
    assert used[0] is used[-1] is place._store and {*map(id, used[1:-1])} == {id(place.lock._hasty)}, "renewals alone"


def test_a_database_beside_the_cache_is_none_of_it(monkeypatch, tmp_path, models):
    """Its indexes are no cached ones, though they lie in the same folder and were not used for long."""
    from rapidin_vdb.index_cache import note_use
    from rapidin_vdb.store.cache import cache_folder

    monkeypatch.setenv("RAPIDIN_VDB_CACHE", str(tmp_path))
    monkeypatch.setenv("RAPIDIN_VDB_CACHE_GIB", str(100 / 2**30))
    cached = cache_folder("s3://bucket/db") / "indexes" / "cpu"
    kept = [tmp_path / name / kind / "cpu" for name in ("db1", "of-others") for kind in ("indexes", "token_indexes")]
    for index in (cached, *kept):
        index.mkdir(parents=True)
        (index / "rows").write_bytes(bytes(500))
        os.utime(index, (1000, 1000))
    note_use(cached)
    assert [(index / "rows").exists() for index in (cached, *kept)] == [False, True, True, True, True]


def test_no_rows_are_taken_for_left_where_something_lies_over_others():
    """Of a kind of file that nothing here makes, we do not know where it is."""
    from rapidin_vdb.store.leftovers import unnamed_files

    def dataset(overlays):
        fragment = SimpleNamespace(
            data_files=lambda: [SimpleNamespace(path="rows.lance")], metadata=SimpleNamespace(overlays=overlays)
        )
        return SimpleNamespace(
            get_fragments=lambda: [fragment], describe_indices=list, version=3, read_transaction=lambda version: None
        )

    paths = ["data/rows.lance", "data/other.lance", "_transactions/1.txn"]
    assert unnamed_files(dataset([]), paths) == paths[1:]
    assert unnamed_files(dataset(["one"]), paths) == paths[2:]


def test_the_cache_keeps_to_its_limit(monkeypatch, tmp_path, caplog):
    from filelock import FileLock

    from rapidin_vdb.errors import SpecError
    from rapidin_vdb.index_cache import note_use
    from rapidin_vdb.store.cache import cache_folder, cache_limit

    monkeypatch.setenv("RAPIDIN_VDB_CACHE", str(tmp_path))
    monkeypatch.setenv("RAPIDIN_VDB_CACHE_GIB", str(2500 / 2**30))
    indexes = [cache_folder(f"s3://bucket/{number}") / "indexes" / "cpu" for number in range(4)]

    def there(*sizes):
        for age, (index, size) in enumerate(zip(indexes, sizes, strict=True)):
            index.mkdir(parents=True, exist_ok=True)
            (index / "rows").write_bytes(bytes(size))
            os.utime(index, (1000 + age, 1000 + age))

    def left():
        return [(index / "rows").exists() for index in indexes]

    there(1000, 1000, 1000, 1000)
    note_use(indexes[0])
    assert left() == [True, False, False, True], "the oldest go, but not the one in use"
    there(1000, 1000, 1000, 1000)
    lock = FileLock(indexes[1] / ".lock")
    with lock:
        note_use(indexes[0])
    assert left() == [True, True, False, False], "nor one that somebody is writing"
    there(700, 700, 700, 2600)
    note_use(indexes[3])
    assert left() == [True, True, True, False], "what does not fit alone is not kept, and no other goes for its sake"
    assert "the index cpu takes 2.42e-06 GiB, but all cached indexes together may take 2.33e-06 GiB" in caplog.text
    monkeypatch.setenv("RAPIDIN_VDB_CACHE_GIB", "much")
    with pytest.raises(SpecError, match="RAPIDIN_VDB_CACHE_GIB is much; wanted a number above 0"):
        cache_limit()


def test_an_index_that_does_not_fit_the_cache_is_refused(bucket, monkeypatch, tmp_path, models, adapters, caplog):
    """When it is asked for, when a query would make it, and when the table grows; answers stay right."""
    from rapidin_vdb.errors import SpecError

    def size():
        return sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())

    def best():
        return far.query("Say 3", "黄 21", top_k=3)[0].results

    far = made(bucket, models, adapters)
    far.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(24)))
    monkeypatch.setenv("RAPIDIN_VDB_CACHE_GIB", str(5000 / 2**30))
    with pytest.raises(
        SpecError, match="an index cpu of 24 rows takes some .*set RAPIDIN_VDB_CACHE_GIB to more, or go"
    ):
        far.index("cpu")
    before = best()
    assert before[0].sample_id == "toy-003" and size() == 0 and "an index cpu of 24 rows takes" in caplog.text
    monkeypatch.setenv("RAPIDIN_VDB_CACHE_GIB", str(6000 / 2**30))
    far = rapidin_vdb.open(bucket)
    assert best() == before and 4000 < size() < 6000
    far.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(4, first=24)))
    far = rapidin_vdb.open(bucket)
    assert best()[0] == before[0] and far.query("Say 3", "黄 21")[0].searched == 28
    assert "cannot be brought up to date on disk: it would be larger than the cache may get" in caplog.text
    assert 4000 < size() < 6000
    with pytest.raises(SpecError, match="an index cpu of 28 rows takes"):
        far.index("cpu")


def test_a_purge_leaves_nothing_behind_and_nothing_out(bucket, tmp_path, models, adapters, monkeypatch):
    """What dead writers left goes; what a successor writes stays, even where the purge stands still in the middle."""
    import obstore

    from rapidin_vdb.store.place import place_of

    far = made(bucket, models, adapters)
    far.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(8)))
    far.index("cpu")  # scalar indices too
    store, place = place_of(bucket)._store, far._table.place
    left = [f"samples.lance/{name}" for name in ("data/left.lance", "_transactions/3-left.txn", "_indices/left/page")]
    for path in left:
        obstore.put(store, path, b"left")
    monkeypatch.setattr("rapidin_vdb.store.lease.LEASE_SECONDS", 1.0)
    successor, stood = rapidin_vdb.open(bucket), []
    successor._table.place.lock._seconds = 1.0
    real = obstore.delete

    def delete(there, path):
        if not stood and path in left:
            stood.append(path)
            place.lock._stop_renewing()
            successor.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(4, first=8)))
        real(there, path)

    monkeypatch.setattr(obstore, "delete", delete)
    with pytest.raises(TableError, match="another writer took over"):
        far.delete(where="sample_id = 'toy-003'", purge=True)
    assert stood
    check(bucket)
    assert {name for name, _ in content(bucket)} == {f"toy-{number:03d}" for number in range(12) if number != 3}
    far.delete(purge=True)
    names = list(place._below("samples.lance/"))
    assert not set(left) & set(names) and len([name for name in names if name.endswith(".manifest")]) == 2
    assert [version.made_by for version in far.versions()] == ["purge", "fence"]
    check(bucket)
    assert len(content(bucket)) == 11 and far.query("Say 3", "黄 21", where="source = 'odd'")[0].searched == 5


class Endless(BaseHTTPRequestHandler):
    """A table of more versions than anybody lists to the end: a store tells a thousand at a time."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list] = []

    def do_GET(self):
        self.asked.append(self.path)
        more = len(self.asked) < 20
        entries = "".join(
            f"<Contents><Key>db/samples.lance/_versions/{len(self.asked):04d}{number:04d}.manifest</Key>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;1&quot;</ETag><Size>1</Size></Contents>"
            for number in range(1000)
        )
        text = (
            '<?xml version="1.0"?><ListBucketResult><Name>b</Name><KeyCount>1000</KeyCount>'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>"
            + f"<NextContinuationToken>{len(self.asked)}</NextContinuationToken>" * more
            + f"{entries}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def test_whether_there_is_a_table_takes_one_request(bucket, monkeypatch):
    from rapidin_vdb.store.place import place_of

    monkeypatch.setattr(Endless, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        assert place_of(bucket).has_table("samples")
        time.sleep(0.2)  # nor is one sent off that nobody waits for
        assert len(Endless.asked) == 1
    finally:
        server.shutdown()
        server.server_close()
