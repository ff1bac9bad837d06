"""Every noun that travels between modules: frozen, plain Python values, no verbs."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scalar = str | int | float | bool | None
Normalize = Literal["layer", "none"]
Quantization = Literal["none", "nf4", "int8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
OnBadRecord = Literal["stop", "skip"]
OnDuplicate = Literal["skip", "replace", "error"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """What was said."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training record, known by `sample_id`; a query is one too, whose response is the generation."""

    sample_id: str
    """Unique within a database."""
    prompt: str | None
    """What the model was given, before any template; None when all of the text is response."""
    response: str
    """What the model was trained to say."""
    split: str
    """`train` unless told otherwise."""
    source: str | None
    """Where the record comes from."""
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    """Every further scalar field of the record, by column name."""
    messages: tuple[Message, ...] = ()
    """The turns before the response; one user turn unless the record is a conversation."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The record as it was read, for Jinja templates."""
    content_hash: str = ""
    """Hash of everything above; tells two records of the same id apart."""
    location: str = ""
    """File and line, for messages."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as token ids, its prompt masked."""

    sample_id: str
    """The sample's."""
    input_ids: tuple[int, ...]
    """Prompt, response and end-of-sequence token, in order."""
    offsets: tuple[tuple[int, int], ...]
    """Half-open spans, in code points of the response, of the last `len(offsets)` ids: those that carry loss."""
    truncated: bool
    """Whether ids were cut from the right to respect `max_tokens`."""

    @property
    def response_tokens(self) -> int:
        """How many tokens carry loss (the paper's G)."""
        return len(self.offsets)


@dataclass(frozen=True, kw_only=True)
class SketchSpec:
    """All that is needed to repeat a sketch for ever, beside the number of parameters."""

    width: int = 65536
    """Length of a RapidGrad (the paper's K), a power of two."""
    shuffles: int = 20
    """How often rows and columns are permuted (the paper's lambda)."""
    seed: int = 42
    """Seed of the permutations and signs."""
    scheme: int = 1
    """Version of the drawing scheme; vectors of two schemes are not comparable."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, and how it turns a record into a loss."""

    model: str
    """Hub name or local folder."""
    adapter: str | None = None
    """PEFT adapter: hub name or local folder."""
    quantization: Quantization = "none"
    """How the base weights are held."""
    dtype: DType = "auto"
    """Type of the base weights; `auto` takes the checkpoint's."""
    parameters: str = "trainable"
    """`trainable`, `all`, or a regular expression over parameter names."""


@dataclass(frozen=True, kw_only=True)
class ParameterShape:
    """One parameter tensor of theta."""

    name: str
    """As `named_parameters` gives it."""
    shape: tuple[int, ...]
    """Its dimensions."""

    @property
    def count(self) -> int:
        """Number of coordinates."""
        product = 1
        for length in self.shape:
            product *= length
        return product


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What makes two RapidGrads comparable; differing in any compared field, they must not meet."""

    model: str
    """Hub name or folder given at `init` (not compared: a moved folder with the same weights is the same model)."""
    model_hash: str
    """Hash of the configuration and weights."""
    adapter: str | None
    """Hub name or folder of the adapter (not compared)."""
    adapter_hash: str | None
    """Hash of the adapter's configuration and weights."""
    quantization: Quantization
    """How the base weights are held."""
    dtype: str
    """Type of the base weights."""
    tokenizer_hash: str
    """Hash of the tokenizer."""
    template: str
    """`alpaca`, `chat`, `text` or `jinja`."""
    template_text: str
    """Source of the template."""
    max_tokens: int
    """Samples longer than this are cut from the right."""
    loss: str
    """The loss whose gradient is taken."""
    normalize: Normalize
    """Whether each parameter tensor's gradient is scaled to L2 norm 1."""
    parameters: str
    """The selection given at `init`."""
    theta: tuple[ParameterShape, ...]
    """The parameter tensors, in order."""
    sketch: SketchSpec
    """The sketch."""
    epochs: float
    """Number of epochs e of Eq. 5."""
    learning_rate: float
    """Learning rate eta of Eq. 5."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Library versions at `init` (not compared)."""

    @property
    def gradient_length(self) -> int:
        """Number of coordinates of a gradient (the paper's D, before padding)."""
        return sum(shape.count for shape in self.theta)


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

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `query --json` prints."""
        return dataclasses.asdict(self)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict a result, with the query's id, for tables."""
        return [
            {"query_id": self.query_id}
            | {k: v for k, v in dataclasses.asdict(result).items() if k != "metadata"}
            | {name: value for name, value in result.metadata.items()}
            for result in self.results
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

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `info --json` prints."""
        return dataclasses.asdict(self)
