"""What the API is asked with, and in which words it answers: ids, parameters, tokens, origins, ingested records."""

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from rapidin_vdb.web import make_app
from rapidin_vdb.web.server import origin_of

ASKED = {"prompt": "Say 5", "generation": "blue 35", "top_k": 3}
ODD = (".", "..", "a\nb", "a/b", "a%2Fb", "?x#y&z=1", " ")


@pytest.fixture(scope="module")
def served(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("asked")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    odd = [{"id": name, "instruction": f"Say {n}", "output": "red"} for n, name in enumerate(ODD)]
    made.ingest(write_jsonl(folder / "toy.jsonl", [*toy_records(6), *odd]))
    made.load()
    return made


@pytest.fixture(scope="module")
def client(served):
    with TestClient(make_app(served), base_url="http://127.0.0.1:8000") as client:
        yield client


def test_every_sample_can_be_shown_whatever_its_id(served, client):
    for name in ODD:
        found = client.get("/api/sample", params={"sample_id": name, "pieces": True})
        assert found.status_code == 200 and found.json()["sample_id"] == name and found.json()["pieces"]
    assert client.get("/api/sample", params={"sample_id": "nobody"}).status_code == 404
    assert client.get("/api/sample").status_code == 422
    same = [client.get(path).json() for path in ("/api/sample?sample_id=toy-001", "/api/samples/toy-001")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "path",
    ["/api/samples?wher=stars%3E1", "/api/nearest?sample_id=toy-001&topk=3", "/api/samples/toy-001?piece=true"],
)
def test_what_is_not_known_is_not_passed_over(client, path):
    answer = client.get(path)
    assert answer.status_code == 422
    (said,) = answer.json()["detail"]
    assert (said["type"], said["loc"][0], said["msg"]) == ("extra_forbidden", "query", "Extra inputs are not permitted")
    assert said["loc"][1] in path
    assert client.post("/api/export?where=stars%3E1", json={}).status_code == 422
    assert client.get("/api/info?x=1").status_code == 200, "where nothing can be asked for, nothing goes unheard"


def test_a_scheme_is_written_in_any_case(served):
    secret = "0123456789abcdef"
    with TestClient(make_app(served, token=secret), base_url="http://127.0.0.1") as client:
        for given, status in (
            (f"bearer {secret}", 200), (f"BEARER  {secret}", 200), (f"Basic {secret}", 401), (secret, 401),
            ("Bearer", 401), ("Bearer " + secret.upper(), 401),
        ):  # fmt: skip
            assert client.get("/api/info", headers={"authorization": given}).status_code == status, given


def test_the_proxys_name_counts_with_its_scheme(served):
    app = make_app(served, served_as=origin_of("https://rapidin.example.org"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for host, origin, status in (
            ("rapidin.example.org", "https://rapidin.example.org", 200),
            ("rapidin.example.org", "http://rapidin.example.org", 403),
            ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ):
            headers = {"host": host, "origin": origin}
            assert client.post("/api/query", json=ASKED, headers=headers).status_code == status, headers


def test_errors_speak_of_what_was_sent(tmp_path, served, models, adapters):
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made._engine = served._engine
    good = {"id": "a", "instruction": "Say 1", "output": "red"}
    with TestClient(make_app(made, writable=True), base_url="http://127.0.0.1") as client:

        def detail(path: str, **body) -> str:
            answer = client.post(path, json=body)
            assert answer.status_code == 400
            return answer.json()["detail"]

        said = detail("/api/ingest", records=[good, {"id": "b"}])
        assert said.startswith("records, line 2") and "on_bad_record skip" in said and "--" not in said
        said = detail("/api/ingest", records=[good, {"id": "b"}, good, {"id": "c"}])
        assert [line.partition(":")[0] for line in said.splitlines()] == ["records, line 2", "records, line 4"]
        skipped = client.post("/api/ingest", json={"records": [good, {"id": "b"}], "on_bad_record": "skip"}).json()
        assert (
            skipped["added"] == 1 and "records, line 2" in str(skipped["bad"]) and ".jsonl" not in str(skipped["bad"])
        )
        said = detail("/api/ingest", records=[good | {"output": "blue"}])
        assert "on_duplicate replace" in said and "--on" not in said
        assert detail("/api/query", **ASKED, harmful=True, both=True) == "give one of harmful and both"
        assert detail("/api/query", **ASKED, focus=["nowhere"]).startswith("focus ")
        stream = client.post(
            "/api/query", json=ASKED | {"focus": ["nowhere"]}, headers={"accept": "text/event-stream"}
        )  # fmt: skip
        assert "--focus" not in stream.text and '"status": 400' in stream.text


def test_the_document_tells_of_errors_among_events(client):
    document = client.get("/api/openapi.json").json()
    told = document["paths"]["/api/query"]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert "`error`" in told["description"] and "`status`" in told["description"]
    assert "/api/sample" in document["paths"]
