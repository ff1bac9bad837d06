"""Training data without some samples: as JSON lines, or as events that tell how far they are."""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import IO

from fastapi import Request
from fastapi.responses import Response

from rapidin_vdb.database import Database
from rapidin_vdb.errors import RapidInError, no_scratch
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.web.answers import (
    STILL_HERE_EVENT,
    Events,
    Heard,
    Streamed,
    error_event,
    event,
    place_of,
    unforeseen_event,
)
from rapidin_vdb.web.lines import DeskError
from rapidin_vdb.web.reads import Check, Reads
from rapidin_vdb.web.shapes import ExportRequest

RECORDS, INEXACT = "x-records", "x-inexact-records"
"""Headers: how many records there are, and how many of them may lack something that the database does not keep."""
_IN_MEMORY = 1 << 20
_PART = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Records in a file without a name."""

    file: IO[bytes]
    bytes: int
    records: int
    inexact: int
    matching: int
    """How many samples match: these, and what was left out of them."""


async def exported(request: Request, reads: Reads, database: Database, asked: ExportRequest) -> Response:
    """Return the answer, as lines whose headers say what is in them, or as events where these are asked for.

    All of it is written to a file without a name before the first byte of it is sent: so that what goes wrong is said,
    and half a file does not look like a whole one.

    Raises:
        FilterError: the filter cannot be understood.
        ScratchError: there is no room for the file.
        LateError, CancelledError, BusyError: as of any read.
    """
    if "text/event-stream" in request.headers.get("accept", ""):
        return Events(_events(request, reads, database, asked))
    written = await reads.read(request, lambda check: _write(database, asked, check, silent))
    headers = {
        RECORDS: str(written.records),
        INEXACT: str(written.inexact),
        "content-length": str(written.bytes),
    }
    return Streamed(_lines(written.file), media_type="application/x-ndjson", headers=headers)


def _write(database: Database, asked: ExportRequest, check: Check, progress: Progress) -> _Written:
    without = {entry if isinstance(entry, str) else entry.sample_id for entry in asked.without}
    sums = {entry.sample_id: entry.crc32 for entry in asked.without if not isinstance(entry, str)}
    records = inexact = matching = 0
    file = tempfile.SpooledTemporaryFile(_IN_MEMORY)
    try:
        for sample_id, record, exact in database.each_record(where=asked.where, sums=sums, progress=progress):
            check()
            matching += 1
            if sample_id not in without:
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                with _told():
                    file.write(line)
                records, inexact = records + 1, inexact + (not exact)
        with _told():
            length = file.tell()
            file.seek(0)  # what is still in memory is written out
    except BaseException:
        with contextlib.suppress(OSError):  # which is how it says once more that there is no room
            file.close()
        raise
    return _Written(file=file, bytes=length, records=records, inexact=inexact, matching=matching)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise no_scratch(
            "the training file that the server keeps among temporary files until it is sent", error
        ) from error


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    """Yield what a file holds, whole lines at a time."""
    while lines := file.readlines(_PART):
        yield b"".join(lines)


async def _lines(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    parts = _parts(file)
    try:
        # Not on the event loop: others are answered between two parts only, and there are many.
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            yield part
    finally:
        file.close()


async def _events(
    request: Request, reads: Reads, database: Database, asked: ExportRequest
) -> AsyncGenerator[str, None]:
    """Yield how far it is, then the lines in parts, then how many there are."""
    heard = Heard()
    reading = asyncio.create_task(reads.read(request, lambda check: _write(database, asked, check, heard.progress)))
    reading.add_done_callback(lambda _: heard.tell("end", None))
    try:
        while (news := await heard.next()) is None or news[0] != "end":
            yield STILL_HERE_EVENT if news is None else event(*news)
        try:
            written = await reading
        except (RapidInError, DeskError) as error:
            yield error_event(error, place_of(request))
            return
        except Exception:
            yield unforeseen_event()
            raise
        parts = _parts(written.file)
        while (part := await asyncio.to_thread(_next_event, parts)) is not None:
            yield part
        counts = {"records": written.records, "inexact_records": written.inexact, "matching": written.matching}
        yield event("result", counts)
    finally:
        reading.cancel()  # of no effect where it is done; else whoever asked has gone
        if reading.done() and not reading.cancelled() and reading.exception() is None:
            reading.result().file.close()


def _next_event(parts: Iterator[bytes]) -> str | None:
    part = next(parts, None)
    return None if part is None else event("part", part.decode())
