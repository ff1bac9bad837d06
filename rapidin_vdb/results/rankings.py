"""Rankings of samples and of single tokens; each prints itself as plain values."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rapidin_vdb.records import Focus, Level, Scalar
from rapidin_vdb.results.tables import arrow_table, column_of, data_frame


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where a query's time went."""

    gradient: float
    """Gradient of the generation and its sketch."""
    search: float
    """Filter, search, and reading the texts of the samples found."""
    tokens: float
    """Exact scores, token scores and matrices, where they were asked for."""
    total: float
    """All of it; loading model and index apart, which happens once."""


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """Influence of one response token."""

    text: str
    """The token's part of the response."""
    start: int
    """First code point of the response."""
    end: int
    """One past the last."""
    score: float
    """Influence, no unit."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A token of a generation."""

    text: str
    """Its part of the generation."""
    start: int
    """First code point of the generation."""
    end: int
    """One past the last."""


@dataclass(frozen=True, kw_only=True)
class RankedSample:
    """One line of a ranking."""

    rank: int
    """From 1."""
    sample_id: str
    """Which sample."""
    score: float
    """Influence from the RapidGrads, no unit (Eq. 5)."""
    exact_score: float | None
    """Influence from the full gradients, where it was asked for."""
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
    tokens: tuple[TokenScore, ...] | None
    """Token scores (Eq. 6), which sum to `exact_score`, where they were asked for."""
    matrix: Any = dataclasses.field(default=None, compare=False)
    """Influence of each token on each of the ranking's `generation_tokens` (Eq. 8), float32 [tokens, generated].

    Rows sum to token scores on the whole generation; columns are parts of that, by its norms, not each a focus.
    """
    difference: float | None = None
    """`score` less `exact_score`, where that is known: the error of the sketch."""
    truncated: bool = False
    """Whether the sample was cut to `max_tokens`: what stands behind its last token has no score."""

    @property
    def rounded_matrix(self) -> list[list[float]] | None:
        """The matrix as plain numbers, of as many digits as single precision knows."""
        return None if self.matrix is None else [[float(f"{value:.7g}") for value in row] for row in self.matrix]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `matrix` and `difference` only where they are known, `truncated` only where it is so."""
        values = dataclasses.asdict(dataclasses.replace(self, matrix=None))
        values |= {"matrix": self.rounded_matrix, "truncated": self.truncated or None}
        return _without(values, ("matrix", "difference", "truncated"))


@dataclass(frozen=True, kw_only=True)
class RankedToken:
    """One line of a ranking of single training tokens."""

    rank: int
    """From 1."""
    sample_id: str
    """Whose token."""
    token_index: int
    """Which of the sample's response tokens, from 0."""
    text: str
    """The token's part of the response."""
    start: int
    """First code point of the response."""
    end: int
    """One past the last."""
    score: float
    """Influence from the token's RapidGrad, no unit (Eq. 6)."""
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


_KINDS: dict[Level, type[RankedSample] | type[RankedToken]] = {"sample": RankedSample, "token": RankedToken}
# Which of both ends a row is of. A token's `end` is where it stops.
_WHICH_END: dict[Level, str] = {"sample": "end", "token": "side"}
COMPUTED = (
    {field.name for kind in _KINDS.values() for field in dataclasses.fields(kind)} | {"query_id", *_WHICH_END.values()}
) - {"metadata"}
"""All columns of rankings that hold no fields of records, whatever was asked."""


@dataclass(frozen=True, kw_only=True)
class GroupInfluence:
    """Influence of all samples that share a value."""

    value: Scalar
    """The value."""
    samples: int
    """How many samples of those searched have it."""
    score: float
    """Their influence, added up or averaged (Eq. 5), no unit."""
    error: float
    """About how far that is from what full gradients would give: one standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How the scores of all samples that were searched are spread."""

    edges: tuple[float, ...]
    """Borders of the bins, ascending, one more than there are bins."""
    counts: tuple[int, ...]
    """Samples in each."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The answer to one query: samples, or single tokens, by influence; ties by `sample_id`."""

    query_id: str
    """Which query."""
    score_unit: str
    """What a score is."""
    searched: int
    """How many samples, or tokens, the filter let through."""
    where: str | None
    """The filter."""
    seconds: Seconds
    """Where the time went."""
    results: tuple[RankedSample, ...] | tuple[RankedToken, ...]
    """Best first."""
    harmful: tuple[RankedSample, ...] | tuple[RankedToken, ...] | None = None
    """Most negative first, where both ends were asked for."""
    groups: tuple[GroupInfluence, ...] | None = None
    """Influence by the values of a column, largest first, where it was asked for."""
    groups_left_out: int | None = None
    """How many groups of smaller absolute influence are not among these, where there are any."""
    histogram: Histogram | None = None
    """How all scores are spread, where it was asked for."""
    focus: tuple[Focus, ...] | None = None
    """The texts, or spans of code points, of the generation whose tokens alone were asked about (Eq. 7)."""
    prompt: str | None = None
    """What the model was asked, where tokens of the generation are shown."""
    generation: str | None = None
    """What it said, likewise."""
    generation_tokens: tuple[Span, ...] | None = None
    """The tokens of the generation: the columns of the results' matrices, where these were asked for."""
    matching: int | None = None
    """Where tokens are ranked, how many samples the filter let through."""
    without_tokens: int | None = None
    """How many of these have no RapidGrads of their tokens, so that none of their tokens is in the ranking."""
    score_error: float | None = None
    """How far the score of a sample of unrelated gradient is from its exact score: one standard deviation.

    Of others it is farther, up to 1.4 times. None for single tokens, and where layers are not normalised.
    """
    note: str | None = None
    """What the ranking leaves out, or may have missed, in words, and what to do about it."""
    table_version: int | None = None
    """Which version of the table of samples it is of; `as_of` repeats one of samples, as long as that is kept."""
    identity: str | None = None
    """What tells the database from others, also from one made anew at its place. Each is of one model and adapter."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `query --json` prints; what was not asked for is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for end in ("results", "harmful"):
            values[end] = None if values[end] is None else [result.to_dict() for result in values[end]]
        values["seconds"] = dataclasses.asdict(self.seconds)
        values["histogram"] = None if self.histogram is None else dataclasses.asdict(self.histogram)
        for name in ("groups", "generation_tokens"):
            values[name] = None if values[name] is None else [dataclasses.asdict(value) for value in values[name]]
        return _without(values, tuple(field.name for field in dataclasses.fields(self) if field.default is None))

    @property
    def level(self) -> Level:
        """What is ranked."""
        single = self.without_tokens is not None or any(isinstance(result, RankedToken) for result in self.results)
        return "token" if single else "sample"

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict a result, with the query's id, for tables; where both ends were asked for, both.

        A column `end` then says which, `helpful` or `harmful`; it is called `side` where tokens are ranked, whose `end`
        is a place. The further fields of records are columns, too; one that is named like any column that is computed
        for any ranking is called `record_NAME`.
        """
        names = self._computed_columns()
        ends = [("helpful", self.results)] + ([] if self.harmful is None else [("harmful", self.harmful)])
        rows = []
        for end, results in ends:
            for result in results:
                known = result.to_dict() | {"query_id": self.query_id, _WHICH_END[self.level]: end}
                known |= {"truncated": result.truncated} if isinstance(result, RankedSample) else {}
                further = {column_of(name, COMPUTED): value for name, value in result.metadata.items()}
                rows.append({name: known.get(name) for name in names} | further)
        return rows

    def _computed_columns(self) -> dict[str, Any]:
        """Return the columns that hold no fields of records, with the annotations of their values."""
        names: dict[str, Any] = {"query_id": str}
        names |= {} if self.harmful is None else {_WHICH_END[self.level]: str}
        names |= typing.get_type_hints(_KINDS[self.level]) | {"matrix": tuple[tuple[float, ...], ...]}
        shown = any(getattr(result, "matrix", None) is not None for result in (*self.results, *(self.harmful or ())))
        unknown = {"metadata"} | (set() if shown or self.generation_tokens is not None else {"matrix"})
        return {name: kind for name, kind in names.items() if name not in unknown}

    def to_arrow(self) -> Any:
        """Return a pyarrow.Table, one row a result, of the columns of `to_rows`; without results, too.

        A record that has not a field has null there. Where a field's values have no type in common, as a number and a
        list, they are JSON. What names the columns of a `matrix`, the tokens of the generation, is in the schema's
        metadata, as JSON.
        """
        table = arrow_table(self.to_rows(), self._computed_columns())
        if self.generation_tokens is None:
            return table
        spans = json.dumps([dataclasses.asdict(span) for span in self.generation_tokens])
        return table.replace_schema_metadata({"generation_tokens": spans})

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame, one row a result; needs the extra `[pandas]`.

        Whole numbers that some results have not are of pandas' Int64, for as floating point they would be rounded.

        Raises:
            SpecError: pandas is not installed.
        """
        return data_frame(self.to_arrow())


def _without(values: dict[str, Any], optional: tuple[str, ...]) -> dict[str, Any]:
    """Leave out what is optional and was not asked for."""
    return {name: value for name, value in values.items() if value is not None or name not in optional}
