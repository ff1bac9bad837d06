"""Files of sample ids, as `--ids` takes them."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rapidin_vdb.errors import SpecError

_JSON = re.compile(r'"|\{\s*"')
# What other programs make of JSON lines, and nobody means by an id.
_SPREAD = re.compile(r"\[?\{$|\[\s*(\{|$)")
_RANKED = ("results", "harmful")


@runtime_checkable
class Asked(Protocol):
    """The database that the ids are of."""

    @property
    def identity(self) -> str:
        """What tells it from others."""
        ...

    @property
    def version(self) -> int:
        """The number of its newest version."""
        ...

    def written_since(self, version: int, sample_ids: Sequence[str]) -> list[str]:
        """Return which of some samples came, or were replaced, after a version."""
        ...


def read_ids(path: Path, database: Asked | None = None) -> list[str]:
    """Return the sample ids in a file: one a line, or JSON lines.

    Those have an `id`, as the page saves them, or a `sample_id`, or are what `query --json` and `pool --json` print:
    all samples in them are meant. These have to be of the `database`, and of what its samples say now.

    Raises:
        SpecError: the file cannot be read, names none, has a line of JSON without an id, or a ranking that is of
            another database, or of samples that were replaced since.
    """
    try:
        # Not `splitlines`: JSON may hold what that takes for the end of a line.
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--ids {path}: cannot be read: {error}") from error
    wanted, ranked = dict[str, None](), dict[int, dict[str, None]]()
    for number, line in enumerate(lines, start=1):
        place = f"--ids {path}, line {number}"
        found = _parsed(line, place) if line else []
        if isinstance(found, dict):
            names = dict.fromkeys(_results_of(found, place))
            _check_identity(found, place, database)
            if isinstance(version := found.get("table_version"), int):
                ranked.setdefault(version, {}).update(names)
            wanted |= names
        else:
            wanted |= dict.fromkeys(found)
    if not wanted:
        raise SpecError(f"--ids {path}: no id in it; wanted one a line")
    if database is not None:
        for version, names in ranked.items():
            _check_version(version, list(names), f"--ids {path}", database)
    return list(wanted)


def _parsed(line: str, place: str) -> list[str] | dict[str, Any]:
    """Return the id that a line names, or the ranking that it is."""
    if _SPREAD.match(line):
        raise SpecError(
            f"{place}: JSON that goes over several lines, or a list; wanted one object a line, as --json has"
        )
    if not _JSON.match(line):
        return [line]
    try:
        found = json.loads(line)
        if isinstance(found, dict):
            # Records may have any further field.
            name = next((name for name in ("id", "sample_id") if name in found), None)
            if name is None and isinstance(found["results"], list):
                return found
            found = found[name or "id"]
    except (ValueError, KeyError, RecursionError):
        raise SpecError(f'{place}: neither a plain id nor JSON with one, as {{"id": "demo-0001"}}') from None
    return [_plain(found, place)]


def _results_of(ranking: dict[str, Any], place: str) -> Iterator[str]:
    for end in _RANKED:
        for result in ranking.get(end) or ():
            if not isinstance(result, dict) or "sample_id" not in result:
                raise SpecError(f"{place}: one of its {end} has no sample_id; wanted a ranking as --json prints it")
            yield _plain(result["sample_id"], place)


def _check_identity(ranking: dict[str, Any], place: str, database: Asked | None) -> None:
    if database is not None and ranking.get("identity", database.identity) != database.identity:
        raise SpecError(f"{place}: a ranking of another database, or of one that was here before; ask this one again")


def _check_version(version: int, names: Sequence[str], place: str, database: Asked) -> None:
    """Refuse a ranking of samples that say something else by now, which nobody has looked at."""
    written = database.written_since(version, names) if version < database.version else []
    if written:
        what = f"sample {written[0]} was" if len(written) == 1 else f"{len(written):,} samples were"
        such = "" if len(written) == 1 else f", such as {written[0]}"
        raise SpecError(
            f"{place}: {what} written anew after version {version}, which the ranking is of{such}: what is there now "
            "was not ranked; ask again, or give their ids alone"
        )


def _plain(found: Any, place: str) -> str:
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise SpecError(f"{place}: its id is no text and no whole number")
    return str(found)
