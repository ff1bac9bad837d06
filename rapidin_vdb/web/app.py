"""The application: the API, the page over it, and what guards and counts them."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles

import rapidin_vdb
from rapidin_vdb.database import Database
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.page import heat_script, page_style
from rapidin_vdb.web import shapes
from rapidin_vdb.web.answers import Json, refusal
from rapidin_vdb.web.api import Service, make_api
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.document import add_security, documented, refusals
from rapidin_vdb.web.guard import LOOPBACK, Guard
from rapidin_vdb.web.lines import DeskError
from rapidin_vdb.web.metrics import Counted, Metrics
from rapidin_vdb.web.reads import Reads

_STATIC = Path(__file__).parent / "static"


def make_app(
    database: Database, *, writable: bool = False, token: str | None = None, hosts: frozenset[str] = LOOPBACK,
    served_as: str | None = None, time_limit: float = 300.0, most_bytes: int = 8 << 20, body_seconds: float = 60.0,
    most_waiting: int = 256,
) -> FastAPI:  # fmt: skip
    """Return the application of one database.

    With a `token`, nothing of the database is answered without it. `hosts` are the names under which it may be asked,
    and `served_as` is the origin under which a reverse proxy serves it. A request's body must arrive within
    `body_seconds`.
    """
    desks: list[Desk] = []
    readers: list[Reads] = []
    writers: list[Reads] = []
    metrics = Metrics(
        samples=lambda: _count(database), waiting=lambda: sum(desk.waiting for desk in desks),
        reading=lambda: sum(reads.open for reads in (*readers, *writers)),
    )  # fmt: skip

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        desks.append(Desk(database, seconds=time_limit, most_waiting=most_waiting, observe=metrics.worked))
        readers.append(Reads(seconds=time_limit))
        # Of their own: a few large exports would else keep everybody from reading.
        writers.append(Reads(seconds=time_limit, threads=4))
        yield
        for threads in (readers.pop(), writers.pop()):
            threads.close()
        await asyncio.to_thread(desks.pop().close)

    def stop() -> None:
        for desk in desks:
            desk.stop()
        for reads in (*readers, *writers):
            reads.stop()

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
    app.state.stop = stop
    app.state.place = database.path
    service = Service(
        database=database, desk=lambda: desks[0], writable=writable, reads=lambda: readers[0],
        exports=lambda: writers[0],
    )  # fmt: skip
    app.include_router(make_api(service))
    _add_errors(app)

    @app.get(
        "/metrics",
        summary="Counters, in Prometheus' text format",
        response_model=None,
        response_class=PlainTextResponse,
        responses=refusals(),
    )
    def measured() -> Response:
        return Response(metrics.text(), media_type=Metrics.TYPE)

    @app.get(
        "/health", summary="Whether the server is ready", response_model=None,
        responses=documented(shapes.Health, "health") | {503: {"model": shapes.Health}} | refusals(),
    )  # fmt: skip
    def health() -> Response:
        try:
            database.count()
            ready = desks[0].works
        except RapidInError:
            ready = False
        return Json({"status": "ready" if ready else "not ready"}, status_code=200 if ready else 503)

    _add_page(app)
    written = app.openapi
    app.openapi = lambda: add_security(written(), asked_for=token is not None)  # type: ignore[method-assign]
    app.add_middleware(
        Guard, hosts=hosts, token=token, most_bytes=most_bytes, body_seconds=body_seconds, served_as=served_as
    )
    app.add_middleware(Counted, metrics=metrics)  # outside of the guard, so that refusals count too
    return app


def _count(database: Database) -> float:
    try:
        return float(database.count())
    except RapidInError:
        return math.nan  # the other counters count all the same


def _add_errors(app: FastAPI) -> None:
    for kind in (RapidInError, DeskError):
        app.add_exception_handler(kind, _refused)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # Without what was sent, which may be large, and no text at all.
        kept = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()]
        return Json({"detail": kept}, status_code=422)


async def _refused(request: Request, error: Exception) -> Response:
    return refusal(request, error)


def _add_page(app: FastAPI) -> None:
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
