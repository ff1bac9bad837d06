"""The columns of the table `samples`, and rows on their way into it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rapidin_vdb.errors import UnfitError
from rapidin_vdb.records import Encoded, Sample, Scalar, Turns
from rapidin_vdb.results import StoredSample
from rapidin_vdb.store.checksum import covers_fields, row_checksum, with_fields

ColumnKind = Literal["bool", "int", "float", "str"]

_ARROW = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
_SPAN = pa.struct([pa.field("start", pa.int32(), nullable=False), pa.field("end", pa.int32(), nullable=False)])
_OWN = (
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("source", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("response", pa.string(), nullable=False),
    pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
    pa.field("token_offsets", pa.list_(pa.field("item", _SPAN, nullable=False)), nullable=False),
    pa.field("tokens", pa.int32(), nullable=False),
    pa.field("truncated", pa.bool_(), nullable=False),
    pa.field("loss", pa.float32(), nullable=False),
    pa.field("content_hash", pa.string(), nullable=False),
)
_CHECKSUM = pa.field("checksum", pa.int64(), nullable=False)
PLACES = "_loss_places"
"""Column of the places of a response's tokens among the ids, where others stand between them. Only in databases in
which all turns have a loss; no field of a record is stored under such a name."""
_PLACES = pa.field(PLACES, pa.list_(pa.field("item", pa.int32(), nullable=False)))
OWN_NAMES = frozenset(field.name for field in _OWN) | {"vector", "checksum", PLACES}
"""Columns of ours; all others are fields of the records."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A sample, its tokens and its RapidGrad, ready to be written."""

    sample: Sample
    """The record."""
    encoded: Encoded
    """Its tokens."""
    loss: float
    """Mean cross-entropy over the response tokens, in nats."""
    vector: np.ndarray
    """The RapidGrad, float16 [width]."""


def samples_schema(width: int, metadata: Mapping[bytes, bytes], *, turns: Turns = "last") -> pa.Schema:
    """Return the schema of a new table."""
    places = [_PLACES] if turns == "all" else []
    return pa.schema([*_OWN, *places, _CHECKSUM, vector_field(width)], metadata=dict(metadata))


def vector_field(width: int) -> pa.Field:
    """Return the column of RapidGrads."""
    return pa.field("vector", pa.list_(pa.field("item", pa.float16()), width), nullable=False)


def column_field(name: str, kind: ColumnKind) -> pa.Field:
    """Return the nullable column of a record's field."""
    return pa.field(name, _ARROW[kind])


def column_kind(field: pa.Field) -> ColumnKind | None:
    """Return the kind of a column, None for one that is not a scalar of ours."""
    return next((kind for kind, arrow in _ARROW.items() if field.type == arrow), None)  # type: ignore[misc]


def value_kind(value: Scalar) -> ColumnKind:
    """Return the kind of a value that is not None."""
    # bool first: it is an int to Python.
    return (
        "bool"
        if isinstance(value, bool)
        else "int"
        if isinstance(value, int)
        else "float"
        if isinstance(value, float)
        else "str"
    )


def can_hold(column: ColumnKind | None, kind: ColumnKind) -> bool:
    """Say whether a column takes values of a kind, widened if need be."""
    return column in (kind, "str") or {column, kind} == {"int", "float"}


def merge_kinds(kinds: Mapping[str, ColumnKind], metadata: Mapping[str, Scalar]) -> dict[str, ColumnKind]:
    """Return the kinds of columns that hold what they held and one more sample's fields.

    Whole numbers widen to floating point, and any other mixture becomes text. Names are one when only case differs.

    >>> merge_kinds({"stars": "int"}, {"stars": 4.5, "lang": "en"})
    {'stars': 'float', 'lang': 'str'}
    """
    merged = dict(kinds)
    known = {name.lower(): name for name in merged}
    for name, value in metadata.items():
        if value is None:
            continue
        name = known.setdefault(name.lower(), name)
        kind = value_kind(value)
        before = merged.get(name, kind)
        merged[name] = before if before == kind else "float" if {before, kind} == {"int", "float"} else "str"
    return merged


def arrow_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Return rows as an Arrow table of the table's schema.

    Raises:
        UnfitError: a field of a sample does not fit its column.
    """
    arrays = {
        "sample_id": pa.array([row.sample.sample_id for row in rows], pa.string()),
        "split": pa.array([row.sample.split for row in rows], pa.string()),
        "source": pa.array([row.sample.source for row in rows], pa.string()),
        "prompt": pa.array([row.sample.prompt for row in rows], pa.string()),
        "response": pa.array([row.sample.response for row in rows], pa.string()),
        "input_ids": pa.array([list(row.encoded.input_ids) for row in rows], schema.field("input_ids").type),
        "token_offsets": pa.array(
            [[{"start": start, "end": end} for start, end in row.encoded.offsets] for row in rows],
            schema.field("token_offsets").type,
        ),
        "tokens": pa.array([row.encoded.response_tokens for row in rows], pa.int32()),
        "truncated": pa.array([row.encoded.truncated for row in rows], pa.bool_()),
        "loss": pa.array([row.loss for row in rows], pa.float32()),
        "content_hash": pa.array([row.sample.content_hash for row in rows], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(np.stack([row.vector for row in rows]).astype(np.float16, copy=False).reshape(-1)),
            type=schema.field("vector").type,
        ),
    }
    if PLACES in schema.names:
        arrays[PLACES] = pa.array([row.encoded.places for row in rows], _PLACES.type)
    fields = [{name.lower(): value for name, value in row.sample.metadata.items()} for row in rows]
    further = {field.name: field for field in schema if field.name not in OWN_NAMES}
    stored = {
        name: [_converted(metadata.get(name.lower()), column_kind(field)) for metadata in fields]
        for name, field in further.items()
    }
    arrays |= {name: _column(field, stored[name]) for name, field in further.items()}
    # Not in tables that were made before there was one.
    arrays["checksum"] = pa.array(
        [
            with_fields(
                _checksum(row, with_places=PLACES in schema.names),
                {name: values[number] for name, values in stored.items()},
            )
            for number, row in enumerate(rows)
        ],
        pa.int64(),
    )
    return pa.Table.from_arrays([arrays[field.name] for field in schema], schema=schema)


def _checksum(row: Row, *, with_places: bool) -> int:
    sample, encoded = row.sample, row.encoded
    return row_checksum(
        (
            sample.sample_id, sample.split, sample.source, sample.prompt, sample.response, encoded.response_tokens,
            encoded.truncated, row.loss, sample.content_hash,
        ),
        (
            encoded.input_ids, [place for span in encoded.offsets for place in span],
            *([encoded.places or ()] if with_places else []),
        ),
        row.vector,
    )  # fmt: skip


def stored_checksum(row: Mapping[str, Any], vector: np.ndarray) -> int:
    """Return what the checksum of a row of the table should be."""
    names = ("sample_id", "split", "source", "prompt", "response", "tokens", "truncated", "loss", "content_hash")
    offsets = [place for span in row["token_offsets"] for place in (span["start"], span["end"])]
    places = [row[PLACES] or ()] if PLACES in row else []
    checksum = row_checksum([row[name] for name in names], (row["input_ids"], offsets, *places), vector)
    if not covers_fields(row["checksum"]):
        return checksum
    return with_fields(checksum, {name: value for name, value in row.items() if name not in OWN_NAMES})


def _column(field: pa.Field, values: Sequence[Scalar]) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UnfitError(f"a record's field {field.name} does not fit its column of {field.type}: {error}") from error


def _converted(value: Scalar, kind: ColumnKind | None) -> Any:
    if value is None:
        return None
    if kind == "str":
        return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return float(value) if kind == "float" and isinstance(value, int) and not isinstance(value, bool) else value


def stored_sample(row: Mapping[str, Any]) -> StoredSample:
    """Return a row of the table as a record."""
    return StoredSample(
        sample_id=row["sample_id"],
        split=row["split"],
        source=row["source"],
        prompt=row["prompt"],
        response=row["response"],
        token_offsets=tuple((span["start"], span["end"]) for span in row["token_offsets"]),
        tokens=row["tokens"],
        truncated=row["truncated"],
        loss=row["loss"],
        metadata={name: value for name, value in row.items() if name not in OWN_NAMES and value is not None},
    )
