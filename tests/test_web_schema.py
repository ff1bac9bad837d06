"""The API against its own OpenAPI document: whatever the document allows is answered as it says."""

import pytest
from conftest import toy_records, write_jsonl
from hypothesis import given, settings
from hypothesis.errors import Unsatisfiable

import rapidin_vdb

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")
from rapidin_vdb.web import make_app  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Do not use the `random` module")]


@pytest.fixture(scope="module")
def document(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("schema")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    made.load()
    # A request that is malformed may be too large as well, where it has many turns: that is refused first.
    refused = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
    checks = {"negative_data_rejection": {"expected-statuses": refused}}
    return schemathesis.openapi.from_asgi(
        "/api/openapi.json", make_app(made, writable=True, hosts=frozenset({"*"})),
        config=schemathesis.Config.from_dict({"checks": checks}),
    )  # fmt: skip


@pytest.mark.parametrize("malformed", [False, True], ids=["well-formed", "malformed"])
def test_the_api_keeps_its_word(document, malformed):
    """No server error; no status, header or shape that is not documented; nothing malformed let through."""
    from schemathesis import GenerationMode

    mode = GenerationMode.NEGATIVE if malformed else GenerationMode.POSITIVE
    # A well-formed request may still ask for what is not there: a column, an index, a focus.
    left_out = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.unsupported_method]
    tried = set()
    for result in document.get_all_operations():
        operation = result.ok()
        if malformed and not (operation.body or operation.query or operation.path_parameters):
            continue  # there is nothing that could be

        @settings(max_examples=30)  # of each operation: drawing them is slow
        @given(case=operation.as_strategy(generation_mode=mode))
        def keeps_its_word(case):
            case.call_and_validate(excluded_checks=left_out)

        try:
            keeps_its_word()
        except Unsatisfiable:
            assert malformed, operation.label
            continue  # any text will do there
        tried.add(operation.label)
    assert {"POST /api/query", "GET /api/samples", "POST /api/export", "POST /api/generate"} <= tried, tried
