"""The application: what is asked on which path, and what is answered."""

import asyncio
import dataclasses
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

import rapidin_vdb
from rapidin_vdb.database import Database
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.page import heat_script, page_style, with_pieces
from rapidin_vdb.progress import Progress
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Scalar
from rapidin_vdb.results import IngestReport, Ranking, StoredSample
from rapidin_vdb.web import shapes
from rapidin_vdb.web.answers import Json, answered, client_of, status_of
from rapidin_vdb.web.desk import BusyError, Desk, DeskError
from rapidin_vdb.web.guard import LOOPBACK, Guard
from rapidin_vdb.web.metrics import Metrics

_STATIC = Path(__file__).parent / "static"
_TYPES = {"string": "text", "bool": "truth", "int64": "whole", "int32": "whole", "double": "number", "float": "number"}
_EVENTS = {
    "text/event-stream": {
        "schema": {"type": "string"},
        "example": 'event: progress\ndata: {"stage": "gradients", "done": 1, "total": 1}\n\n',
    }
}


_JSON_LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}


_Responses = dict[int | str, dict[str, Any]]


def _documented(shape: Any, content: dict[str, Any] | None = None) -> _Responses:
    return {200: ({} if shape is None else {"model": shape}) | ({} if content is None else {"content": content})}


def _refusals(*statuses: int) -> _Responses:
    what = {
        400: "The request cannot be honoured; `detail` says why.", 401: "The token is missing or wrong.",
        403: "The request comes from another site's page, or the server is read-only.",
        404: "There is no such sample.", 413: "The request is too large.", 415: "The request is not JSON.",
        421: "The host is not served here.", 503: "Too many requests are waiting.", 504: "The request took too long.",
    }  # fmt: skip
    return {status: {"model": shapes.Detail, "description": what[status]} for status in (401, 403, 421, *statuses)}


def make_app(
    database: Database, *, writable: bool = False, token: str | None = None, hosts: frozenset[str] = LOOPBACK,
    time_limit: float = 300.0, most_bytes: int = 8 << 20, most_waiting: int = 256,
) -> FastAPI:  # fmt: skip
    """Return the application of one database.

    With a `token`, nothing of the database is answered without it. `hosts` are the names under which it may be asked.
    """
    held: dict[str, Any] = {}

    def desk() -> Desk:
        return held["desk"]

    metrics = Metrics(samples=lambda: database.count(), waiting=lambda: held["desk"].waiting if "desk" in held else 0)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        held["desk"] = Desk(database, seconds=time_limit, most_waiting=most_waiting, observe=metrics.worked)
        yield
        await asyncio.to_thread(desk().close)

    app = FastAPI(
        title="rapidin-vdb",
        version=rapidin_vdb.__version__,
        summary="Which training samples, and which words in them, made a fine-tuned language model say this?",
        lifespan=life,
        docs_url=None,  # they load from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
        default_response_class=Json,
    )

    @app.middleware("http")
    async def counted(request: Request, call_next: Callable[[Request], Any]) -> Any:
        started = time.monotonic()
        response = await call_next(request)
        route = request.scope.get("route")
        metrics.answered(getattr(route, "path", "other"), response.status_code, time.monotonic() - started)
        return response

    @app.exception_handler(RapidInError)
    async def refused(request: Request, error: RapidInError) -> Response:
        return Json({"detail": str(error)}, status_code=status_of(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # Without what was sent, which may be large, and no text at all.
        kept = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()]
        return Json({"detail": kept}, status_code=422)

    @app.exception_handler(DeskError)
    async def not_done(request: Request, error: DeskError) -> Response:
        headers = {"retry-after": "1"} if isinstance(error, BusyError) else None
        return Json({"detail": str(error)}, status_code=status_of(error), headers=headers)

    @app.post(
        "/api/query", summary="Rank the samples by their influence on a generation", response_model=None,
        responses=_documented(Ranking, _EVENTS) | _refusals(400, 413, 415, 503, 504),
    )  # fmt: skip
    async def query(
        request: Request, asked: shapes.QueryRequest,
        pieces: Annotated[bool, Query(description="Add to each text its pieces: what a page colours.")] = False,
    ) -> Response:  # fmt: skip
        sample, question = query_from(asked.prompt, asked.generation), asked.question()
        return await answered(
            request,
            lambda progress: desk().search(client_of(request), question, sample, progress=progress),
            with_pieces if pieces else Ranking.to_dict,
        )

    @app.post(
        "/api/generate", summary="What the model says to a prompt",
        responses=_documented(shapes.Generated, _EVENTS) | _refusals(400, 413, 415, 503, 504),
        response_model=None,
    )  # fmt: skip
    async def generate(request: Request, asked: shapes.GenerateRequest) -> Response:
        options = asked.model_dump(exclude={"prompt"})

        def work(progress: Progress) -> str:
            return database.generate(asked.prompt, **options)

        return await answered(
            request,
            lambda progress: desk().do(client_of(request), work, progress=progress),
            lambda text: {"prompt": asked.prompt, "generation": text} | options,
        )

    @app.get(
        "/api/nearest", summary="Rank the samples by their influence on what a sample teaches",
        responses=_documented(Ranking) | _refusals(400, 404, 503, 504), response_model=None,
    )  # fmt: skip
    async def nearest(
        request: Request, sample_id: str, top_k: Annotated[int, Query(ge=1, le=1000)] = 10, where: str | None = None,
        harmful: bool = False,
    ) -> Response:  # fmt: skip
        question = shapes.Search(top_k=top_k, where=where, harmful=harmful).question()
        return await answered(
            request,
            lambda progress: desk().do(
                client_of(request),
                lambda heard: database.nearest(sample_id, question, progress=heard),
                progress=progress,
            ),
            Ranking.to_dict,
        )

    @app.get(
        "/api/samples", summary="Browse the samples",
        responses=_documented(shapes.Page) | _refusals(400), response_model=None,
    )  # fmt: skip
    def samples(
        where: str | None = None, offset: Annotated[int, Query(ge=0, le=2**40)] = 0,
        limit: Annotated[int, Query(ge=0, le=1000)] = 50,
    ) -> Response:  # fmt: skip
        found, total = database.samples(where=where, offset=offset, limit=limit)
        return Json({"samples": [s.to_dict() for s in found], "total": total, "offset": offset, "limit": limit})

    @app.get(
        "/api/samples/{sample_id:path}", summary="One sample as it is stored",
        responses=_documented(StoredSample) | _refusals(404), response_model=None,
    )  # fmt: skip
    def sample(sample_id: str) -> Response:
        return Json(database.show(sample_id).to_dict())

    @app.get(
        "/api/columns", summary="What a filter may use",
        responses=_documented(list[shapes.Column]) | _refusals(), response_model=None,
    )  # fmt: skip
    def columns() -> Response:
        return Json([_column(database, text) for text in database.info().columns])

    @app.get("/api/info", summary="What the database holds", responses=_refusals())
    def info() -> dict[str, Any]:
        return database.info().to_dict() | {"writable": writable, "path": Path(database.path).name}

    @app.post(
        "/api/ingest", summary="Add records (only where the server was started with --writable)",
        responses=_documented(IngestReport, _EVENTS) | _refusals(400, 413, 415, 503),
        response_model=None,
    )  # fmt: skip
    async def ingest(request: Request, asked: shapes.IngestRequest) -> Response:
        if not writable:
            return Json({"detail": "this server only reads; start it with --writable to add records"}, status_code=403)
        options = asked.model_dump(exclude={"records"})

        def work(progress: Progress) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "records.jsonl")
                path.write_text("".join(json.dumps(record) + "\n" for record in asked.records), "utf-8")
                return database.ingest(path, progress=progress, **options)

        return await answered(
            request,
            lambda progress: desk().do(client_of(request), work, progress=progress, patient=True),
            dataclasses.asdict,
        )

    @app.post(
        "/api/export", summary="Training data without some samples, as JSON lines",
        responses=_documented(None, _JSON_LINES) | _refusals(400, 413, 415),
        response_model=None,
    )  # fmt: skip
    def export(asked: shapes.ExportRequest) -> Response:
        if asked.where is not None:
            database.samples(where=asked.where, limit=0)  # so that a bad filter is said before anything is sent
        return StreamingResponse(_lines(database, asked), media_type="application/x-ndjson")

    @app.get(
        "/metrics",
        summary="Counters, in Prometheus' text format",
        response_model=None,
        response_class=PlainTextResponse,
        responses=_refusals(),
    )
    def measured() -> Response:
        return Response(metrics.text(), media_type=Metrics.TYPE)

    @app.get("/health", summary="Whether the server is ready")
    def health() -> shapes.Health:
        return shapes.Health(status="ready", samples=database.count(), waiting=desk().waiting)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return Response((_STATIC / "index.html").read_text("utf-8"), media_type="text/html")

    @app.get("/static/heat.js", include_in_schema=False)
    def heat() -> Response:
        return Response(heat_script(), media_type="text/javascript")

    @app.get("/static/page.css", include_in_schema=False)
    def style() -> Response:
        return Response(page_style(), media_type="text/css")

    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.add_middleware(Guard, hosts=hosts, token=token, most_bytes=most_bytes)
    return app


def _column(database: Database, text: str) -> dict[str, Any]:
    name, _, kind = text.rpartition(" (")
    known = _TYPES.get(kind.removesuffix(")"), "text")
    many = name in ("sample_id", "prompt", "response", "tokens", "loss", "truncated")
    values: list[Scalar] | None = None if many else database.values_of(name)
    return {"name": name, "type": known, "values": values}


def _lines(database: Database, asked: shapes.ExportRequest) -> Iterator[str]:
    without = set(asked.without)
    for sample in database.each_sample(where=asked.where):
        if sample.sample_id not in without:
            yield json.dumps(_record(sample), ensure_ascii=False) + "\n"


def _record(sample: StoredSample) -> dict[str, Any]:
    """Return a sample as a record that `ingest` takes."""
    texts = (
        {"text": sample.response} if sample.prompt is None else {"prompt": sample.prompt, "response": sample.response}
    )
    record = {"id": sample.sample_id, "split": sample.split} | texts | dict(sample.metadata)
    return record if sample.source is None else record | {"source": sample.source}
