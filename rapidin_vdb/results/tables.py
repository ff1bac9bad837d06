"""Results as the rows of a table, beside the further fields of records, whose names may be anything."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence, Set
from typing import Any

from rapidin_vdb.errors import SpecError
from rapidin_vdb.records import OWN_COLUMNS


def column_of(name: str, computed: Set[str]) -> str:
    """Return the column of a record's field beside computed columns; no two fields have the same.

    One that is named like a computed column is `record_NAME`, and so on for one that is named like that. Names that are
    ours already in the database were renamed when they were ingested.

    >>> [column_of(name, {"start", "score"}) for name in ("stars", "Start", "record_start", "record_score")]
    ['stars', 'record_Start', 'record_record_start', 'record_score']
    """
    plain = name.lower()
    while plain.startswith("record_"):
        plain = plain.removeprefix("record_")
    clashes = plain in computed and (plain not in OWN_COLUMNS or name.lower() == plain)
    return f"record_{name}" if clashes else name


def arrow_table(rows: Sequence[Mapping[str, Any]], computed: Mapping[str, Any]) -> Any:
    """Return a pyarrow.Table of all columns that any of the rows has.

    `computed` names those that are always there, each with the annotation of its values. Others have the type that
    holds all of their values as they are; where there is none, each value is written as JSON.
    """
    import pyarrow as pa

    further = {name: None for row in rows for name in row if name not in computed}
    columns = {name: pa.array([row.get(name) for row in rows], _type_of(kind)) for name, kind in computed.items()}
    columns |= {name: _lossless([row.get(name) for row in rows]) for name in further}
    return pa.table(columns)


def data_frame(table: Any) -> Any:
    """Return a pyarrow.Table as a pandas.DataFrame.

    Whole numbers that some rows have not are of pandas' Int64, for as floating point they would be rounded.

    Raises:
        SpecError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise SpecError("to_pandas needs the extra [pandas]: pip install 'rapidin-vdb[pandas]'") from error
    frame = table.to_pandas()
    for field, column in zip(table.schema, table.columns, strict=True):
        if str(field.type) == "int64" and column.null_count:
            frame[field.name] = column.to_pandas(types_mapper=lambda _: pandas.Int64Dtype())
    return frame


def _lossless(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        texts = [None if value is None else json.dumps(value, default=str) for value in values]
        return pa.array(texts, pa.string())


def _type_of(annotation: Any) -> Any:
    """Return the Arrow type of an annotation's values."""
    import pyarrow as pa

    plain = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
    if annotation in plain:
        return plain[annotation]
    if dataclasses.is_dataclass(annotation):
        return pa.struct([(name, _type_of(kind)) for name, kind in typing.get_type_hints(annotation).items()])
    inner = [kind for kind in typing.get_args(annotation) if kind not in (types.NoneType, Ellipsis)]
    found = _type_of(inner[0])
    return found if isinstance(annotation, types.UnionType) else pa.list_(found)
