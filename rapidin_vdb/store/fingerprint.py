"""The fingerprint as it stands in a table's schema metadata, and the check that two may meet."""

import dataclasses
import hashlib
import json
import uuid
from typing import Any

from rapidin_vdb.errors import FingerprintError, TableError
from rapidin_vdb.records import Fingerprint, ParameterShape, SketchSpec

METADATA_KEY = b"rapidin_vdb.fingerprint"
_DIGEST_KEY = b"rapidin_vdb.fingerprint.sha256"
_IDENTITY_KEY = b"rapidin_vdb.identity"
_NOT_COMPARED = frozenset({"model", "adapter", "versions", "epochs", "learning_rate", "parameters"})


def write_fingerprint(fingerprint: Fingerprint) -> dict[bytes, bytes]:
    """Return the schema metadata that holds a fingerprint."""
    text = json.dumps(dataclasses.asdict(fingerprint)).encode("utf-8")
    return {METADATA_KEY: text, _DIGEST_KEY: hashlib.sha256(text).hexdigest().encode("ascii")}


def read_fingerprint(metadata: dict[bytes, bytes] | None, *, place: str) -> Fingerprint:
    """Return the fingerprint in a table's schema metadata.

    Raises:
        TableError: there is none, or it cannot be read.
    """
    if not metadata or METADATA_KEY not in metadata:
        raise TableError(f"{place}: the table samples has no fingerprint; it was not made by rapidin-vdb init")
    text = metadata[METADATA_KEY]
    # Not in tables that were made before there was one.
    if metadata.get(_DIGEST_KEY, b"") not in (b"", hashlib.sha256(text).hexdigest().encode("ascii")):
        raise TableError(f"{place}: the fingerprint is damaged: it is not what was written at init")
    try:
        values: dict[str, Any] = json.loads(metadata[METADATA_KEY])
        values["sketch"] = SketchSpec(**values["sketch"])
        values["theta"] = tuple(
            ParameterShape(name=shape["name"], shape=tuple(shape["shape"])) for shape in values["theta"]
        )
        return Fingerprint(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise TableError(f"{place}: the fingerprint cannot be read by this version of rapidin-vdb: {error}") from error


def new_identity() -> dict[bytes, bytes]:
    """Return schema metadata that no other database has."""
    return {_IDENTITY_KEY: uuid.uuid4().hex.encode("ascii")}


def read_identity(metadata: dict[bytes, bytes], *, place: str) -> str:
    """Return what tells a database from others; for those that have no such mark, made of where and what they are."""
    found = metadata.get(_IDENTITY_KEY)
    if found is not None:
        return found.decode("ascii", "replace")
    return hashlib.sha256(place.encode("utf-8") + metadata[METADATA_KEY]).hexdigest()[:32]


def check_fingerprint(stored: Fingerprint, here: Fingerprint, *, place: str) -> None:
    """Refuse to let vectors meet that were not made alike.

    Raises:
        FingerprintError: names every field that differs.
    """
    differing = [
        _difference(field.name, getattr(stored, field.name), getattr(here, field.name))
        for field in dataclasses.fields(Fingerprint)
        if field.name not in _NOT_COMPARED and getattr(stored, field.name) != getattr(here, field.name)
    ]
    if differing:
        raise FingerprintError(
            f"{place} was made with another fingerprint: {'; '.join(differing)}. Use the model it was made with "
            f"({stored.model}{' + ' + stored.adapter if stored.adapter else ''}), or make a new database with: "
            "rapidin-vdb init"
        )


def _difference(name: str, stored: object, here: object) -> str:
    if name == "theta":
        return "theta differs in names or shapes of its parameters"
    pairs = enumerate(zip(repr(stored), repr(here), strict=False))
    alike = next((place for place, (one, other) in pairs if one != other), 0)
    return f"{name} is {_short(stored, alike)} in the database, {_short(here, alike)} here"


def _short(value: object, alike: int) -> str:
    """Return a value in few characters, from a little before the place at which it differs from another."""
    text = repr(value)
    start = max(alike - 20, 0) if len(text) > 60 else 0
    end = start + 57
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
