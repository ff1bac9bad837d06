"""Rankings of samples and of single tokens; each prints itself as plain values."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rapidin_vdb.records import Focus, Scalar


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where a query's time went."""

    gradient: float
    """Gradient of the generation and its sketch."""
    search: float
    """Filter, search, and reading the texts of the samples found."""
    tokens: float
    """Token scores."""
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
    """Influence of each token on each of the ranking's `generation_tokens` (Eq. 8), float32 [tokens, generated]."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `matrix` only where it was asked for."""
        values = dataclasses.asdict(dataclasses.replace(self, matrix=None))
        # Seven digits are what single precision knows.
        rounded = None if self.matrix is None else [[float(f"{value:.7g}") for value in row] for row in self.matrix]
        return _without(values | {"matrix": rounded}, ("matrix",))


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


@dataclass(frozen=True, kw_only=True)
class GroupInfluence:
    """Influence of all samples that share a value."""

    value: Scalar
    """The value."""
    samples: int
    """How many samples of those searched have it."""
    score: float
    """Their influence, added up or averaged (Eq. 5), no unit."""


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
    histogram: Histogram | None = None
    """How all scores are spread, where it was asked for."""
    focus: tuple[Focus, ...] | None = None
    """The texts, or spans of code points, of the generation whose tokens alone were asked about (Eq. 7)."""
    prompt: str | None = None
    """What the model was asked, where tokens of the generation are shown."""
    generation: str | None = None
    """What it said, likewise."""
    generation_tokens: tuple[Span, ...] | None = None
    """The columns of the results' matrices, where these were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `query --json` prints; what was not asked for is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for end in ("results", "harmful"):
            values[end] = None if values[end] is None else [result.to_dict() for result in values[end]]
        values["seconds"] = dataclasses.asdict(self.seconds)
        values["histogram"] = None if self.histogram is None else dataclasses.asdict(self.histogram)
        for name in ("groups", "generation_tokens"):
            values[name] = None if values[name] is None else [dataclasses.asdict(value) for value in values[name]]
        return _without(
            values, ("harmful", "groups", "histogram", "focus", "prompt", "generation", "generation_tokens")
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict a result, with the query's id, for tables; where both ends were asked for, both.

        A column `end` then says which: `helpful` or `harmful`.
        """
        ends = [({"end": "helpful"} if self.harmful is not None else {}, self.results)]
        ends += [] if self.harmful is None else [({"end": "harmful"}, self.harmful)]
        return [
            {"query_id": self.query_id}
            | end
            | {k: v for k, v in result.to_dict().items() if k != "metadata"}
            | {name: value for name, value in result.metadata.items() if name not in ("query_id", "end")}
            for end, results in ends
            for result in results
        ]

    def to_arrow(self) -> Any:
        """Return a pyarrow.Table, one row a result.

        What names the columns of a `matrix`, the tokens of the generation, is in the schema's metadata, as JSON.
        """
        import pyarrow

        table = pyarrow.Table.from_pylist(self.to_rows())
        if self.generation_tokens is None:
            return table
        spans = json.dumps([dataclasses.asdict(span) for span in self.generation_tokens])
        return table.replace_schema_metadata({"generation_tokens": spans})

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame, one row a result; needs the extra `[pandas]`."""
        return self.to_arrow().to_pandas()


def _without(values: dict[str, Any], optional: tuple[str, ...]) -> dict[str, Any]:
    """Leave out what is optional and was not asked for."""
    return {name: value for name, value in values.items() if value is not None or name not in optional}
