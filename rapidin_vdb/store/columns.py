"""Columns for the fields of records: added as records bring them, and widened from whole numbers to floating point.

Lance cannot widen in place. A copy of the column is added, the column dropped, and the copy renamed: three commits, of
which a process that dies leaves the first or the first two. Whoever writes next finishes them before anything else, for
rows that came between would lack the field in the copy; and readers stay with the version before until all are there.
"""

from typing import Any

import pyarrow as pa

from rapidin_vdb.errors import UnfitError
from rapidin_vdb.store.rows import OWN_NAMES, ColumnKind, can_hold, column_field, column_kind

_WIDENED = "_widened_"
_EXACT = 1 << 53


def check_out(table: Any, version: int) -> None:
    """Put a table at a version; at the one before a widening that goes on, or was cut short, which changes no row."""
    table.checkout(version)
    while version > 1 and any(name.startswith(_WIDENED) for name in table.schema.names):
        version -= 1
        table.checkout(version)


def settle(table: Any) -> None:
    """Put the copies of widened columns in their places, where a process died before; called while committing."""
    for copy in [name for name in table.schema.names if name.startswith(_WIDENED)]:
        name = copy.removeprefix(_WIDENED)
        if name in table.schema.names:
            table.drop_columns([name])
        table.alter_columns({"path": copy, "rename": name})


def ensure_columns(table: Any, kinds: dict[str, ColumnKind]) -> None:
    """Add the columns that are missing, and widen those that have to be; called while committing.

    Raises:
        UnfitError: a column exists with another type; nothing is changed then.
    """
    existing = {field.name.lower(): field for field in table.schema if field.name not in OWN_NAMES}
    missing, widened = [], []
    for name, kind in kinds.items():
        field = existing.get(name.lower())
        if field is None:
            missing.append(column_field(name, kind))
        elif column_kind(field) == "int" and kind == "float":
            if table.count_rows(f"`{field.name}` > {_EXACT} OR `{field.name}` < -{_EXACT}"):
                raise UnfitError(
                    f"the records' field {name} is floating point, but the column {field.name} holds whole numbers "
                    f"beyond {_EXACT}, which would lose digits; rename the field or write it as whole numbers"
                )
            widened.append(field.name)
        elif not can_hold(column_kind(field), kind):
            raise UnfitError(
                f"the records' field {name} is {kind}, but the column {name} holds {field.type}; "
                "rename the field or bring it to that type"
            )
    if missing:
        table.add_columns(pa.schema(missing))
    for name in widened:
        table.add_columns({_WIDENED + name: f"CAST(`{name}` AS DOUBLE)"})
        settle(table)
