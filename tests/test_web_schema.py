"""The API against its own OpenAPI document: whatever the document allows is answered as it says."""

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")
from rapidin_vdb.web import make_app  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def document(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("schema")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    made.load()
    return schemathesis.openapi.from_asgi("/api/openapi.json", make_app(made, writable=True, hosts=frozenset({"*"})))


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
def test_the_api_keeps_its_word(case):
    """No server error, no status, header or shape that is not documented, nothing malformed let through."""
    from schemathesis.checks import CHECKS

    # A well-formed request may still ask for what is not there: a column, an index, a focus.
    CHECKS.load_all() if hasattr(CHECKS, "load_all") else None
    case.call_and_validate(excluded_checks=CHECKS.get_by_names(["positive_data_acceptance", "unsupported_method"]))
