"""The fingerprint as it stands in a table's schema metadata."""

import dataclasses
import hashlib
import json
import uuid
from typing import Any

from rapidin_vdb.errors import TableError
from rapidin_vdb.records import Fingerprint, ParameterShape, SketchSpec

METADATA_KEY = b"rapidin_vdb.fingerprint"
_DIGEST_KEY = b"rapidin_vdb.fingerprint.sha256"
_IDENTITY_KEY = b"rapidin_vdb.identity"


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
