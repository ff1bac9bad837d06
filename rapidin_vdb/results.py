"""What comes out: rankings, stored samples, reports; each prints itself as plain values."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rapidin_vdb.records import Scalar


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
    """Token scores, where they were asked for."""


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
class Ranking:
    """The answer to one query: samples by influence, ties by `sample_id`."""

    query_id: str
    """Which query."""
    score_unit: str
    """What a score is."""
    searched: int
    """How many samples the filter let through."""
    where: str | None
    """The filter."""
    seconds: Seconds
    """Where the time went."""
    results: tuple[RankedSample, ...]
    """Best first."""
    harmful: tuple[RankedSample, ...] | None = None
    """Most negative first, where both ends were asked for."""
    groups: tuple[GroupInfluence, ...] | None = None
    """Influence by the values of a column, largest first, where it was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `query --json` prints; `harmful` and `groups` only where they were asked for."""
        optional = ("harmful", "groups")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in optional or v is not None}

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict a result, with the query's id, for tables; where both ends were asked for, both."""
        return [
            {"query_id": self.query_id}
            | {k: v for k, v in dataclasses.asdict(result).items() if k != "metadata"}
            | {name: value for name, value in result.metadata.items()}
            for result in (*self.results, *(self.harmful or ()))
        ]

    def to_arrow(self) -> Any:
        """Return a pyarrow.Table, one row a result."""
        import pyarrow

        return pyarrow.Table.from_pylist(self.to_rows())

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame, one row a result; needs the extra `[pandas]`."""
        return self.to_arrow().to_pandas()


@dataclass(frozen=True, kw_only=True)
class StoredSample:
    """A sample as the table holds it, without its vector."""

    sample_id: str
    """Which sample."""
    split: str
    """Its split."""
    source: str | None
    """Its source."""
    prompt: str | None
    """Its prompt, before the template."""
    response: str
    """Its response."""
    token_offsets: tuple[tuple[int, int], ...]
    """Spans of the response tokens, in code points of the response."""
    tokens: int
    """Number of response tokens, the end-of-sequence token included."""
    truncated: bool
    """Whether it was cut to `max_tokens`."""
    loss: float
    """Mean cross-entropy over the response tokens, in nats."""
    metadata: Mapping[str, Scalar]
    """Its further fields."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `show --json` prints."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingest did."""

    added: int
    """Samples written."""
    replaced: int
    """Samples that took the place of one with the same id."""
    unchanged: int
    """Samples that were there already."""
    kept: int
    """Samples whose id stands for other content, which was kept (`--on-duplicate skip`)."""
    bad: tuple[str, ...]
    """One message for each record that could not be stored."""
    tokens: int
    """Tokens run through the model."""
    seconds: float
    """Loading the model apart."""
    table_version: int
    """The table's version afterwards."""


@dataclass(frozen=True, kw_only=True)
class IngestEstimate:
    """What an ingest would take."""

    samples: int
    """Samples to write."""
    tokens: int
    """Their tokens, prompts included, padding not."""
    batches: int
    """Batches they make."""
    bytes: int
    """What the database will grow by."""
    peak_memory: int
    """Bytes at the most, of the device or of this process, seen while a few batches were timed."""
    seconds: float
    """Expected from the timed batches, loading the model apart."""
    bad: tuple[str, ...]
    """One message for each record that could not be stored."""


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """One built index."""

    name: str
    """The recipe's name."""
    recipe: Mapping[str, Any]
    """The recipe."""
    fresh: bool
    """Whether it holds the table as it is now."""
    samples: int
    """How many samples it holds."""
    table_version: int
    """The version of the table that it holds."""
    recall: Mapping[str, Any] | None
    """What a coarse index was measured to find of the best `at` samples, over `queries`; None for an exact one."""


@dataclass(frozen=True, kw_only=True)
class DatabaseInfo:
    """What `info` says."""

    samples: int
    """Rows of the table `samples`."""
    tokens: int
    """Response tokens of all samples."""
    width: int
    """Length of a RapidGrad."""
    shuffles: int
    """The paper's lambda."""
    seed: int
    """Of shuffles and signs."""
    normalize: str
    """`layer` or `none`."""
    model: str
    """As given at `init`."""
    adapter: str | None
    """As given at `init`."""
    table_version: int
    """Grows with every commit."""
    indexes: tuple[IndexInfo, ...]
    """The built indexes."""
    bytes: int
    """Size on disk, indexes included."""
    columns: tuple[str, ...]
    """What a filter may use, with types; not in the JSON, whose fields are fixed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `info --json` prints."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "columns"}
