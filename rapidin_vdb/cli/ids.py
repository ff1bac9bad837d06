"""Files of sample ids, as `--ids` takes them."""

import json
from pathlib import Path

from rapidin_vdb.errors import SpecError


def read_ids(path: Path) -> list[str]:
    """Return the sample ids in a file: one a line, or JSON lines with an `id`, as the page saves them.

    Raises:
        SpecError: the file cannot be read, names none, or has a line of JSON without an id.
    """
    try:
        # Not `splitlines`: JSON may hold what that takes for the end of a line.
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--ids {path}: cannot be read: {error}") from error
    wanted = [_id_in(line, f"--ids {path}, line {number}") for number, line in enumerate(lines, start=1) if line]
    if not wanted:
        raise SpecError(f"--ids {path}: no id in it; wanted one a line")
    return wanted


def _id_in(line: str, place: str) -> str:
    if not line.startswith(('{"', '"')):
        return line
    try:
        found = json.loads(line)
        if isinstance(found, dict):
            found = found["id"] if "id" in found else found["sample_id"]
    except (ValueError, KeyError, RecursionError):
        raise SpecError(f'{place}: neither a plain id nor JSON with one, as {{"id": "demo-0001"}}') from None
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise SpecError(f"{place}: its id is no text and no whole number")
    return str(found)
