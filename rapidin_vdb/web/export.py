"""Training data without some samples, as JSON lines."""

import json
import tempfile
from collections.abc import Iterator
from typing import IO

from fastapi.responses import StreamingResponse

from rapidin_vdb.database import Database
from rapidin_vdb.web.reads import Check
from rapidin_vdb.web.shapes import ExportRequest

RECORDS, INEXACT = "x-records", "x-inexact-records"
"""Headers: how many records there are, and how many of them may lack something that the database does not keep."""
_IN_MEMORY = 1 << 20
_PART = 1 << 16


def exported(database: Database, asked: ExportRequest, check: Check) -> StreamingResponse:
    """Return the answer, whose headers say what is in it.

    All of it is written to a file without a name before the first byte is sent: so that what goes wrong is said, and
    half a file does not look like a whole one.

    Raises:
        FilterError: the filter cannot be understood.
    """
    without, records, inexact = set(asked.without), 0, 0
    file = tempfile.SpooledTemporaryFile(_IN_MEMORY)
    try:
        for sample_id, record, exact in database.each_record(where=asked.where):
            check()
            if sample_id not in without:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                records, inexact = records + 1, inexact + (not exact)
    except BaseException:
        file.close()
        raise
    length = file.tell()
    file.seek(0)
    headers = {RECORDS: str(records), INEXACT: str(inexact), "content-length": str(length)}
    return StreamingResponse(_parts(file), media_type="application/x-ndjson", headers=headers)


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while part := file.read(_PART):
            yield part
