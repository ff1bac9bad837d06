"""The samples behind several generations, as one list; prints itself as plain values."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rapidin_vdb.records import Focus, Scalar
from rapidin_vdb.results.rankings import COMPUTED, Seconds
from rapidin_vdb.results.tables import arrow_table, column_of, data_frame


@dataclass(frozen=True, kw_only=True)
class PooledSample:
    """One line of a pool."""

    rank: int
    """From 1."""
    sample_id: str
    """Which sample."""
    score: float
    """Its largest influence on any of the generations, no unit; below zero where that is the largest either way.

    Where layers are not normalised, its influence on that generation on which it is the largest relative to the length
    of the generation's gradient.
    """
    query_id: str
    """The generation that this is the influence on; of several as large, the first."""
    split: str
    """The sample's split."""
    source: str | None
    """The sample's source."""
    prompt: str | None
    """The sample's prompt."""
    response: str
    """The sample's response."""
    metadata: Mapping[str, Scalar]
    """The sample's further fields; those it does not have are left out."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The samples of largest influence on any of several generations; ties by `sample_id`.

    It is the union of the generations' rankings (pooling: Sparck Jones, van Rijsbergen 1975), cut by score.
    """

    queries: tuple[str, ...]
    """The generations."""
    score_unit: str
    """What a score is."""
    searched: int
    """How many samples the filter let through."""
    where: str | None
    """The filter."""
    seconds: Seconds
    """Where the time went, for all generations."""
    results: tuple[PooledSample, ...]
    """Largest first: most positive, or most negative, or of either sign by absolute value.

    Where layers are not normalised, relative to the length of the generation's gradient.
    """
    focus: tuple[Focus, ...] | None = None
    """The texts, or spans of code points, that alone were asked about of generations without a focus of their own."""
    score_error: float | None = None
    """How far scores are off by one standard deviation, as of a `Ranking`; the largest of all generations."""
    note: str | None = None
    """What was cut, may have been missed, or does not stand out, in words."""
    table_version: int | None = None
    """Which version of the table it is of."""
    identity: str | None = None
    """What tells the database from others."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `pool --json` prints; what was not asked for is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["seconds"] = dataclasses.asdict(self.seconds)
        values["results"] = [result.to_dict() for result in self.results]
        optional = {field.name for field in dataclasses.fields(self) if field.default is None}
        return {name: value for name, value in values.items() if value is not None or name not in optional}

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict a result, for tables; further fields of records are columns, as in a `Ranking`."""
        return [
            {name: getattr(result, name) for name in _computed()}
            | {column_of(name, COMPUTED): value for name, value in result.metadata.items()}
            for result in self.results
        ]

    def to_arrow(self) -> Any:
        """Return a pyarrow.Table, one row a result, of the columns of `to_rows`; without results, too."""
        return arrow_table(self.to_rows(), _computed())

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame, one row a result; needs the extra `[pandas]`.

        Raises:
            SpecError: pandas is not installed.
        """
        return data_frame(self.to_arrow())


def _computed() -> dict[str, Any]:
    """Return the columns that hold no fields of records, with the annotations of their values."""
    return {name: kind for name, kind in typing.get_type_hints(PooledSample).items() if name != "metadata"}
