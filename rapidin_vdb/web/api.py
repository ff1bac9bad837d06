"""The JSON API: what is asked on which path, and what is answered."""

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from rapidin_vdb.database import Database
from rapidin_vdb.page import sample_pieces, with_pieces
from rapidin_vdb.progress import Progress
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Scalar
from rapidin_vdb.results import IngestReport, Ranking, StoredSample
from rapidin_vdb.web import shapes
from rapidin_vdb.web.answers import Json, answered, client_of, within
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.document import EVENTS, JSON_LINES, documented, refusals
from rapidin_vdb.web.lines import Job, LateError

_TYPES = {"string": "text", "bool": "truth", "int64": "whole", "int32": "whole", "double": "number", "float": "number"}
_Pieces = Annotated[bool, Query(description="Add to each text its pieces: what a page colours.")]
_Where = Annotated[
    str | None, Query(max_length=10_000, description="SQL filter.", examples=["split = 'train' AND tokens > 3"])
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Service:
    """What the API serves."""

    database: Database
    """The database."""
    desk: Callable[[], Desk]
    """Where requests wait for the model, while the server runs."""
    writable: bool
    """Whether records may be added."""
    time_limit: float
    """Seconds that a request may take."""


def make_api(service: Service) -> APIRouter:
    """Return the routes of one database."""
    api, database = APIRouter(), service.database

    async def worked(
        request: Request, work: Callable[[Progress], Any], shape: Callable[[Any], Any], *, patient: bool = False
    ) -> Response:
        def submit(progress: Progress) -> Job:
            return service.desk().do(client_of(request), work, progress=progress, patient=patient)

        return await answered(request, service.desk(), submit, shape)

    @api.post(
        "/api/query", summary="Rank the samples by their influence on a generation", response_model=None,
        responses=documented(Ranking, "ranking", EVENTS) | refusals(400, 413, 415, 503, 504),
    )  # fmt: skip
    async def query(request: Request, asked: shapes.QueryRequest, pieces: _Pieces = False) -> Response:
        sample, question = query_from(asked.prompt, asked.generation), asked.question()

        def submit(progress: Progress) -> Job:
            return service.desk().search(client_of(request), question, sample, progress=progress)

        return await answered(request, service.desk(), submit, with_pieces if pieces else Ranking.to_dict)

    @api.post(
        "/api/generate", summary="What the model says to a prompt", response_model=None,
        responses=documented(shapes.Generated, "generated", EVENTS) | refusals(400, 413, 415, 503, 504),
    )  # fmt: skip
    async def generate(request: Request, asked: shapes.GenerateRequest) -> Response:
        options = asked.model_dump(exclude={"prompt"})
        return await worked(
            request,
            lambda progress: database.generate(asked.prompt, progress=progress, **options),
            lambda text: {"prompt": asked.prompt, "generation": text} | options,
        )

    @api.get(
        "/api/nearest", summary="Rank the samples by their influence on what a sample teaches", response_model=None,
        responses=documented(Ranking, "ranking", EVENTS) | refusals(400, 404, 503, 504),
    )  # fmt: skip
    async def nearest(
        request: Request, sample_id: Annotated[str, Query(examples=["demo-0001"])],
        top_k: Annotated[int, Query(ge=1, le=1000)] = 10, where: _Where = None, harmful: bool = False,
    ) -> Response:  # fmt: skip
        question = shapes.Search(top_k=top_k, where=where, harmful=harmful).question()
        return await worked(
            request, lambda progress: database.nearest(sample_id, question, progress=progress), Ranking.to_dict
        )

    @api.get(
        "/api/samples", summary="Browse the samples", response_model=None,
        responses=documented(shapes.Page, "page") | refusals(400, 504),
    )  # fmt: skip
    async def samples(
        where: _Where = None, offset: Annotated[int, Query(ge=0, le=2**40)] = 0,
        limit: Annotated[int, Query(ge=0, le=1000)] = 50,
    ) -> Response:  # fmt: skip
        def read() -> dict[str, Any]:
            found, total = database.samples(where=where, offset=offset, limit=limit)
            return {"samples": [s.to_dict() for s in found], "total": total, "offset": offset, "limit": limit}

        return await within(service.time_limit, read)

    @api.get(
        "/api/samples/{sample_id:path}", summary="One sample as it is stored", response_model=None,
        responses=documented(StoredSample, "sample") | refusals(404, 504),
    )  # fmt: skip
    async def sample(sample_id: str, pieces: _Pieces = False) -> Response:
        shape = sample_pieces if pieces else StoredSample.to_dict
        return await within(service.time_limit, lambda: shape(database.show(sample_id)))

    @api.get(
        "/api/columns", summary="What a filter may use", response_model=None,
        responses=documented(list[shapes.Column], "columns") | refusals(504),
    )  # fmt: skip
    async def columns() -> Response:
        return await within(service.time_limit, lambda: [_column(database, text) for text in database.info().columns])

    @api.get(
        "/api/info", summary="What the database holds", response_model=None,
        responses=documented(dict[str, Any], "info") | refusals(504),
    )  # fmt: skip
    async def info() -> Response:
        own = {"writable": service.writable, "path": Path(database.path).name, "identity": database.identity}
        return await within(service.time_limit, lambda: database.info().to_dict() | own)

    @api.post(
        "/api/ingest", summary="Add records (only where the server was started with --writable)", response_model=None,
        responses=documented(IngestReport, "ingested", EVENTS) | refusals(400, 413, 415, 503),
    )  # fmt: skip
    async def ingest(request: Request, asked: shapes.IngestRequest) -> Response:
        if not service.writable:
            return Json({"detail": "this server only reads; start it with --writable to add records"}, status_code=403)
        options = asked.model_dump(exclude={"records"})

        def work(progress: Progress) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "records.jsonl")
                path.write_text("".join(json.dumps(record) + "\n" for record in asked.records), "utf-8")
                return database.ingest(path, progress=progress, **options)

        # It takes as long as it takes, and the desk answers others between its batches.
        return await worked(request, work, dataclasses.asdict, patient=True)

    @api.post(
        "/api/export", summary="Training data without some samples, as JSON lines", response_model=None,
        response_class=StreamingResponse,
        responses=documented(None, content=JSON_LINES) | refusals(400, 413, 415, 504),
    )  # fmt: skip
    async def export(asked: shapes.ExportRequest) -> Response:
        if asked.where is not None:
            # So that a bad filter is said before anything is sent.
            await within(service.time_limit, lambda: database.count(asked.where))
        lines = _lines(database, asked, time.monotonic() + service.time_limit)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    return api


def _column(database: Database, text: str) -> dict[str, Any]:
    name, _, kind = text.rpartition(" (")
    known = _TYPES.get(kind.removesuffix(")"), "text")
    many = name in ("sample_id", "prompt", "response", "tokens", "loss", "truncated")
    values: list[Scalar] | None = None if many else database.values_of(name)
    return {"name": name, "type": known, "values": values}


def _lines(database: Database, asked: shapes.ExportRequest, deadline: float) -> Iterator[str]:
    without, samples = set(asked.without), database.each_sample(where=asked.where)
    while some := list(itertools.islice(samples, 500)):
        if time.monotonic() > deadline:
            raise LateError  # which breaks the connection off: half a file must not look like a whole one
        kept = (_record(sample) for sample in some if sample.sample_id not in without)
        yield "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)


def _record(sample: StoredSample) -> dict[str, Any]:
    """Return a sample as a record that `ingest` takes."""
    texts = (
        {"text": sample.response} if sample.prompt is None else {"prompt": sample.prompt, "response": sample.response}
    )
    record = {"id": sample.sample_id, "split": sample.split} | texts | dict(sample.metadata)
    return record if sample.source is None else record | {"source": sample.source}
