"""The server's API: the command line's JSON, what it refuses, and how requests share one model."""

import asyncio
import contextlib
import json
import re
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_records, write_jsonl
from reference import ids_in
from test_web_limits import occupied

import rapidin_vdb
from rapidin_vdb.errors import SpecError
from rapidin_vdb.query import query_from
from rapidin_vdb.question import Question

pytest.importorskip("fastapi")
from fastapi import Request
from fastapi.testclient import TestClient

from rapidin_vdb.web import make_app, serve
from rapidin_vdb.web.answers import event
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.export import exported
from rapidin_vdb.web.lines import BusyError, CancelledError, Client, LateError
from rapidin_vdb.web.reads import Reads
from rapidin_vdb.web.shapes import ExportRequest

ASKED = {"prompt": "Say 5", "generation": "blue 35", "top_k": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("web")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    made.load()
    return made


@pytest.fixture(scope="module")
def client(served):
    with TestClient(make_app(served), base_url="http://127.0.0.1:8000") as client:
        yield client


def same(one: dict, other: dict) -> None:
    for values in (one, other):
        values.pop("seconds")
    assert one == json.loads(json.dumps(other))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": "stars > 1", "both": True, "group_by": "source", "aggregate": "mean"},
        {"harmful": True, "focus": ["blue"]},
        {"tokens": True, "matrix": True, "refine": 6},
        {"histogram": 7},
    ],
)
def test_a_query_is_answered_as_on_the_command_line(served, client, options):
    answer = client.post("/api/query", json=ASKED | options)
    assert answer.status_code == 200, answer.text
    same(answer.json(), served.query(**ASKED, **options)[0].to_dict())


def test_an_answer_says_of_which_version_of_the_database_it_is(served, client):
    about = client.get("/api/info").json()
    for found in (
        client.post("/api/query", json=ASKED).json(),
        client.post("/api/query", json=ASKED | {"tokens": True}, params={"pieces": True}).json(),
        client.get("/api/nearest", params={"sample_id": "toy-005"}).json(),
    ):
        assert (found["table_version"], found["identity"]) == (served.version, about["identity"])
    document = client.get("/api/openapi.json").json()
    for path, method in (("/api/query", "post"), ("/api/nearest", "get")):
        answer = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]
        shape = document["components"]["schemas"][answer["schema"]["$ref"].rpartition("/")[2]]["properties"]
        kinds = [{one["type"] for one in shape[name]["anyOf"]} for name in ("table_version", "identity")]
        assert kinds == [{"integer", "null"}, {"string", "null"}]
        assert {"table_version", "identity"} < set(answer["example"])


def test_groups_are_at_most_so_many_over_the_web(served, client, monkeypatch):
    monkeypatch.setattr("rapidin_vdb.web.shapes._MOST_GROUPS", 5)
    found = client.post("/api/query", json=ASKED | {"group_by": "sample_id"}).json()
    whole = served.query(**ASKED, group_by="sample_id")[0].to_dict()["groups"]
    far = sorted(whole, key=lambda group: -abs(group["score"]))[:5]
    assert (found["groups"], found["groups_left_out"]) == ([group for group in whole if group in far], 19)
    document = client.get("/api/openapi.json").json()
    assert "groups_left_out" in document["components"]["schemas"]["RankingInPieces"]["properties"]


def test_pieces_give_back_the_texts(client):
    found = client.post("/api/query?pieces=true", json=ASKED | {"tokens": True, "matrix": True, "both": True}).json()
    assert "".join(text for text, _ in found["pieces"]) == "blue 35"
    for result in found["results"] + found["harmful"]:
        assert "".join(text for text, _ in result["pieces"]) == result["response"]
        numbers = [token for _, tokens in result["pieces"] for token in tokens] + result["ends"]
        assert sorted(set(numbers)) == list(range(len(result["tokens"])))


def test_a_histogram_counts_every_sample_once(served):
    everything = served.query(**ASKED | {"top_k": 24})[0].results
    for where, count in ((None, 24), ("stars > 1", 14), ("stars > 99", 0)):
        found = served.query(**ASKED, histogram=6, where=where)[0].histogram
        assert sum(found.counts) == count and len(found.edges) == 7
        if where is None:
            scores = [result.score for result in everything]
            assert (found.edges[0], found.edges[-1]) == pytest.approx((min(scores), max(scores)), rel=1e-4)
    with pytest.raises(SpecError, match="histogram is -1"):
        served.query(**ASKED, histogram=-1)


def test_browsing(served, client):
    for sample_id in ("toy-003", "toy-010"):
        assert client.get(f"/api/samples/{sample_id}").json() == json.loads(
            json.dumps(served.show(sample_id).to_dict())
        )
    assert client.get("/api/samples/nobody").status_code == 404
    seen = []
    for offset in range(0, 30, 7):
        page = client.get("/api/samples", params={"offset": offset, "limit": 7, "where": "stars != 2"}).json()
        assert page["total"] == 19
        seen += [sample["sample_id"] for sample in page["samples"]]
    assert client.get("/api/samples", params={"offset": 2**40, "limit": 7}).json()["samples"] == []
    assert served.samples(limit=2**70)[1] == len(served.samples(limit=2**70)[0]) == 24
    assert sorted(seen) == [f"toy-{number:03d}" for number in range(24) if number % 5 != 2]
    columns = {column["name"]: column for column in client.get("/api/columns").json()}
    assert (columns["stars"]["type"], columns["stars"]["values"]) == ("whole", [0, 1, 2, 3, 4])
    assert (columns["source"]["type"], columns["source"]["values"]) == ("text", ["even", "odd"])
    assert columns["response"]["values"] is None and "vector" not in columns
    info = client.get("/api/info").json()
    assert (info["samples"], info["writable"], info["path"]) == (24, False, "db")


def test_the_nearest_samples_are_those_of_the_stored_vectors(served, client):
    ranking = client.get("/api/nearest", params={"sample_id": "toy-004", "top_k": 5}).json()
    assert ranking["results"][0]["sample_id"] == "toy-004"
    vectors = {
        key: vector.astype("float64")
        for batch in served._table.snapshot().vectors()
        for key, vector in zip(batch.keys, batch.vectors, strict=True)
    }
    wanted = sorted(vectors, key=lambda key: -float(vectors[key] @ vectors["toy-004"]))[:5]
    assert [result["sample_id"] for result in ranking["results"]] == wanted
    assert ranking["results"][1]["score"] == pytest.approx(vectors[wanted[1]] @ vectors["toy-004"])
    assert client.get("/api/nearest", params={"sample_id": "nobody"}).status_code == 404


def test_the_model_answers_the_same_with_the_same_seed(served, client):
    def said(**options) -> str:
        found = client.post("/api/generate", json={"prompt": "Say 5", "max_tokens": 12} | options).json()
        assert (found["prompt"], found["max_tokens"]) == ("Say 5", 12)
        return found["generation"]

    assert said() == said() == served.generate("Say 5", max_tokens=12)
    drawn = {
        (temperature, seed): said(temperature=temperature, seed=seed) for temperature in (0.01, 2.0) for seed in (1, 2)
    }
    for (temperature, seed), text in drawn.items():
        assert text == said(temperature=temperature, seed=seed)
        assert text == served.generate("Say 5", max_tokens=12, temperature=temperature, seed=seed)
    # Neither is left out on the way; how often what is drawn: `test_sampling.py`.
    assert len({drawn[2.0, 1], drawn[2.0, 2], drawn[0.01, 1]}) == 3
    for temperature in (1e-300, -1.0, 11.0, float("nan")):
        with pytest.raises(SpecError, match="wanted 0 .most likely., or 0.01 to 10"):
            served.generate("Say 5", temperature=temperature)
    with pytest.raises(SpecError, match="the model knows 512 positions"):
        served.generate("x" * 600)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (ASKED | {"where": "nosuch = 1"}, 400, "No field named nosuch"),
        (ASKED | {"where": "1 = 1; DROP"}, 400, "second statement"),
        (ASKED | {"focus": ["nowhere"]}, 400, "is not in the generation"),
        (ASKED | {"harmful": True, "both": True}, 400, "give one of"),
        (ASKED | {"messages": [{"role": "user", "content": "Say 5"}]}, 400, "give one of both"),
        (ASKED | {"index": "none"}, 400, "no index none is built"),
        (ASKED | {"generation": "\ud800"}, 422, "unicode string"),
        (ASKED | {"top_k": 0}, 422, "greater than or equal to 1"),
        (ASKED | {"top_k": True}, 422, "valid integer"),
        (ASKED | {"top_k": "3"}, 422, "valid integer"),
        (ASKED | {"both": 1}, 422, "valid boolean"),
        (ASKED | {"topk": 3}, 422, "Extra inputs are not permitted"),
        ({"prompt": "x"}, 422, "Field required"),
    ],
)
def test_what_cannot_be_honoured_is_said(client, body, status, message):
    answer = client.post("/api/query", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status and message in answer.text
    events = client.post(
        "/api/query",
        content=json.dumps(body),
        headers={"content-type": "application/json", "accept": "text/event-stream"},
    )
    assert message in events.text


def test_events_tell_of_progress_and_end_with_the_result(served, client):
    answer = client.post("/api/query", json=ASKED | {"tokens": True}, headers={"accept": "text/event-stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    names = [name for name, _ in events]
    assert set(names[:-1]) == {"event: progress"} and names[-1] == "event: result"
    same(json.loads(events[-1][1].removeprefix("data: ")), served.query(**ASKED, tokens=True)[0].to_dict())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example:8000"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-length": "99999999"}, 413),
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 403),
        ({"content-type": "Application/JSON; charset=utf-8"}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
    ],
)
def test_only_this_machines_own_page_is_answered(client, headers, status):
    sent = {"content-type": "application/json"} | headers
    assert client.post("/api/query", content=json.dumps(ASKED), headers=sent).status_code == status


def test_every_answer_forbids_what_a_page_does_not_need(client):
    for path in ("/", "/static/app.js", "/api/info", "/api/samples/nobody", "/nowhere"):
        headers = client.get(path).headers
        assert (
            "script-src 'self'" in headers["content-security-policy"]
            and "unsafe" not in headers["content-security-policy"]
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    page = client.get("/").text
    assert (
        "<script>" not in page
        and " style=" not in page
        and " onclick" not in page
        and "http" not in page.replace("/api", "")
    )


def test_a_body_that_does_not_say_how_long_it_is_ends_too(served):
    def parts():
        for _ in range(200):
            yield b" " * 1000

    with TestClient(make_app(served, most_bytes=10_000), base_url="http://127.0.0.1") as client:
        answer = client.post("/api/query", content=parts(), headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "larger than 10,000 bytes" in answer.text


def test_with_a_token_nothing_is_told_without_it(served):
    app = make_app(served, token="0123456789abcdef", hosts=frozenset({"*"}))
    with TestClient(app, base_url="http://some.host") as client:
        for path in ("/api/info", "/api/samples", "/api/openapi.json", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer 0123456789abcdeF"}).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer 0123456789abcdef"}).status_code == 200
        assert client.get("/").status_code == 200, "the page holds nothing of the database; it asks for the token"
    for options, message in (({"host": "0.0.0.0"}, "give --token SECRET"), ({"token": "short"}, "wanted 16 or more")):
        with pytest.raises(SpecError, match=message):
            serve(served, say=print, **options)


def test_it_only_reads_unless_asked(tmp_path, served, models, adapters):
    records = {"records": [{"id": "new-1", "instruction": "Say 99", "output": "red 693"}]}
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made._engine = served._engine
    with TestClient(make_app(made), base_url="http://127.0.0.1") as client:
        answer = client.post("/api/ingest", json=records)
        assert answer.status_code == 403 and "--writable" in answer.text and made.info().samples == 0
    with TestClient(make_app(made, writable=True), base_url="http://127.0.0.1") as client:
        assert client.post("/api/ingest", json=records).json()["added"] == 1
        assert client.post("/api/ingest", json=records).json()["unchanged"] == 1
        bad = client.post("/api/ingest", json={"records": [{"id": "new-2"}]})
        assert bad.status_code == 400 and bad.json()["detail"].startswith("records, line 1")
        assert client.post("/api/query", json=ASKED).json()["results"][0]["sample_id"] == "new-1"
        other = records | {"records": [records["records"][0] | {"output": "blue"}]}
        assert "with other content" in client.post("/api/ingest", json=other).text
    assert made.info().samples == 1


def test_the_export_is_training_data_again(tmp_path, served, client, models, adapters):
    answer = client.post("/api/export", json={"without": ["toy-003", "toy-004"], "where": "stars > 2"})
    path = tmp_path / "cleaned.jsonl"
    path.write_text(answer.text, "utf-8")
    again = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    again._engine = served._engine
    again.ingest(path)
    wanted = [f"toy-{number:03d}" for number in range(24) if number % 5 > 2 and number not in (3, 4)]
    assert sorted(ids_in(again._table.snapshot())) == wanted
    for name in wanted:
        assert again.show(name) == served.show(name)
    assert client.post("/api/export", json={"where": "nosuch"}).status_code == 400
    assert (answer.headers["x-records"], answer.headers["x-inexact-records"]) == (str(len(wanted)), "0")
    records = {record["id"]: record for record in toy_records(24)}
    written = {record["id"]: record for record in map(json.loads, answer.text.splitlines())}
    assert written == {name: records[name] for name in wanted}


def test_an_export_says_what_it_cannot_restore(tmp_path, served, models, adapters):
    records = [
        {"id": "exact", "instruction": "Say 1", "input": "", "output": "red 7", "tokens": 3},
        {"id": "listed", "instruction": "Say 2", "output": "blue 14", "tags": ["a"], "note": "kept"},
        {"id": "gone", "instruction": "Say 3", "output": "red 21", "tags": []},
    ]
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made._engine = served._engine
    path = tmp_path / "cleaned.jsonl"
    made.ingest(write_jsonl(path, records))
    with TestClient(make_app(made), base_url="http://127.0.0.1") as client:
        answer = client.post("/api/export", json={"without": ["gone"]})
    assert (answer.headers["x-records"], answer.headers["x-inexact-records"]) == ("2", "1")
    assert int(answer.headers["content-length"]) == len(answer.content)
    exact, listed = sorted(map(json.loads, answer.text.splitlines()), key=lambda record: record["id"])
    assert exact == records[0]
    assert listed == {"id": "listed", "split": "train", "prompt": "Say 2", "response": "blue 14", "note": "kept"}
    # What was restored exactly is known to be there already.
    path.write_text(json.dumps(exact))
    report = made.ingest(path)
    assert (report.added, report.unchanged) == (0, 1)


def test_an_export_leaves_out_what_was_meant_or_says_so(tmp_path, models, adapters):
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    records = [record | {"id": name} for name, record in zip("abc", toy_records(3), strict=True)]
    made.ingest(write_jsonl(tmp_path / "toy.jsonl", [*records, {"id": "d", "text": "of itself"}]))
    sums = {s.sample_id: zlib.crc32(f"{s.prompt or ''}\0{s.response}".encode()) for s in map(made.show, "abcd")}
    meant = [{"sample_id": name, "crc32": sums[name]} for name in "bd"]
    with TestClient(make_app(made), base_url="http://127.0.0.1") as client:

        def left(**asked) -> list[str]:
            answer = client.post("/api/export", json=asked)
            assert answer.status_code == 200, answer.text
            return [json.loads(line)["id"] for line in answer.text.splitlines()]

        assert left(without=[*meant, "a"]) == ["c"]
        changed = records[1] | {"instruction": records[1]["instruction"] + "!"}
        made.ingest(write_jsonl(tmp_path / "changed.jsonl", [changed]), on_duplicate="replace")
        refused = client.post("/api/export", json={"without": meant})
        assert refused.status_code == 400
        assert refused.json()["detail"].startswith("1 of the samples to be left out have other texts by now")
        assert "such as b:" in refused.json()["detail"]
        assert left(without=meant, where="sample_id != 'b'") == ["a", "c"]
        assert sorted(left(without=["b", "d"])) == ["a", "c"], "by id alone, where that is what is given"


def test_an_export_tells_how_far_it_is(served, client, monkeypatch):
    monkeypatch.setattr("rapidin_vdb.reading._RECORDS_A_WORD", 5)
    monkeypatch.setattr("rapidin_vdb.web.export._PART", 300)

    def events(asked: dict) -> list[tuple[str, Any]]:
        answer = client.post("/api/export", json=asked, headers={"accept": "text/event-stream"})
        lines = [event.split("\n") for event in answer.text.strip().split("\n\n")]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]

    asked = {"without": ["toy-003"], "where": "stars > 0"}
    found = events(asked)
    told = [(value["done"], value["total"]) for name, value in found if name == "progress"]
    assert told == [(0, 19), (5, 19), (10, 19), (15, 19), (19, 19)]
    parts = [value for name, value in found if name == "part"]
    assert "".join(parts) == client.post("/api/export", json=asked).text
    assert len(parts) > 3 and all(part.endswith("}\n") for part in parts)
    assert found[-1] == ("result", {"records": 18, "inexact_records": 0, "matching": 19})
    assert [name for name, _ in found] == ["progress"] * 5 + ["part"] * len(parts) + ["result"]
    ((name, value),) = events({"where": "nosuch"})
    assert (name, value["status"]) == ("error", 400) and "not understood" in value["detail"]


def test_an_export_that_fails_says_so_in_its_last_event(served, monkeypatch):
    def broken(**options):
        raise RuntimeError("unforeseen")
        yield

    monkeypatch.setattr(served, "each_record", broken)
    with TestClient(make_app(served), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.post("/api/export", json={}, headers={"accept": "text/event-stream"})
    assert answer.text.startswith("event: error\n") and '"status": 500' in answer.text
    assert "unforeseen" not in answer.text, "the log has it, and nobody else"


def test_an_export_without_room_for_it_says_so(client, monkeypatch):
    full = Path("/dev/full")

    def nowhere() -> None:
        monkeypatch.setattr("rapidin_vdb.web.export._IN_MEMORY", 100)
        monkeypatch.setattr("tempfile.tempdir", "/nowhere")

    def no_room() -> None:
        monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda size: full.open("wb"))

    for there, why in (
        (nowhere, "kept: No such file or directory. Make room in /nowhere,"),
        (no_room, "No space left on device"),
    ):
        there()
        answer = client.post("/api/export", json={})
        assert answer.status_code == 507
        said = answer.json()["detail"]
        assert why in said and re.search("cannot be kept: .*Make room in /.*with TMPDIR=FOLDER$", said), said
        told = client.post("/api/export", json={}, headers={"accept": "text/event-stream"}).text
        name, data = told.strip().split("\n\n")[-1].split("\n")
        assert name == "event: error" and json.loads(data.removeprefix("data: ")) == {"detail": said, "status": 507}


def test_an_ingest_without_room_for_what_was_sent_says_so(served, monkeypatch):
    records = {"records": [{"id": "new-1", "instruction": "Say 99", "output": "red 693"}]}
    before = served.info().samples
    with TestClient(make_app(served, writable=True), base_url="http://127.0.0.1") as client:
        monkeypatch.setattr("tempfile.tempdir", "/nowhere")
        answer = client.post("/api/ingest", json=records)
        assert answer.status_code == 507 and "cannot be kept: No such file" in answer.json()["detail"]
        monkeypatch.undo()
        monkeypatch.setattr("tempfile.TemporaryDirectory", lambda: contextlib.nullcontext("/nowhere"))
        answer = client.post("/api/ingest", json=records)
        assert answer.status_code == 507 and "Make room in /" in answer.json()["detail"]
    assert served.info().samples == before


class Watched(tempfile.SpooledTemporaryFile):
    """A temporary file that notes whether it is read where other requests are answered, and can be held up there."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.on_loop: list[bool] = []
        self.reading, self.hold = threading.Event(), threading.Event()
        self.hold.set()

    def readlines(self, *sizes: int) -> list[bytes]:
        self.on_loop.append(asyncio._get_running_loop() is not None)
        self.reading.set()
        assert self.hold.wait(20)
        return super().readlines(*sizes)


def test_an_export_is_sent_without_holding_up_others(served, monkeypatch):
    files: list[Watched] = []
    monkeypatch.setattr("rapidin_vdb.web.export._PART", 300)
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda size: files.append(Watched(size)) or files[-1])
    made, spelt = [], event

    def noted(name: str, value: Any) -> str:
        made.append((name, asyncio._get_running_loop() is not None))
        return spelt(name, value)

    monkeypatch.setattr("rapidin_vdb.web.export.event", noted)

    async def stay() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "client": ("here", 1), "headers": [(b"accept", b"text/event-stream")]}, stay)

    async def some() -> None:
        reads = Reads(seconds=60.0)
        for left in ("at the end", "between two parts", "while one is read"):
            answer = await exported(request, reads, served, ExportRequest())
            stream = answer.body_iterator
            async for text in stream:
                if left != "at the end" and text.startswith("event: part"):
                    break
            if left == "between two parts":
                await stream.aclose()
            if left == "while one is read":
                files[-1].hold.clear()
                files[-1].reading.clear()
                following = asyncio.create_task(anext(stream))
                assert await asyncio.to_thread(files[-1].reading.wait, 20)
                following.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await following
                files[-1].hold.set()
            assert files[-1].closed, left
        reads.close()

    asyncio.run(some())
    assert len(files) == 3 and len(files[0].on_loop) > 3 and not any(loop for file in files for loop in file.on_loop)
    assert {loop for name, loop in made if name == "part"} == {False}


def test_counters_count(client):
    before = client.get("/metrics").text
    client.get("/health")
    after = client.get("/metrics").text

    def value(text: str) -> float:
        lines = [
            line
            for line in text.splitlines()
            if line.startswith('rapidin_requests_total{route="/health",status="200"}')
        ]
        return float(lines[0].split()[-1]) if lines else 0.0

    assert value(after) == value(before) + 1
    assert "rapidin_samples 24.0" in after and "rapidin_waiting 0.0" in after


# How requests share the model.


@pytest.fixture
def slow(served):
    """A desk whose work takes as long as the test says, and what was answered together."""
    together: list[int] = []
    desk = Desk(served, seconds=120.0, most_waiting=8, observe=lambda count, seconds: together.append(count))
    yield desk, together
    desk.close()


def test_turns_are_taken_among_those_who_ask(slow):
    desk, _ = slow
    done: list[str] = []
    first, hold = occupied(desk, "greedy")
    # Names are free to choose: many of them get no more than the one address that they come from.
    jobs = [desk.do(Client("greedy", str(n)), lambda progress, n=n: done.append(f"greedy {n}")) for n in range(4)]
    jobs += [desk.do(Client("other"), lambda progress, n=n: done.append(f"other {n}")) for n in range(2)]
    hold.set()
    for job in [first, *jobs]:
        job.future.result(60)
    assert [who.split()[0] for who in done] == ["greedy", "other"] * 2 + ["greedy"] * 2


def test_searches_of_a_kind_are_one_piece_of_work(served, slow):
    desk, together = slow
    blocking, hold = occupied(desk)
    question = Question(top_k=3)
    texts = [("Say 5", "blue 35"), ("Say 7", "blue 49"), ("Say 2", "grün 14")]
    jobs = [desk.search(Client(f"c{n}"), question, query_from(*text)) for n, text in enumerate(texts)]
    other = desk.search(Client("c9"), Question(top_k=2), query_from("Say 1", "blue 7"))
    hold.set()
    blocking.future.result(60)
    for job, text in zip(jobs, texts, strict=True):
        assert job.future.result(60).results == served.query(*text, top_k=3)[0].results
    assert len(other.future.result(60).results) == 2
    assert sorted(together) == [1, 1, 3]


def test_one_bad_search_does_not_spoil_the_others(served, slow):
    desk, _ = slow
    _, hold = occupied(desk)
    question = Question(top_k=3, focus=("blue",))
    good = desk.search(Client("a"), question, query_from("Say 5", "blue 35"))
    bad = desk.search(Client("b"), question, query_from("Say 5", "red 35"))
    hold.set()
    assert good.future.result(60).results == served.query("Say 5", "blue 35", top_k=3, focus="blue")[0].results
    with pytest.raises(SpecError, match="is not in the generation"):
        bad.future.result(60)


def test_what_nobody_waits_for_is_stopped(slow):
    desk, _ = slow
    begun, steps = threading.Event(), []

    def long(progress):
        begun.set()
        for number in range(1000):
            progress("long", number, 1000)
            steps.append(number)
            time.sleep(0.01)

    job = desk.do(Client("a"), long)
    assert begun.wait(60)
    job.cancelled = True
    with pytest.raises(CancelledError):
        job.future.result(60)
    assert len(steps) < 1000
    late = desk.do(Client("a"), long)
    late.deadline = time.monotonic() + 0.05
    with pytest.raises(LateError, match="--time-limit"):
        late.future.result(60)


def test_too_many_are_sent_away(slow):
    desk, _ = slow
    _, hold = occupied(desk, "a")
    jobs = [desk.do(Client("c", str(n)), lambda progress, n=n: n) for n in range(4)]
    with pytest.raises(BusyError, match="4 requests from c are waiting"):
        desk.do(Client("c", "another name"), lambda progress: None)
    jobs += [desk.do(Client(f"c{n}"), lambda progress, n=n: n) for n in range(4)]
    with pytest.raises(BusyError, match="8 requests are waiting"):
        desk.do(Client("z"), lambda progress: None)
    hold.set()
    for job in jobs:
        job.future.result(60)


def test_an_unknown_failure_does_not_close_the_desk(slow):
    desk, _ = slow

    def fails(progress):
        raise ZeroDivisionError("nobody thought of this")

    with pytest.raises(ZeroDivisionError):
        desk.do(Client("a"), fails).future.result(60)
    assert desk.do(Client("a"), lambda progress: 7).future.result(60) == 7
