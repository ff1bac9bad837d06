"""What takes long makes way for what is done in a moment, and whoever waits is told when the server ends."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from functools import partial

import pytest
from children import Running
from conftest import toy_records, write_jsonl
from test_web_limits import measured, occupied, send

import rapidin_vdb
from rapidin_vdb.query import query_from
from rapidin_vdb.question import Question

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from rapidin_vdb.web import make_app, serve
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.lines import BusyError, Client, Job, LateError

LONG = ("Say 5", "blue 35 and more and more of it")


@pytest.fixture(scope="module")
def served(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("turns")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    made.load()
    made.query(*LONG, tokens=True, matrix=True)  # what is compiled at the first time
    return made


@pytest.mark.parametrize("options", [{"tokens": True, "matrix": True}, {"refine": 24}, {"tokens": True, "top_k": 24}])
def test_an_explanation_makes_way_and_is_the_same(served, options):
    desk, order, asked = Desk(served, seconds=60.0), [], []
    question = Question(**{"top_k": 3} | options)

    def put(stage: str, done: int, total: int) -> None:
        if stage != "gradients" and not asked:
            asked.append(desk.search(Client("b"), Question(top_k=3), query_from("Say 7", "blue 49")))
            asked.append(desk.do(Client("c"), lambda progress: time.sleep(0.2), short=True))
            asked.append(desk.do(Client("d"), lambda progress: None))  # it may take long, too
            for name, job in zip("bcd", asked, strict=True):
                job.future.add_done_callback(lambda _, name=name: order.append(name))

    long = desk.search(Client("a"), question, query_from(*LONG), progress=put)
    long.future.add_done_callback(lambda _: order.append("a"))
    found = long.future.result(60)
    for job in asked:
        job.future.result(60)
    assert order[0] == "b" and order[-1] == "d" and order.index("a") > 0
    wanted = served.query(*LONG, top_k=question.top_k, **{k: v for k, v in options.items() if k != "top_k"})[0]
    assert found.to_dict() | {"seconds": 0} == wanted.to_dict() | {"seconds": 0}
    assert asked[0].future.result().results == served.query("Say 7", "blue 49", top_k=3)[0].results
    desk.close()


def test_time_that_others_take_is_not_its_own(served, monkeypatch):
    """Neither of its limit, nor of the seconds that it says it took, nor counted twice."""
    observed, asked, placed = [], [], threading.Event()
    real, spent = time.monotonic, [0.0]
    # A clock on which others take hours, beside which it is nothing how busy this machine is.
    monkeypatch.setattr(time, "monotonic", lambda: real() + spent[0])
    desk = Desk(served, seconds=3600.0, observe=lambda together, seconds: observed.append(seconds))

    def hours(progress) -> None:
        spent[0] += 6 * 3600.0

    def put(stage: str, done: int, total: int) -> None:
        if stage == "tokens" and not asked:
            assert placed.wait(60)
            long.deadline = time.monotonic() + 3600.0
            asked.append(desk.do(Client("b"), hours, short=True))

    started = time.monotonic()
    long = desk.search(Client("a"), Question(top_k=2, tokens=True), query_from("Say 5", "blue 35"), progress=put)
    placed.set()
    ranking = long.future.result(120)
    asked[0].future.result(120)
    desk.close()
    taken = time.monotonic() - started
    assert taken >= 6 * 3600 > 3600 > ranking.seconds.total >= ranking.seconds.tokens > 0
    assert len(observed) == 2 and 6 * 3600 <= sum(observed) <= taken


def test_many_who_need_a_moment_do_not_keep_it_from_ending(served):
    desk, done, asked = Desk(served, seconds=60.0), [], []
    long = desk.search(
        Client("a"), Question(top_k=3, tokens=True, matrix=True), query_from(*LONG),
        progress=lambda *_: asked or asked.extend(
            desk.do(Client("b"), lambda progress: done.append(time.sleep(0.5)), short=True) for _ in range(60)
        ),
    )  # fmt: skip
    long.future.result(60)
    assert len(done) < 60
    for job in asked:
        desk.give_up(job, rapidin_vdb.web.lines.CancelledError())
    desk.close()


def test_a_clock_that_stands_still(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("rapidin_vdb.web.lines.time.monotonic", lambda: now[0])
    job = Job(client=Client("a"), deadline=110.0)
    job.hold()
    now[0] = 150.0
    assert job.seconds_left == 10.0 and job.alive()
    job.go_on()
    assert job.seconds_left == 10.0 and job.deadline == 160.0
    now[0] = 160.5
    assert job.seconds_left == 0.0 and not job.alive()


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_whoever_waits_for_it_waits_as_long(served, monkeypatch, accept):
    """The limit is looked at where the answer is waited for, too."""
    monkeypatch.setattr(served, "nearest", lambda *_, **options: time.sleep(7.0))
    answers = {}
    with TestClient(make_app(served, time_limit=5.5), base_url="http://127.0.0.1") as client:

        def ask() -> None:
            body = {"prompt": LONG[0], "generation": LONG[1], "top_k": 2, "tokens": True}
            answers["long"] = client.post("/api/query", json=body, headers={"accept": accept})

        def near() -> None:
            answers["short"] = client.get("/api/nearest?sample_id=toy-001")

        threads = [threading.Thread(target=ask), threading.Thread(target=near)]
        with served._engine.alone:  # until the other waits, too
            threads[0].start()
            time.sleep(0.3)
            threads[1].start()
            time.sleep(0.3)
        for thread in threads:
            thread.join(60)
    assert answers["short"].status_code == 504
    assert "longer than is allowed" not in answers["long"].text
    found = answers["long"].text
    ranking = json.loads(found if accept == "application/json" else found.rpartition("data: ")[2])
    assert len(ranking["results"]) == 2 and ranking["seconds"]["total"] < 5.5


def test_an_end_is_told_to_all_at_once(served):
    desk = Desk(served)
    first, hold = occupied(desk, "a")
    jobs = [first, desk.do(Client("b"), lambda progress: None)]
    jobs.append(desk.search(Client("c"), Question(), query_from("Say 5", "blue 35")))
    desk.stop()
    for job in jobs:
        with pytest.raises(BusyError, match="the server is stopping"):
            job.future.result(0)
    assert desk.waiting == 0
    with pytest.raises(BusyError, match="the server is stopping"):
        desk.do(Client("d"), lambda progress: None)
    hold.set()
    desk.close()


def test_an_export_that_is_being_written_ends_too(served, monkeypatch):
    begun, answers = threading.Event(), []

    def slow(**_):
        while True:
            begun.set()
            time.sleep(0.02)
            yield "x", {}, True

    monkeypatch.setattr(served, "each_record", slow)
    app = make_app(served, time_limit=20.0)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        thread = threading.Thread(target=lambda: answers.append(client.post("/api/export", json={})))
        thread.start()
        assert begun.wait(20)
        app.state.stop()
        thread.join(60)
    assert (answers[0].status_code, answers[0].json()["detail"]) == (503, "the server is stopping")


def serve_slowly(path: str, going) -> None:
    """Serve, in a process of its own, a database that looks up from its work too late: when `going` is set."""
    import uvicorn

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def held(*_, **options):
        say("begun")
        going.wait()

    database = rapidin_vdb.open(path)
    database.generate = held
    made = uvicorn.Config  # whose moment at an end, granted to whoever is being answered, is longer than the test waits
    uvicorn.Config = lambda *given, **options: made(*given, **options | {"timeout_graceful_shutdown": 300})
    # As on the command line.
    with contextlib.suppress(KeyboardInterrupt):
        serve(database, port=0, say=say)
    say("ended")
    sys.exit(0)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_whoever_waits_is_told_when_the_server_ends(served, context, sign):
    going = context.Event()
    server = Running(context, ["serve"], before=partial(serve_slowly, served.path, going))
    try:
        port = int(re.match(r"\d+", server.wait_for("http://127.0.0.1:"))[0])
        kinds = ["application/json", "text/event-stream"] * 2
        lines = [send(port, "/api/generate", {"prompt": "Say 5"}, accept=kinds[0])]
        server.wait_for("begun")
        lines += [send(port, "/api/generate", {"prompt": "Say 5"}, accept=accept) for accept in kinds[1:]]
        end = time.monotonic() + 60
        while "rapidin_waiting 3.0" not in measured(port):  # the first is under way, the others wait
            assert time.monotonic() < end, "they never came to wait"
            time.sleep(0.02)
        os.kill(server.process.pid, sign)
        # At once: what is under way does not end, nor does the moment that is granted at an end, before all are told.
        for line, accept in zip(lines, kinds, strict=True):
            line.settimeout(30)
            with line:
                text = b"".join(iter(lambda line=line: line.recv(65536), b"")).decode()
            assert "the server is stopping" in text, text
            if accept == "application/json":
                assert text.startswith("HTTP/1.1 503")
            else:
                assert "event: error" in text and '"status": 503' in text and text.endswith("0\r\n\r\n")
        going.set()
        ended = server.end()
        assert ended.code in (0, -sign) and ended.err.partition("begun\n")[2] in ("", "ended\n"), "nothing went wrong"
    finally:
        server.process.kill()


@pytest.mark.parametrize("ask", ["search", "do"])
def test_a_table_that_takes_longer_to_read_than_the_limit_is_served(served, monkeypatch, ask):
    """Whoever waits is told in time; what was read meanwhile is kept, and the next find all of it."""
    begun, reading, going = [], threading.Event(), threading.Event()
    real = rapidin_vdb.table_index.batches_of

    def slow(snapshot, row_ids=None):
        begun.append(row_ids)
        reading.set()
        for batch in real(snapshot, row_ids):
            assert going.wait(60)
            yield batch

    monkeypatch.setattr("rapidin_vdb.table_index.batches_of", slow)
    database = rapidin_vdb.open(served.path)
    database._engine = served._engine
    desk, query = Desk(database, seconds=60.0), query_from("Say 7", "blue 49")

    def put() -> Job:
        if ask == "search":
            return desk.search(Client("a"), Question(top_k=3), query)
        return desk.do(Client("a"), lambda progress: database.nearest("toy-007", Question(top_k=3), progress=progress))

    first = put()
    assert reading.wait(60)
    first.deadline = time.monotonic() - 0.1
    desk.give_up(first, LateError())  # as whoever waits for it does
    going.set()
    with pytest.raises(LateError, match="took longer than is allowed"):
        first.future.result(20)
    assert len(put().future.result(60).results) == 3
    assert begun == [None], "its rows are read once"
    desk.close()


def test_a_desk_that_closes_ends_the_reading_of_an_index(served, monkeypatch):
    begun, real = threading.Event(), rapidin_vdb.table_index.batches_of

    def endless(snapshot, row_ids=None):
        begun.set()
        while True:
            time.sleep(0.02)
            yield from real(snapshot, row_ids)

    monkeypatch.setattr("rapidin_vdb.table_index.batches_of", endless)
    database = rapidin_vdb.open(served.path)
    database._engine = served._engine
    desk = Desk(database, seconds=60.0)
    job = desk.search(Client("a"), Question(top_k=3), query_from("Say 7", "blue 49"))
    assert begun.wait(60)
    desk.close()
    with pytest.raises(BusyError, match="the server is stopping"):
        job.future.result(0)


def test_the_index_is_open_before_it_is_said_that_it_serves(served, monkeypatch):
    told, stages = [], []
    database = rapidin_vdb.open(served.path)
    monkeypatch.setattr("rapidin_vdb.web.server._Server.run", lambda self, sockets: (self._ready(), sockets[0].close()))

    def say(text: str) -> None:
        told.append((text[:7], database._indexes["sample"]._residents.newest is not None, len(stages) > 0))

    @contextlib.contextmanager
    def opening():
        yield lambda stage, done, total: stages.append((stage, done, total))

    serve(database, port=0, say=say, opening=opening)
    assert told == [("serving", True, True)]
    assert stages[-1] == ("index", 24, 24)
