"""What ends requests: their time, those who went away; what makes way, what is counted, and who may ask through a proxy."""

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import byte_tokenizer, save_model, toy_records, write_jsonl
from filelock import FileLock

import rapidin_vdb
from rapidin_vdb.errors import (
    CorpusError,
    FilterError,
    FingerprintError,
    MemoryTakenError,
    ModelError,
    OvertakenError,
    PurgedError,
    SampleNotFoundError,
    ScratchError,
    SpecError,
    TableError,
)
from rapidin_vdb.query import query_from
from rapidin_vdb.question import Question

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from fastapi.testclient import TestClient
from servers import listening

from rapidin_vdb.web import make_app, serve
from rapidin_vdb.web.answers import said, status_of
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.document import EXAMPLES
from rapidin_vdb.web.lines import BusyError, CancelledError, Client, Job, LateError
from rapidin_vdb.web.server import origin_of

ASKED = {"prompt": "Say 5", "generation": "blue 35", "top_k": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("limits")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    made.load()
    made.query(**ASKED)
    return made


@pytest.fixture
def port(served):
    """The port of a real server."""
    with listening(make_app(served)) as port:
        yield port


def send(port: int, path: str, body: dict, *, accept: str = "application/json") -> socket.socket:
    text = json.dumps(body)
    line = socket.create_connection(("127.0.0.1", port))
    line.sendall(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
    )
    return line


def counted(text: str, route: str, status: int) -> float:
    found = re.search(rf'^rapidin_requests_total{{route="{route}",status="{status}"}} (\S+)$', text, re.M)
    return float(found[1]) if found else 0.0


def measured(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: line.recv(65536), b"")).decode()


def occupied(desk: Desk, address: str = "x") -> tuple[Job, threading.Event]:
    """Give a desk something to do, which is under way now, and lasts until the event is set."""
    begun, hold = threading.Event(), threading.Event()

    def work(progress) -> bool:
        begun.set()
        return hold.wait(120)

    job = desk.do(Client(address), work)
    assert begun.wait(60)
    return job, hold


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_who_goes_away_is_not_waited_for(served, port, accept):
    body = {"prompt": "Say 5", "max_tokens": 450}
    with served._engine.alone:  # nothing can be answered meanwhile
        lines = [send(port, "/api/generate", body, accept=accept) for _ in range(6)]
        end = time.monotonic() + 60
        while "rapidin_waiting 5.0" not in measured(port):
            assert time.monotonic() < end, "they never came to wait"
            time.sleep(0.02)
        for line in lines:
            line.close()
        end = time.monotonic() + 20
        while "rapidin_waiting 0.0" not in measured(port):
            assert time.monotonic() < end, "those who went away still wait"
            time.sleep(0.02)
    if accept == "application/json":
        while counted(measured(port), "/api/generate", 499) < 6:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_the_time_limit_holds_even_where_nothing_moves(served):
    with TestClient(make_app(served, time_limit=0.3), base_url="http://127.0.0.1") as client:
        for accept in ("application/json", "text/event-stream"):
            started, text = time.monotonic(), {}

            def ask(accept=accept, text=text):
                text["is"] = client.post("/api/query", json=ASKED, headers={"accept": accept})

            with served._engine.alone:  # as a piece of work that takes its time
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join(10)
            assert time.monotonic() - started < 5 and "longer than is allowed" in text["is"].text
            assert text["is"].status_code == (504 if accept == "application/json" else 200)
        assert client.get("/health").json() == {"status": "ready"}
        answer = client.post("/api/generate", json={"prompt": "Say 5", "max_tokens": 450})
        assert answer.status_code == 504


class StopError(Exception):
    """Raised by who listens."""


def test_generations_and_explanations_can_be_stopped(served):
    heard = []

    def stop(stage: str, done: int, total: int) -> None:
        heard.append(stage)
        if heard.count("generated tokens") == 5 or heard.count("matrix") == 9:
            raise StopError

    with pytest.raises(StopError):
        served.generate("Say 5", max_tokens=450, progress=stop)
    assert heard == ["generated tokens"] * 5
    heard.clear()
    with pytest.raises(StopError):
        served.query(**ASKED | {"generation": "blue 35 and more"}, tokens=True, matrix=True, progress=stop)
    assert heard.count("matrix") == 9
    heard.clear()
    served.query(**ASKED, tokens=True, refine=24, progress=lambda stage, done, total: heard.append(stage))
    assert heard.count("tokens") >= 4, "between exact scores, and between token scores"


def test_one_that_is_late_is_late_alone(served):
    desk = Desk(served)
    blocking, hold = occupied(desk)
    question = Question(top_k=3, tokens=True, matrix=True)
    texts = [("Say 5", "blue 35"), ("Say 7", "blue 49 and more"), ("Say 2", "grün 14")]
    jobs = [desk.search(Client(f"c{n}"), question, query_from(*text)) for n, text in enumerate(texts)]

    def late(stage: str, done: int, total: int) -> None:
        if stage == "matrix":
            jobs[1].deadline = 0.0  # its time runs out while it is explained

    jobs[1].progress = late
    hold.set()
    assert blocking.future.result(60)
    with pytest.raises(LateError, match="--time-limit"):
        jobs[1].future.result(60)
    for number in (0, 2):
        assert jobs[number].future.result(60).results == served.query(*texts[number], top_k=3, tokens=True)[0].results
    desk.close()


def test_an_ingest_makes_way(tmp_path, served, models, adapters):
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(tmp_path / "first.jsonl", toy_records(4)))
    path, order = write_jsonl(tmp_path / "more.jsonl", toy_records(60, first=4)), []
    desk = Desk(made, seconds=20.0)

    def work(progress):
        return made.ingest(path, batch_tokens=200, progress=progress)

    begun = threading.Event()
    ingest = desk.do(Client("a"), work, progress=lambda *_: begun.set(), patient=True)
    ingest.future.add_done_callback(lambda _: order.append("ingest"))
    assert begun.wait(20)
    second = desk.do(Client("a"), lambda progress: order.append("second ingest"), patient=True)
    asked = desk.search(Client("b"), Question(top_k=3), query_from("Say 5", "blue 35"))
    asked.future.add_done_callback(lambda _: order.append("query"))
    assert len(asked.future.result(30).results) == 3
    assert ingest.future.result(60).added == 60
    second.future.result(30)
    assert order == ["query", "ingest", "second ingest"], "one ingest at a time"
    assert made.info().samples == 64
    desk.close()


def test_an_ingest_that_waits_for_another_writer_holds_up_nobody(tmp_path, models, adapters, monkeypatch, caplog):
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(tmp_path / "first.jsonl", toy_records(4)))
    path = write_jsonl(tmp_path / "more.jsonl", toy_records(8, first=4))
    desk, waits = Desk(made, seconds=60.0), threading.Event()
    # As another process would hold it: by a file of its own.
    other = FileLock(tmp_path / "db" / ".commit.lock", thread_local=False)

    def told(stage, done, total) -> None:
        if stage == "waiting":
            waits.set()

    def ingest(*, taken_at: str = "") -> Job:
        def heard(progress):
            def step(stage, done, total) -> None:
                if stage == taken_at and not other.is_locked:
                    other.acquire()
                progress(stage, done, total)

            return step

        waits.clear()
        return desk.do(Client("a"), lambda p: made.ingest(path, progress=heard(p)), progress=told, patient=True)

    def others_are_served() -> bool:
        asked = desk.search(Client("b"), Question(top_k=2), query_from("Say 5", "blue 35"))
        return len(asked.future.result(60).results) == 2

    def free_again() -> None:
        assert desk.do(Client("c"), lambda progress: "next", patient=True).future.result(60) == "next"

    try:
        # Before anything was computed: it ends with whoever asked.
        with other:
            job = ingest()
            assert waits.wait(60) and others_are_served() and not job.future.done()
            desk.give_up(job, CancelledError())
            free_again()
        assert made.count() == 4
        # With what it has computed, it waits on.
        job = ingest(taken_at="tokens")
        assert waits.wait(60) and others_are_served()
        desk.give_up(job, CancelledError())
        assert others_are_served() and made.count() == 4
        other.release()
        free_again()
        assert made.count() == 12
        # But no longer than the server lasts.
        path = write_jsonl(tmp_path / "most.jsonl", toy_records(4, first=12))
        monkeypatch.setattr("rapidin_vdb.web.patience.LAST_SECONDS", 0.3)
        job = ingest(taken_at="tokens")
        assert waits.wait(60)
        desk.close()
        with pytest.raises(BusyError, match="stopping"):
            job.future.result(0)
        assert "computed since its last commit is lost" in caplog.text
    finally:
        other.release(force=True)
        desk.stop()
    assert made.count() == 12


def test_a_status_says_whose_fault_it_is(tmp_path, served, models, adapters):
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, status in (
        (SpecError("x"), 400), (CorpusError("x"), 400), (FilterError("x"), 400), (SampleNotFoundError("x"), 404),
        (ModelError("x"), 500), (TableError("x"), 500), (FingerprintError("x"), 500), (PurgedError("x"), 503),
        (ScratchError("x"), 507), (BusyError("x"), 503), (LateError(), 504), (OvertakenError("x"), 503), (MemoryTakenError("x"), 503),
        (SampleNotFoundError("no sample 'No space left on device'"), 404),
    ):  # fmt: skip
        assert status_of(error) == status, error
    try:
        try:
            raise full
        except OSError:
            raise FilterError("of another, who was let in meanwhile")  # noqa: B904
    except FilterError as error:
        assert status_of(error) == 400
    try:
        raise TableError("cannot be written") from full
    except TableError as error:
        assert status_of(error) == 507
    options = {"model": str(models["llama"]), "adapter": str(adapters["llama"]), "width": 64}
    made = rapidin_vdb.init(tmp_path / "db", **options)
    with TestClient(make_app(made), base_url="http://127.0.0.1") as client:
        empty = client.post("/api/query", json=ASKED)
        assert empty.status_code == 400 and "the database db is empty" in empty.json()["detail"]
        made.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(2)))
        for asked in ({"as_of": 99999}, {"level": "token"}, {"where": "nosuch = 1"}):
            assert client.post("/api/query", json=ASKED | asked).status_code == 400, asked
        gone = client.get("/api/sample", params={"sample_id": "nosuch"})
        assert gone.status_code == 404 and gone.json()["detail"] == "no sample 'nosuch' in db"
        shutil.rmtree(tmp_path / "db")
        answers = [client.get("/api/samples"), client.post("/api/query", json=ASKED)]
        events = client.post("/api/query", json=ASKED, headers={"accept": "text/event-stream"})
        assert [answer.status_code for answer in answers] == [500, 500]
        assert '"status": 500' in events.text and events.headers["x-accel-buffering"] == "no"
        assert not any(str(tmp_path) in answer.text for answer in [*answers, events]), "where it lies is not told"


def test_where_a_database_lies_is_told_to_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = str(tmp_path / "link" / "db")
    for place in (path, path + "/", "link/db", "./link/db/"):
        for text, wanted in (
            (f"the database {path} is empty.", "the database db is empty."),
            (f"Not found: {path}/samples.lance/x, and {path[1:]}/y", "Not found: db/samples.lance/x, and db/y"),
            (f"{tmp_path}/real/db: {path}-old", f"db: {path}-old"),
        ):
            assert said(SpecError(text), place) == wanted, place
    assert said(SpecError("some data, not in /data."), "/data") == "some data, not in data."
    assert said(SpecError("s3://bucket/a/db has none; mydb has"), "s3://bucket/a/db") == "db has none; mydb has"
    assert said(SpecError("db or mydb"), "db") == "db or mydb"


def test_a_request_may_say_which_database_it_is_for(served):
    asked = (
        ("/api/query", ASKED), ("/api/generate", {"prompt": "Say 5", "max_tokens": 1}), ("/api/export", {}),
        ("/api/ingest", {"records": [{"instruction": "x", "output": "y"}]}), ("/api/info", None),
        ("/api/samples", None), ("/api/sample?sample_id=toy-001", None), ("/api/samples/toy-001", None),
        ("/api/nearest?sample_id=toy-001", None), ("/api/columns", None),
    )  # fmt: skip
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        paths = [path for path in client.get("/api/openapi.json").json()["paths"] if path.startswith("/api/")]
        assert len(paths) == len(asked)
        for accept in ("application/json", "text/event-stream"):
            for path, body in asked:
                statuses = [
                    client.request(
                        "GET" if body is None else "POST", path, json=body,
                        headers={"accept": accept, "x-database": identity},
                    ).status_code
                    for identity in ("0" * 32, served.identity)
                ]  # fmt: skip
                assert statuses == [409, 403 if path == "/api/ingest" else 200], path


def test_matrices_that_no_page_could_hold_are_refused(served, monkeypatch):
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        matrices = [
            result["matrix"] for result in client.post("/api/query", json=ASKED | {"matrix": True}).json()["results"]
        ]
        numbers = sum(len(row) for matrix in matrices for row in matrix)
        monkeypatch.setattr("rapidin_vdb.web.shapes._MOST_NUMBERS", numbers)
        assert client.post("/api/query", json=ASKED | {"matrix": True}).status_code == 200
        monkeypatch.setattr("rapidin_vdb.web.shapes._MOST_NUMBERS", numbers - 1)
        monkeypatch.setattr("rapidin_vdb.explanation._Explanation._learn_tokens", None)  # it is said before
        refused = client.post("/api/query", json=ASKED | {"matrix": True})
        assert refused.status_code == 400 and f"of 3 results have {numbers:,} numbers" in refused.json()["detail"]


def test_what_is_refused_or_fails_is_counted_and_streams_are_timed_whole(served, monkeypatch):
    app = make_app(served)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        assert client.get("/api/info", headers={"host": "evil.example"}).status_code == 421
        started = time.monotonic()
        client.post(
            "/api/query", json=ASKED | {"tokens": True, "matrix": True}, headers={"accept": "text/event-stream"}
        )
        taken = time.monotonic() - started

        def fails(**options):
            raise ZeroDivisionError("nobody thought of this")

        monkeypatch.setattr(served, "samples", fails)
        failed = client.get("/api/samples")
        assert failed.status_code == 500 and "something went wrong" in failed.json()["detail"]
        assert "script-src 'self'" in failed.headers["content-security-policy"]
        text = client.get("/metrics").text
    assert counted(text, "other", 421) == counted(text, "/api/samples", 500) == counted(text, "/api/query", 200) == 1
    seconds = re.search(r'^rapidin_request_seconds_sum{route="/api/query"} (\S+)$', text, re.M)
    assert 0.3 * taken < float(seconds[1]) <= taken


def test_links_lead_to_the_page(served):
    cross = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    with TestClient(make_app(served), base_url="http://127.0.0.1:8000") as client:
        assert client.get("/", headers=cross).status_code == 200
        assert client.get("/", headers=cross | {"sec-fetch-dest": "iframe"}).status_code == 403
        assert client.get("/", headers=cross | {"sec-fetch-mode": "no-cors"}).status_code == 403
        assert client.get("/api/samples", headers=cross).status_code == 403


def test_a_proxy_that_was_named_may_stand_in_front(served):
    app = make_app(served, served_as=origin_of("https://Rapidin.example.org/"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for headers, status in (
            ({"host": "rapidin.example.org", "origin": "https://rapidin.example.org"}, 200),
            ({"origin": "https://rapidin.example.org"}, 200),  # a proxy that asks under the server's own name
            ({"host": "rapidin.example.org", "origin": "https://evil.example"}, 403),
            ({"origin": "https://rapidin.example.org.evil.example"}, 403),
            ({"host": "other.example.org"}, 421),
        ):
            assert client.post("/api/query", json=ASKED, headers=headers).status_code == status, headers
    with TestClient(make_app(served), base_url="http://127.0.0.1:8000") as client:
        named = {"host": "rapidin.example.org", "origin": "https://rapidin.example.org"}
        assert client.post("/api/query", json=ASKED, headers=named).status_code == 421
    assert origin_of("http://[::1]:8080/x") == "http://[::1]:8080"
    for url in ("rapidin.example.org", "ftp://x", "https://", "https://a:b@c", "https://x:99999", "http://["):
        with pytest.raises(SpecError, match="wanted the public address"):
            origin_of(url)


def test_what_cannot_be_served_is_said(served, tmp_path):
    for options, message in (
        ({"port": 99999}, "wanted 0 .any that is free. to 65535"),
        ({"time_limit": 0.0}, "wanted a number of seconds above 0"),
        ({"time_limit": float("nan")}, "wanted a number of seconds above 0"),
        ({"served_as": "x"}, "wanted the public address"),
        ({"device": "cuda:77"}, "CUDA devices"),
    ):
        with pytest.raises(SpecError, match=message):
            serve(served, say=print, **options)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(SpecError, match="this address cannot be had: Address already in use"),
    ):
        # Before a model is loaded, which may take minutes.
        serve(served, say=print, port=taken.getsockname()[1], model=str(tmp_path / "gone"))
    command = [sys.executable, "-m", "rapidin_vdb", "serve", served.path]
    wrong = subprocess.run([*command, "--port", "99999"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "65535" in wrong.stderr and "Traceback" not in wrong.stderr
    moved = subprocess.run([*command, "--model", str(tmp_path / "gone")], capture_output=True, text=True)
    assert moved.returncode == 1 and "gone" in moved.stderr and "Traceback" not in moved.stderr


def test_health_says_no_more_than_that(served):
    with TestClient(make_app(served, token="0123456789abcdef"), base_url="http://127.0.0.1") as client:
        assert client.get("/health").json() == {"status": "ready"}


def test_only_the_settings_that_are_shown_count(tmp_path):
    """A folder's own generation settings do not; and the text begins once, however the template writes it."""
    folder = save_model(tmp_path / "model", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    said = {}
    both = ({}, {"repetition_penalty": 9.0, "do_sample": True, "num_beams": 1, "max_length": 3, "min_length": 9})
    for number, settings in enumerate(both):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
        for template in ("chat", "text"):
            made = rapidin_vdb.init(
                tmp_path / f"{number}{template}", model=str(folder), parameters="all", width=64, template=template
            )
            said[number, template] = made.generate("Say 5", max_tokens=12)
    model = made._engine.loaded.model
    ids = torch.tensor([tokenizer("Say 5")["input_ids"]])
    assert ids[0].tolist().count(1) == 1
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(2)], 1)
    assert set(said.values()) == {tokenizer.decode(ids[0, -12:], skip_special_tokens=True)}


def test_a_focus_may_be_a_span(tmp_path, served):
    text = "blue 35 blue"
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:

        def asked(focus: list) -> list:
            answer = client.post("/api/query", json={"prompt": "Say 5", "generation": text, "focus": focus})
            assert answer.status_code == 200, answer.text
            assert answer.json()["focus"] == focus and "Eq. 7" in answer.json()["score_unit"]
            return [(result["sample_id"], result["score"]) for result in answer.json()["results"]]

        assert asked([[5, 7]]) == asked(["35"])
        assert asked([[0, 4], [8, 12]]) == asked(["blue"]) != asked([[0, 4]])
        assert asked([[12, 12]]) not in (asked(["blue"]), asked([[8, 12]])), "the end of the sequence"
        for focus, message in (([[5, 99]], "is no span of the generation"), ([[3, 3]], "no token of the generation")):
            answer = client.post("/api/query", json={"generation": text, "focus": focus})
            assert answer.status_code == 400 and message in answer.json()["detail"]
        for focus in ([[1]], [[1.5, 2]], [[-1, 2]], [["a", "b"]], [3]):
            assert client.post("/api/query", json={"generation": text, "focus": focus}).status_code == 422
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Say 5", "generation": text, "focus": [[0, 4], "35"]}])
    assert served.query(file=path)[0].focus == ((0, 4), "35")
    with pytest.raises(CorpusError, match="wanted a text of the generation, or a list"):
        served.query(file=write_jsonl(path, [{"prompt": "x", "generation": text, "focus": [[True, 2]]}]))


def test_the_document_has_an_example_of_everything(served):
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        document = client.get("/api/openapi.json").json()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                for form in operation["responses"]["200"]["content"].values():
                    assert "example" in form or path == "/metrics", path
                if method == "post":
                    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
                    for example in document["components"]["schemas"][name]["examples"]:
                        assert path == "/api/ingest" or client.post(path, json=example).status_code == 200, path
        ranking = client.post("/api/query", json=ASKED).json()
        for name, found in (
            ("ranking", ranking), ("sample", client.get("/api/samples/toy-001").json()),
            ("page", client.get("/api/samples").json()), ("info", client.get("/api/info").json()),
        ):  # fmt: skip
            assert EXAMPLES[name].keys() == found.keys(), name
        assert EXAMPLES["ranking"]["results"][0].keys() == ranking["results"][0].keys()


def test_databases_are_told_apart(tmp_path, served, models, adapters):
    options = {"model": str(models["llama"]), "adapter": str(adapters["llama"]), "width": 64}
    made = rapidin_vdb.init(tmp_path / "db", **options)
    made.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(3)))
    made.delete(ids=["toy-001"], purge=True)
    again = rapidin_vdb.open(tmp_path / "db")
    assert again.identity == made.identity != served.identity and len(made.identity) == 32
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        assert client.get("/api/info").json()["identity"] == served.identity


def test_a_sample_comes_in_pieces(served):
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        found = client.get("/api/samples/toy-002", params={"pieces": True}).json()
    assert "".join(text for text, _ in found["pieces"]) == found["response"] == "grün 14"
    numbers = [token for _, tokens in found["pieces"] for token in tokens] + found["ends"]
    assert sorted(numbers) == list(range(found["tokens"]))
