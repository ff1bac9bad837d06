"""Who reads, sends and waits: reads have threads of their own, bodies must arrive, no address takes the turns of others."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from children import Running
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import SpecError
from rapidin_vdb.query import query_from
from rapidin_vdb.question import Question

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from fastapi import Request
from fastapi.testclient import TestClient
from servers import listening
from test_web_limits import occupied

from rapidin_vdb.web import make_app, serve
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.lines import CancelledError, Client, LateError
from rapidin_vdb.web.reads import Reads
from rapidin_vdb.web.unread import GivingUp

ASKED = {"prompt": "Say 5", "generation": "blue 35", "top_k": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("reads")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    made.load()
    made.query(**ASKED)
    return made


# Reads of the table.


def asking(address: str, *, gone: threading.Event | None = None) -> Request:
    """Return a request of an address, which goes away once an event is set."""

    async def receive() -> dict:
        await (asyncio.sleep(600) if gone is None else asyncio.to_thread(gone.wait, 120))
        return {"type": "http.disconnect"}

    return Request({"type": "http", "client": (address, 1), "headers": []}, receive)


def test_an_address_that_reads_leaves_threads_to_others():
    begun, hold = threading.Event(), threading.Event()

    def long(check):
        begun.set()
        return hold.wait(120)

    async def all_at_once() -> list:
        reads = Reads(seconds=120.0, threads=2)
        many = [asyncio.create_task(reads.read(asking("greedy"), long)) for _ in range(5)]
        assert await asyncio.to_thread(begun.wait, 60)
        found = [await asyncio.wait_for(reads.read(asking("other"), lambda check: 7), 60)]
        assert not any(task.done() for task in many)
        hold.set()
        found += await asyncio.gather(*many)
        reads.close()
        return found

    assert asyncio.run(all_at_once()) == [7] + [True] * 5


def test_a_read_that_nobody_waits_for_keeps_its_place_until_it_ends():
    hold, begun, ended = threading.Event(), threading.Event(), threading.Event()

    def long(check):
        begun.set()
        try:
            while not hold.wait(0.01):
                check()
        finally:
            ended.set()

    async def some() -> None:
        reads = Reads(seconds=0.3, threads=2)
        with pytest.raises(LateError, match="--time-limit"):
            await reads.read(asking("a"), lambda check: hold.wait(120))
        with pytest.raises(LateError):
            await reads.read(asking("a"), lambda check: 7)  # the only place of its address is still taken
        reads._seconds = 120.0  # for those who are to have an answer, however busy this machine is
        assert await reads.read(asking("b"), lambda check: 7) == 7
        hold.set()
        assert await reads.read(asking("a"), lambda check: 7) == 7
        hold.clear()
        with pytest.raises(CancelledError):
            await reads.read(asking("a", gone=begun), long)
        assert await asyncio.to_thread(ended.wait, 60), "what looks up now and then ends soon"
        reads.close()

    asyncio.run(some())


def test_reads_and_exports_have_a_time_limit(served, monkeypatch):
    over, done, ended = threading.Event(), threading.Event(), []

    def endless(**options):
        try:
            while not over.wait(0.02):
                yield "x", {"id": "x"}, True
        finally:
            ended.append(over.is_set())
            done.set()

    monkeypatch.setattr(served, "samples", lambda **options: over.wait(120))
    monkeypatch.setattr(served, "each_record", endless)
    with TestClient(make_app(served, time_limit=0.3), base_url="http://127.0.0.1") as client:
        try:
            for answer in (client.get("/api/samples"), client.post("/api/export", json={})):
                assert answer.status_code == 504 and "longer than is allowed" in answer.json()["detail"]
            assert done.wait(60) and ended == [False], "the export goes on for nobody"
        finally:
            over.set()


def test_exports_leave_the_threads_that_read_to_others(served, monkeypatch):
    over, begun = threading.Event(), threading.Semaphore(0)

    def endless(**options):
        begun.release()
        over.wait(120)
        yield "x", {"id": "x"}, True

    monkeypatch.setattr(served, "each_record", endless)
    answers = []
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        asking = [
            threading.Thread(target=lambda: answers.append(client.post("/api/export", json={}).status_code))
            for _ in range(6)
        ]
        try:
            for thread in asking:
                thread.start()
            assert begun.acquire(timeout=60) and begun.acquire(timeout=60), "an address has two of them"
            assert client.get("/api/samples?limit=1").status_code == 200
            assert "\nrapidin_reads 6.0\n" in client.get("/metrics").text
        finally:
            over.set()
            for thread in asking:
                thread.join(60)
        assert answers == [200] * 6 and "\nrapidin_reads 0.0\n" in client.get("/metrics").text


def test_an_answer_that_nobody_reads_is_given_up(served, monkeypatch):
    ended = threading.Event()

    def many(**options):
        for number in range(200):
            yield str(number), {"id": str(number), "text": "x" * 100_000}, True

    class File(tempfile.SpooledTemporaryFile):
        def close(self):
            ended.set()
            super().close()

    monkeypatch.setattr(served, "each_record", many)
    monkeypatch.setattr("rapidin_vdb.web.export.tempfile.SpooledTemporaryFile", File)
    monkeypatch.setattr("rapidin_vdb.web.unread.UNREAD_SECONDS", 0.3)
    with listening(make_app(served)) as port, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", port))
        line.sendall(
            f"POST /api/export HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            "Content-Length: 2\r\n\r\n{}".encode()
        )
        assert line.recv(15) == b"HTTP/1.1 200 OK"
        assert ended.wait(60), "its file is kept for nobody"


@pytest.mark.parametrize(("sizes", "ends"), [([90, 90], True), ([90, 70, 70], True), ([90, 70, 0], False)])
def test_whoever_reads_slowly_is_waited_for(sizes, ends):
    looks, told, sizes = [], [], list(sizes)
    connection = GivingUp.__new__(GivingUp)
    connection._look = None
    connection.flow = SimpleNamespace(pause_writing=lambda: None, resume_writing=lambda: None)
    connection.loop = SimpleNamespace(
        call_later=lambda seconds, look: looks.append(look) or SimpleNamespace(cancel=lambda: told.append("no more"))
    )
    connection.transport = SimpleNamespace(
        get_write_buffer_size=lambda: sizes.pop(0) if len(sizes) > 1 else sizes[0], abort=lambda: told.append("ended")
    )
    connection.pause_writing()
    while looks and sizes != [0]:
        looks.pop()()
    if not ends:
        connection.resume_writing()
    assert told == (["ended"] if ends else ["no more"])


# Bodies.


def test_a_body_that_trickles_in_is_given_up(served):
    with listening(make_app(served, body_seconds=0.5)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.sendall(
                b"POST /api/query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 10000\r\n\r\n"
            )
            line.settimeout(0.05)
            answer, end = b"", time.monotonic() + 20
            while True:
                assert time.monotonic() < end, "it is waited for"
                try:
                    part = line.recv(65536)
                except TimeoutError:
                    # Closed with bytes of ours unread is a reset; the answer sent before it is read all the same.
                    with contextlib.suppress(ConnectionError):
                        line.sendall(b" ")
                    continue
                except ConnectionResetError:
                    break
                if not part:
                    break
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive whole within 0.5 seconds" in answer
        assert b"connection: close" in answer.lower()


# Turns.


def test_names_get_no_more_explanations_than_their_address(served):
    for question, wanted in ((Question(top_k=1, tokens=True), [1, 2, 1, 1, 1]), (Question(top_k=1), [1, 4, 1])):
        together, order = [], []
        desk = Desk(served, observe=lambda count, seconds, together=together: together.append(count))
        first, hold = occupied(desk)
        jobs = {
            f"greedy {n}": desk.search(Client("greedy", str(n)), question, query_from("Say 5", f"blue {n}"))
            for n in range(3)
        }
        jobs["other"] = desk.search(Client("other"), question, query_from("Say 7", "blue 49"))
        jobs["third"] = desk.do(Client("third"), lambda progress: None)
        for name, job in jobs.items():
            job.future.add_done_callback(lambda _, name=name, order=order: order.append(name))
        hold.set()
        for job in (first, *jobs.values()):
            job.future.result(60)
        desk.close()
        assert together == wanted
        if question.exact:
            assert order == ["greedy 0", "other", "third", "greedy 1", "greedy 2"]


def test_seconds_of_work_are_counted_once(served):
    seconds, begun, ready = [], threading.Event(), threading.Event()
    desk, started = Desk(served, observe=lambda count, taken: seconds.append(taken)), time.monotonic()

    def long(progress):
        begun.set()
        assert ready.wait(5)
        progress("batches", 1, 1)  # between two batches: the other gets its turn

    ingest = desk.do(Client("a"), long, patient=True)
    assert begun.wait(5)
    other = desk.do(Client("b"), lambda progress: time.sleep(0.5))
    ready.set()
    other.future.result(5)
    ingest.future.result(5)
    desk.close()
    assert len(seconds) == 2 and seconds[0] >= 0.5
    assert sum(seconds) <= time.monotonic() - started


# The document.


def test_the_document_says_who_needs_a_token_and_what_is_answered(served):
    with TestClient(make_app(served, token="0123456789abcdef"), base_url="http://127.0.0.1") as client:
        document = client.get("/api/openapi.json", headers={"authorization": "Bearer 0123456789abcdef"}).json()
        refused = client.get("/metrics")
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation.get("security") == (None if path == "/health" else [{"token": []}]), path
            for status, answer in operation["responses"].items():
                if status not in ("200", "422", "503"):
                    assert list(answer["content"]) == ["application/json"], (path, status)
    assert refused.status_code == 401 and refused.headers["content-type"] == "application/json"
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        document = client.get("/api/openapi.json").json()
        assert "security" not in document["paths"]["/api/info"]["get"], "there is none to be had"
        schemas = document["components"]["schemas"]
        assert schemas["Info"]["properties"]["samples"]["type"] == "integer"
        for name, path, found in (
            ("RankingInPieces", "/api/query", client.post("/api/query?pieces=true", json=ASKED | {"matrix": True})),
            ("SampleInPieces", "/api/samples/{sample_id}", client.get("/api/samples/toy-001?pieces=true")),
            ("Info", "/api/info", client.get("/api/info")),
        ):
            operation = next(iter(document["paths"][path].values()))
            shape = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert shape == {"$ref": f"#/components/schemas/{name}"}
            assert set(found.json()) <= set(schemas[name]["properties"])
            if name != "Info":
                assert "pieces=true" in schemas[name]["properties"]["pieces"]["description"]


def test_the_document_of_an_export_is_true_of_both_its_forms(served):
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        responses = client.get("/api/openapi.json").json()["paths"]["/api/export"]["post"]["responses"]
        lines, events = (
            client.post("/api/export", json={}, headers={"accept": accept})
            for accept in ("application/x-ndjson", "text/event-stream")
        )
        refused = client.post("/api/export", json={"where": "nosuch"}, headers={"accept": "text/event-stream"})
    headers = responses["200"]["headers"]
    assert set(headers) == {"x-records", "x-inexact-records"} <= set(lines.headers)
    assert not set(headers) & set(events.headers)
    for header in headers.values():
        assert not header["required"] and header["description"].endswith("Only with JSON lines.")
    said = responses["200"]["content"]["text/event-stream"]["schema"]["description"]
    assert said.startswith("Events, as of a query") and refused.status_code == 200
    example = responses["200"]["content"]["text/event-stream"]["example"]
    results = [json.loads(text.split("event: result\ndata: ")[1]) for text in (example, events.text)]
    assert set(results[0]) == set(results[1]) and all(f"`{name}`" in said for name in results[1])
    assert "507" in responses


def test_counters_are_told_where_the_table_cannot_be_read(served, monkeypatch):
    def fails():
        raise SpecError("gone")

    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        monkeypatch.setattr(served, "count", fails)
        assert "rapidin_samples NaN" in client.get("/metrics").text


# The whole server.


def test_a_token_is_what_a_header_can_carry(served):
    for token in ("short", "0123456789abcde\n", "黄" * 16, "0123456789 abcdef"):
        with pytest.raises(SpecError, match="wanted 16 or more, and only letters, digits and signs of ASCII"):
            serve(served, say=print, token=token)


def rest_of(stream) -> bytes:
    with stream:
        try:
            return stream.read()
        except (http.client.IncompleteRead, ConnectionError) as error:
            return getattr(error, "partial", b"")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_the_command_answers_and_stops_soon(served, context, how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Running(context, ["serve", served.path, "--port", port])
    try:
        server.wait_for(f"on http://127.0.0.1:{port} ")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
            assert json.load(answer) == {"status": "ready"}
        streams = []
        for number in range(8):  # more than it can answer meanwhile
            body = json.dumps({"prompt": f"Say {number}", "max_tokens": 450}).encode()
            headers = {"content-type": "application/json", "accept": "text/event-stream"}
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/api/generate", body, headers)
            streams.append(urllib.request.urlopen(asked, timeout=60))
        assert streams[0].readline().startswith(b"event: ")
        started = time.monotonic()
        os.kill(server.process.pid, how)
        assert server.end().code in (0, 130, -how)
        assert time.monotonic() - started < 10
        ends = [rest_of(stream) for stream in streams]
        assert any(b"the server is stopping" in end for end in ends), "they were open, and are told"
        assert all(end.startswith(b"event: ") and end.endswith(b"\n\n") for end in ends[1:])
    finally:
        server.process.kill()
