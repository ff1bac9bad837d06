"""Files of sample ids, as `--ids` takes them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rapidin_vdb.errors import SpecError

_JSON = re.compile(r'"|\{\s*"')
_RANKED = ("results", "harmful")


def read_ids(path: Path, *, identity: str | None = None) -> list[str]:
    """Return the sample ids in a file: one a line, or JSON lines.

    Those have an `id`, as the page saves them, or are what `query --json` and `pool --json` print: all samples in them
    are meant. `identity` is that of the database, which rankings have to be of, if they say of which they are.

    Raises:
        SpecError: the file cannot be read, names none, has a line of JSON without an id, or is of another database.
    """
    try:
        # Not `splitlines`: JSON may hold what that takes for the end of a line.
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--ids {path}: cannot be read: {error}") from error
    wanted = dict[str, None]()
    for number, line in enumerate(lines, start=1):
        if line:
            wanted |= dict.fromkeys(_ids_in(line, f"--ids {path}, line {number}", identity))
    if not wanted:
        raise SpecError(f"--ids {path}: no id in it; wanted one a line")
    return list(wanted)


def _ids_in(line: str, place: str, identity: str | None) -> Iterator[str]:
    if not _JSON.match(line):
        yield line
        return
    try:
        found = json.loads(line)
        if isinstance(found, dict) and "results" in found:
            if identity is not None and found.get("identity", identity) != identity:
                raise SpecError(
                    f"{place}: a ranking of another database, or of one that was here before; ask this one again"
                )
            for end in _RANKED:
                yield from (_plain(result["sample_id"], place) for result in found.get(end) or ())
            return
        if isinstance(found, dict):
            found = found["id"] if "id" in found else found["sample_id"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SpecError(f'{place}: neither a plain id nor JSON with one, as {{"id": "demo-0001"}}') from None
    yield _plain(found, place)


def _plain(found: Any, place: str) -> str:
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise SpecError(f"{place}: its id is no text and no whole number")
    return str(found)
