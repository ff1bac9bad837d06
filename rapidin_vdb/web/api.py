"""The JSON API: what is asked on which path, and what is answered."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse

from rapidin_vdb.database import Database
from rapidin_vdb.errors import RapidInError, no_scratch
from rapidin_vdb.page import sample_pieces, with_pieces
from rapidin_vdb.progress import Progress
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Scalar
from rapidin_vdb.results import IngestReport, Ranking
from rapidin_vdb.web import shapes
from rapidin_vdb.web.answers import Json, answered, client_of
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.document import EVENTS, EXPORTED, documented, refusals
from rapidin_vdb.web.export import exported
from rapidin_vdb.web.lines import Job, MovedError
from rapidin_vdb.web.reads import Reads

_TYPES = {"string": "text", "bool": "truth", "int64": "whole", "int32": "whole", "double": "number", "float": "number"}
_Pieces = Annotated[bool, Query(description="Add to each text its pieces: what a page colours.")]
_Meant = Annotated[
    str | None,
    Header(
        max_length=100,
        description="The `identity` of the database that the request is for: another refuses it (409).",
    ),
]
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
    reads: Callable[[], Reads]
    """Who reads what needs no model, likewise."""
    exports: Callable[[], Reads]
    """Who writes training data, likewise."""


def make_api(service: Service) -> APIRouter:
    """Return the routes of one database."""
    database = service.database

    def meant(x_database: _Meant = None) -> None:
        if x_database not in (None, database.identity):
            raise MovedError

    api = APIRouter(dependencies=[Depends(_only_known), Depends(meant)])

    async def worked(
        request: Request, work: Callable[[Progress], Any], shape: Callable[[Any], Any], *, patient: bool = False,
        short: bool = False,
    ) -> Response:  # fmt: skip
        def submit(progress: Progress) -> Job:
            return service.desk().do(client_of(request), work, progress=progress, patient=patient, short=short)

        return await answered(request, service.desk(), submit, shape)

    async def read(request: Request, work: Callable[[], Any]) -> Response:
        return await service.reads().read(request, lambda check: Json(work()))

    @api.post(
        "/api/query", summary="Rank the samples by their influence on a generation", response_model=None,
        responses=documented(shapes.RankingInPieces, "ranking", EVENTS) | refusals(400, 408, 409, 413, 415, 503, 504),
    )  # fmt: skip
    async def query(request: Request, asked: shapes.QueryRequest, pieces: _Pieces = False) -> Response:
        turns = [turn.model_dump(exclude_none=True) for turn in asked.messages]
        sample = query_from(asked.prompt, asked.generation, messages=turns, tools=asked.tools)
        question = asked.question(spans=pieces)

        def submit(progress: Progress) -> Job:
            return service.desk().search(client_of(request), question, sample, progress=progress)

        return await answered(request, service.desk(), submit, with_pieces if pieces else Ranking.to_dict)

    @api.post(
        "/api/generate", summary="What the model says to a prompt, or after several turns", response_model=None,
        responses=documented(shapes.Generated, "generated", EVENTS) | refusals(400, 408, 409, 413, 415, 503, 504),
    )  # fmt: skip
    async def generate(request: Request, asked: shapes.GenerateRequest) -> Response:
        options = asked.model_dump(exclude={"prompt", "messages", "tools"})
        turns = [turn.model_dump(exclude_none=True) for turn in asked.messages]
        before = {"messages": turns} if turns else {"prompt": asked.prompt}
        return await worked(
            request, lambda progress: database.generate(
                asked.prompt, messages=turns, tools=asked.tools, progress=progress, **options
            ),
            lambda text: before | {"generation": text} | options,
        )  # fmt: skip

    @api.get(
        "/api/nearest", summary="Rank the samples by their influence on what a sample teaches", response_model=None,
        responses=documented(Ranking, "ranking", EVENTS) | refusals(400, 404, 409, 503, 504),
    )  # fmt: skip
    async def nearest(
        request: Request, sample_id: Annotated[str, Query(examples=["demo-0001"])],
        top_k: Annotated[int, Query(ge=1, le=1000)] = 10, where: _Where = None, harmful: bool = False,
    ) -> Response:  # fmt: skip
        question = shapes.Search(top_k=top_k, where=where, harmful=harmful).question()
        return await worked(
            request, lambda progress: database.nearest(sample_id, question, progress=progress), Ranking.to_dict,
            short=True,
        )  # fmt: skip

    @api.get(
        "/api/samples", summary="Browse the samples", response_model=None,
        responses=documented(shapes.Page, "page") | refusals(400, 409, 503, 504),
    )  # fmt: skip
    async def samples(
        request: Request, where: _Where = None, offset: Annotated[int, Query(ge=0, le=2**40)] = 0,
        limit: Annotated[int, Query(ge=0, le=1000)] = 50,
    ) -> Response:  # fmt: skip
        def page() -> dict[str, Any]:
            found, total = database.samples(where=where, offset=offset, limit=limit)
            return {"samples": [s.to_dict() for s in found], "total": total, "offset": offset, "limit": limit}

        return await read(request, page)

    async def shown(request: Request, sample_id: str, pieces: bool) -> Response:
        def found() -> dict[str, Any]:
            return sample_pieces(*database.show_turns(sample_id)) if pieces else database.show(sample_id).to_dict()

        return await read(request, found)

    @api.get(
        "/api/sample", summary="One sample as it is stored, whatever its id", response_model=None,
        responses=documented(shapes.SampleInPieces, "sample") | refusals(404, 409, 503, 504),
    )  # fmt: skip
    async def sample(
        request: Request, sample_id: Annotated[str, Query(examples=["demo-0001"])], pieces: _Pieces = False
    ) -> Response:
        return await shown(request, sample_id, pieces)

    @api.get(
        "/api/samples/{sample_id:path}", response_model=None,
        summary="The same; but a path cannot hold every id, as those that are only dots or have a line feed",
        responses=documented(shapes.SampleInPieces, "sample") | refusals(404, 409, 503, 504),
    )  # fmt: skip
    async def sample_at(request: Request, sample_id: str, pieces: _Pieces = False) -> Response:
        return await shown(request, sample_id, pieces)

    @api.get(
        "/api/columns", summary="What a filter may use", response_model=None,
        responses=documented(list[shapes.Column], "columns") | refusals(409, 503, 504),
    )  # fmt: skip
    async def columns(request: Request) -> Response:
        return await read(request, lambda: [_column(database, text) for text in database.info().columns])

    @api.get(
        "/api/info", summary="What the database holds", response_model=None,
        responses=documented(shapes.Info, "info") | refusals(409, 503, 504),
    )  # fmt: skip
    async def info(request: Request) -> Response:
        own = {"writable": service.writable, "path": Path(database.path).name, "identity": database.identity}
        return await read(request, lambda: database.info().to_dict() | own)

    @api.post(
        "/api/ingest", summary="Add records (only where the server was started with --writable)", response_model=None,
        responses=documented(IngestReport, "ingested", EVENTS) | refusals(400, 408, 409, 413, 415, 503, 507),
    )  # fmt: skip
    async def ingest(request: Request, asked: shapes.IngestRequest) -> Response:
        if not service.writable:
            return Json({"detail": "this server only reads; start it with --writable to add records"}, status_code=403)
        options = asked.model_dump(exclude={"records"})

        def work(progress: Progress) -> Any:
            with _sent(asked.records) as path:
                try:
                    return _renamed(dataclasses.asdict(database.ingest(path, progress=progress, **options)), path)
                except RapidInError as error:
                    error.args = _renamed(error.args, path)
                    raise

        # It takes as long as it takes, and the desk answers others between its batches.
        return await worked(request, work, dict, patient=True)

    @api.post(
        "/api/export", summary="Training data without some samples, as JSON lines", response_model=None,
        response_class=StreamingResponse,
        responses=EXPORTED | refusals(400, 408, 409, 413, 415, 503, 504, 507),
    )  # fmt: skip
    async def export(request: Request, asked: shapes.ExportRequest) -> Response:
        return await exported(request, service.exports(), database, asked)

    return api


@contextlib.contextmanager
def _sent(records: list[dict[str, Any]]) -> Iterator[Path]:
    """Yield a file of the records that were sent.

    Raises:
        ScratchError: there is no room for it.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "records.jsonl")
            path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        except OSError as error:
            what = "the file of the records that were sent, which the server keeps until they are read,"
            raise no_scratch(what, error) from error
        yield path


def _only_known(request: Request) -> None:
    """Refuse what a request's address asks for besides, as a body's unknown fields are: a filter must not go unheard.

    Raises:
        RequestValidationError: there is such a thing.
    """
    dependant = request.scope["route"].dependant
    known = {field.alias for field in dependant.query_params}
    unknown = [name for name in request.query_params if name not in known]
    if unknown and (known or dependant.body_params):
        raise RequestValidationError(
            [
                {"type": "extra_forbidden", "loc": ("query", name), "msg": "Extra inputs are not permitted"}
                for name in unknown
            ]
        )


def _column(database: Database, text: str) -> dict[str, Any]:
    name, _, kind = text.rpartition(" (")
    known = _TYPES.get(kind.removesuffix(")"), "text")
    many = name in ("sample_id", "prompt", "response", "tokens", "loss", "truncated")
    values: list[Scalar] | None = None if many else database.values_of(name)
    return {"name": name, "type": known, "values": values}


def _renamed(value: Any, path: Path) -> Any:
    """Return a value whose texts name what was sent, and not the file that it went through."""
    if isinstance(value, str):
        return value.replace(str(path), "records")
    if isinstance(value, dict):
        return {key: _renamed(one, path) for key, one in value.items()}
    return type(value)(_renamed(one, path) for one in value) if isinstance(value, (list, tuple)) else value
