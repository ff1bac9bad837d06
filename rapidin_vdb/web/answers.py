"""How answers are sent: as JSON, or as events that tell how far they are; and that nothing goes on for nobody."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rapidin_vdb.errors import (
    FilterError,
    MemoryTakenError,
    ModelError,
    OvertakenError,
    PurgedError,
    RapidInError,
    SampleNotFoundError,
    ScratchError,
    TableError,
    UnfitError,
    UnreadableIndexError,
    out_of_room,
)
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.web import shapes
from rapidin_vdb.web.desk import Desk
from rapidin_vdb.web.guard import Receive, Scope, Send
from rapidin_vdb.web.lines import BusyError, CancelledError, Client, DeskError, Job, LateError, MovedError

_STILL_HERE = 15.0
"""Seconds without news after which a word is sent, so that no proxy takes the connection for dead."""
STILL_HERE_EVENT = ": still at it\n\n"
"""That word."""
_MOMENT = 0.05
"""Seconds between two looks at a clock that stands still."""
_STATUSES: tuple[tuple[tuple[type[Exception], ...], int], ...] = (
    ((BusyError, PurgedError, OvertakenError, MemoryTakenError), 503),
    ((LateError,), 504),
    ((CancelledError,), 499),
    ((MovedError,), 409),
    ((SampleNotFoundError,), 404),
    ((ScratchError,), 507),
    ((FilterError, UnfitError), 400),
    # Nothing that whoever asked could mend.
    ((TableError, ModelError, UnreadableIndexError), 500),
)
"""What an error's kind means: the first that fits; 400 for all others, which are of what was asked."""
_AGAIN = {"retry-after": "1"}


class Json(JSONResponse):
    """JSON in ASCII: a lone surrogate in a record must not break an answer."""

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


class Streamed(StreamingResponse):
    """What is sent in parts, and let go of when that ends, however it ends."""

    def __init__(self, parts: AsyncGenerator[Any, None], **options: Any) -> None:
        super().__init__(parts, **options)
        self._sent = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, or what there is time for."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._sent.aclose()


class Events(Streamed):
    """A stream of events, which no proxy should gather: it would hold back what is told while it happens."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def answered(
    request: Request, desk: Desk, submit: Callable[[Progress], Job], shape: Callable[[Any], Any]
) -> Response:
    """Answer with JSON, or, where that is asked for, with events: progress, then result or error.

    A job ends when its time is over or when whoever asked has gone, whatever it waits for.
    """
    if "text/event-stream" in request.headers.get("accept", ""):
        return Events(_events(request, desk, submit, shape))
    job = submit(silent)
    future, gone = asyncio.wrap_future(job.future), asyncio.create_task(gone_away(request))
    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody may be left to hear it
    try:
        # Its clock may have stood still meanwhile, while it made way for others.
        while not (future.done() or gone.done() or job.seconds_left == 0.0):
            left = job.seconds_left
            await asyncio.wait({future, gone}, timeout=left and max(left, _MOMENT), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            desk.give_up(job, CancelledError() if gone.done() else LateError())
        result = await future
    finally:
        gone.cancel()
        desk.give_up(job, CancelledError())  # of no effect where it is done; else the server is stopping
    # Not on the event loop: a large answer takes its time to write out.
    return await asyncio.to_thread(lambda: Json(shape(result)))


def said(error: Exception, place: str) -> str:
    """Return what an error says, in the words of the API: an option of the command line is the field of that name.

    Where the database lies, `place`, is nobody's business but its name.

    >>> said(ValueError("/home/me/db is empty: give one of --harmful and --both"), "/home/me/db")
    'db is empty: give one of harmful and both'
    """
    fields = shapes.Search.model_fields | shapes.IngestRequest.model_fields
    options = {name.replace("_", "-"): name for name in fields}
    text = re.sub("--([a-z][a-z-]*)", lambda option: options.get(option[1], option[0]), str(error))
    pattern, name = _places(place)
    return pattern.sub(lambda _: name, text)


@cache
def _places(place: str) -> tuple[re.Pattern[str], str]:
    """Return what finds a database's place in a text, however it is written there, and its name."""
    if "://" in place:
        written = {place.rstrip("/")}
    else:
        written = {place.rstrip("/"), str(Path(place).absolute()), str(Path(place).resolve())}
        # Object stores of local files leave out the first slash.
        written |= {path.removeprefix("/") for path in written}
    longest = sorted((path for path in written if "/" in path), key=len, reverse=True)
    found = "|".join(map(re.escape, longest)) or r"(?!)"
    name = PurePosixPath(place).name if "://" in place else Path(place).absolute().name
    return re.compile(rf"(?<![\w/.-])(?:{found})(?![\w-]|\.\w)"), name or place


def status_of(error: Exception) -> int:
    """Return the status of an answer that is an error."""
    if out_of_room(error):
        return 507
    return next((status for kinds, status in _STATUSES if isinstance(error, kinds)), 400)


def refusal(request: Request, error: Exception) -> Response:
    """Return the answer that is an error of ours."""
    status = status_of(error)
    return Json({"detail": said(error, place_of(request))}, status, _AGAIN if status == 503 else None)


def place_of(request: Request) -> str:
    """Return where the database lies that a request is for."""
    place: str = request.app.state.place
    return place


def client_of(request: Request) -> Client:
    """Return who asks: the address of the connection, and what the client calls itself, which only divides its turn."""
    address, port = (request.client.host, request.client.port) if request.client else ("nowhere", 0)
    return Client(address, request.headers.get("x-client", "")[:64] or str(port))


async def gone_away(request: Request) -> None:
    """Wait until whoever asked has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Heard:
    """What the thread that works says, for the event loop that sends it; made on that loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._said = asyncio.Queue[tuple[str, Any]]()

    def tell(self, name: str, value: Any) -> None:
        """Say something, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._said.put_nowait, (name, value))
        except RuntimeError:
            pass  # the server has stopped

    def progress(self, stage: str, done: int, total: int) -> None:
        """Say how far it is."""
        self.tell("progress", {"stage": stage, "done": done, "total": total})

    async def next(self, seconds: float | None = None) -> tuple[str, Any] | None:
        """Return what was said next; None where nothing was, within some seconds or those of `_STILL_HERE`."""
        try:
            return await asyncio.wait_for(self._said.get(), min(_STILL_HERE, seconds or _STILL_HERE))
        except TimeoutError:
            return None


async def _events(
    request: Request, desk: Desk, submit: Callable[[Progress], Job], shape: Callable[[Any], Any]
) -> AsyncGenerator[str, None]:
    heard = Heard()
    try:
        job = submit(heard.progress)
    except DeskError as error:
        yield error_event(error, place_of(request))
        return
    job.future.add_done_callback(lambda _: heard.tell("end", None))
    try:
        while True:
            left = None if job.future.done() else job.seconds_left
            news = await heard.next(None if left is None else max(left, _MOMENT))
            if news is None:
                if job.seconds_left == 0.0:
                    desk.give_up(job, LateError())
                else:
                    yield STILL_HERE_EVENT
                continue
            if news[0] == "end":
                break
            yield event(*news)
        try:
            result = job.future.result()
            yield await asyncio.to_thread(lambda: event("result", shape(result)))
        except (RapidInError, DeskError) as error:
            yield error_event(error, place_of(request))
        except Exception:
            yield unforeseen_event()
            raise
    finally:
        desk.give_up(job, CancelledError())  # of no effect where it is done; else whoever asked has gone


def event(name: str, value: Any) -> str:
    """Return an event as it is sent."""
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=True, allow_nan=False)}\n\n"


def error_event(error: Exception, place: str) -> str:
    """Return the event that ends a stream whose request came to nothing; `place` is as for `said`."""
    return event("error", {"detail": said(error, place), "status": status_of(error)})


def unforeseen_event() -> str:
    """Return the event for what nobody foresaw: the status was sent long ago, so that it can only be said."""
    return event("error", {"detail": "something went wrong in the server; its log says what", "status": 500})
