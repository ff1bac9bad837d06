"""How answers are sent: as JSON, or as events that tell how far they are."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rapidin_vdb.errors import RapidInError, SampleNotFoundError
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.web.desk import BusyError, CancelledError, DeskError, Job, LateError


class Json(JSONResponse):
    """JSON in ASCII: a lone surrogate in a record must not break an answer."""

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


async def answered(request: Request, submit: Callable[[Progress], Job], shape: Callable[[Any], Any]) -> Response:
    """Answer with JSON, or, where that is asked for, with events: progress, then result or error."""
    if "text/event-stream" in request.headers.get("accept", ""):
        return StreamingResponse(_events(submit, shape), media_type="text/event-stream")
    job = submit(silent)
    future = asyncio.wrap_future(job.future)
    while not (await asyncio.wait({future}, timeout=0.25))[0]:
        if await request.is_disconnected():
            job.cancelled = True
    return Json(shape(future.result()))


def status_of(error: Exception) -> int:
    """Return the status of an answer that is an error."""
    known = {BusyError: 503, LateError: 504, CancelledError: 499, SampleNotFoundError: 404}
    return next((status for kind, status in known.items() if isinstance(error, kind)), 400)


def client_of(request: Request) -> str:
    """Return who asks: a page says so itself, and everybody else is known by the connection."""
    given = request.headers.get("x-client", "")[:64]
    return given or (f"{request.client.host}:{request.client.port}" if request.client else "somebody")


async def _events(submit: Callable[[Progress], Job], shape: Callable[[Any], Any]) -> AsyncIterator[str]:
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()

    def progress(stage: str, done: int, total: int) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, ("progress", {"stage": stage, "done": done, "total": total}))

    try:
        job = submit(progress)
    except DeskError as error:
        yield _event("error", {"detail": str(error), "status": status_of(error)})
        return
    job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(heard.put_nowait, ("end", None)))
    try:
        while True:
            name, value = await heard.get()
            if name == "end":
                break
            yield _event(name, value)
        try:
            yield _event("result", shape(job.future.result()))
        except (RapidInError, DeskError) as error:
            yield _event("error", {"detail": str(error), "status": status_of(error)})
    finally:
        job.cancelled = True  # of no effect where it is done; else whoever asked has gone


def _event(name: str, value: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=True, allow_nan=False)}\n\n"
