"""A database in an object store: moto's server on the loopback address stands in for S3."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from children import check, content
from conftest import toy_records, write_jsonl
from test_cli import call

import rapidin_vdb
from rapidin_vdb.errors import TableError, TableExistsError, TableNotFoundError

pytest.importorskip("moto.server", reason="moto is not installed: pip install 'rapidin-vdb[dev]'")
pytest.importorskip("obstore", reason="obstore is not installed: pip install 'rapidin-vdb[cloud]'")

SECRET = "not-to-be-printed-0123456789"


@pytest.fixture(scope="module")
def server():
    """An S3 server in a process of its own."""
    code = (
        "from moto.server import ThreadedMotoServer\nimport sys, time\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\nserver.start()\n"
        "print(*server.get_host_and_port(), flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        _, port = process.stdout.readline().split()
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A place in it, with credentials in the environment."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("RAPIDIN_VDB_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{os.urandom(6).hex()}"
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).read()
    return f"s3://{name}/db"


def made(uri, models, adapters, **options):
    return rapidin_vdb.init(uri, model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, **options)


def command(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rapidin_vdb", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def lease(uri):
    """A lease on a place of its own, which runs out soon, and who has fenced."""
    from rapidin_vdb.store.lease import Lease
    from rapidin_vdb.store.place import place_of

    fenced = []
    return Lease(place_of(uri)._store, "lease", place=uri, fence=lambda: fenced.append(1), seconds=0.6), fenced


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
    for arguments in (["init", bucket, *options], ["ingest", bucket, toy], ["info", bucket, "--json"]):
        code, out, err = call(capsys, *arguments)
        assert code == 0, err
        said += out + err
    assert json.loads(out)["samples"] == 6
    code, out, err = call(capsys, "info", bucket + "-not")
    assert code == 1 and "no database at s3://" in err
    assert SECRET not in said + out + err


@pytest.mark.slow
def test_two_writers_lose_nothing_and_write_nothing_twice(bucket, tmp_path, models, adapters):
    made(bucket, models, adapters)
    files = [
        write_jsonl(tmp_path / f"{place}.jsonl", toy_records(16, first=first)) for place, first in enumerate((0, 8))
    ]
    children = [command("ingest", bucket, file, "--batch-tokens", 200) for file in files]
    for child in children:
        _, err = child.communicate(timeout=200)
        assert child.returncode == 0, err
    check(bucket)
    assert {name for name, _ in content(bucket)} == {f"toy-{number:03d}" for number in range(24)}


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


def test_a_lease_is_held_by_one(bucket):
    first, fenced = lease(bucket)
    second, _ = lease(bucket)
    with first, first:
        first.check()
        started = time.monotonic()
        first._stop_renewing()  # it stands still
        with second:
            assert time.monotonic() - started > 0.5
            with pytest.raises(TableError, match="another writer took over"):
                first.check()
    with second:
        pass
    assert fenced == [], "the second one fences, and only where the first had not let go"


def test_a_lease_that_is_renewed_is_waited_for(bucket):
    import threading

    first, _ = lease(bucket)
    second, fenced = lease(bucket)
    order = []

    def wait():
        with second:
            order.append("second")

    with first:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.5)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"] and fenced == []


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
    ],
)
def test_bad_places_are_refused_without_their_secrets(uri, message):
    with pytest.raises(TableError, match=message) as caught:
        rapidin_vdb.open(uri)
    assert SECRET not in str(caught.value)


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


def test_the_cache_keeps_to_its_limit(monkeypatch, tmp_path):
    from rapidin_vdb.errors import SpecError
    from rapidin_vdb.store import trim_cache
    from rapidin_vdb.store.cache import cache_folder, cache_limit

    monkeypatch.setenv("RAPIDIN_VDB_CACHE", str(tmp_path))
    monkeypatch.setenv("RAPIDIN_VDB_CACHE_GIB", str(2500 / 2**30))
    indexes = [cache_folder(f"s3://bucket/{number}") / "indexes" / "cpu" for number in range(4)]
    for age, index in enumerate(indexes):
        index.mkdir(parents=True)
        (index / "rows").write_bytes(bytes(1000))
        os.utime(index, (1000 + age, 1000 + age))
    trim_cache(indexes[0])
    assert [index.is_dir() for index in indexes] == [True, False, False, True], "the oldest go, but not the one in use"
    monkeypatch.setenv("RAPIDIN_VDB_CACHE_GIB", "much")
    with pytest.raises(SpecError, match="RAPIDIN_VDB_CACHE_GIB is much; wanted a number above 0"):
        cache_limit()
