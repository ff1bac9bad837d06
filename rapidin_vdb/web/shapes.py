"""What requests and answers look like, for the OpenAPI document and for checking what comes in."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rapidin_vdb.question import Question
from rapidin_vdb.records import Aggregate, Level, OnBadRecord, OnDeleted, OnDuplicate
from rapidin_vdb.results import IndexInfo, RankedSample, RankedToken, Ranking, StoredSample

_Text = Annotated[str, Field(max_length=200_000)]
# A column may have a value of its own in every sample.
_MOST_GROUPS = 1000
_MOST_NUMBERS = 10_000_000  # of all matrices of an answer, which takes some 11 bytes for each
_Span = Annotated[list[Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]], Field(min_length=2, max_length=2)]


class _Shape(BaseModel):
    # Strict: true is no number, nor is a text of digits, as the document says.
    model_config = ConfigDict(extra="forbid", strict=True)


class Search(_Shape):
    """The options of a query, as on the command line."""

    top_k: int = Field(default=10, ge=1, le=1000, description="How many results.")
    where: str | None = Field(default=None, max_length=10_000, description="SQL filter, applied before the search.")
    harmful: bool = Field(default=False, description="The most negative first.")
    both: bool = Field(default=False, description="Both ends.")
    level: Level = Field(default="sample", description="What is ranked: samples, or single training tokens.")
    focus: list[_Text | _Span] = Field(
        default=[],
        max_length=1000,
        description="Ask only about these texts of the generation, wherever they stand, or half-open spans of its code "
        "points (Eq. 7); an empty span stands for the end of the sequence.",
    )
    tokens: bool = Field(default=False, description="Give every token of the results its exact influence (Eq. 6).")
    matrix: bool = Field(
        default=False, description="The same on each token of the generation (Eq. 8), as parts of the whole."
    )
    refine: int = Field(default=0, ge=0, le=1000, description="Rank so many of the first again, by exact influence.")
    group_by: str | None = Field(
        default=None,
        max_length=200,
        description=f"Influence by the values of this column: of at most {_MOST_GROUPS:,}, those of largest "
        "absolute influence; `groups_left_out` says how many others there are.",
    )
    aggregate: Aggregate = Field(default="sum", description="Whether groups are added up or averaged.")
    histogram: int = Field(default=0, ge=0, le=1000, description="Count all scores in so many bins.")
    index: str | None = Field(default=None, max_length=200, description="Which built index to use.")
    as_of: int | None = Field(default=None, ge=1, le=2**62, description="Answer from an older version of the table.")

    def question(self, *, spans: bool = False) -> Question:
        """Return the options as a question.

        Raises:
            SpecError: options exclude one another.
        """
        values = {name: getattr(self, name) for name in Search.model_fields}
        focus = tuple(e if isinstance(e, str) else (e[0], e[1]) for e in self.focus)
        most = {"most_groups": _MOST_GROUPS, "most_numbers": _MOST_NUMBERS}
        return Question(**values | {"focus": focus, "spans": spans} | most)


class Turn(_Shape):
    """What somebody said in a conversation."""

    role: str = Field(min_length=1, max_length=100, description="As in records: system, user, assistant, tool.")
    content: _Text | None = Field(default=None, description="What was said; null where only tools were called.")
    tool_calls: list[dict[str, Any]] | None = Field(default=None, max_length=100, description="As in records.")
    tool_call_id: str | None = Field(default=None, max_length=1000)
    name: str | None = Field(default=None, max_length=1000)
    reasoning_content: _Text | None = None


_Tools = Annotated[
    list[dict[str, Any]],
    Field(max_length=1000, description="The tools that the model could call, for chat templates that write them."),
]


class QueryRequest(Search):
    """A generation whose influences are wanted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Name a fruit.",
                    "generation": "A comet.",
                    "top_k": 5,
                    "where": "split = 'train'",
                    "tokens": True,
                },
                {"prompt": "Name a fruit.", "generation": "A comet.", "focus": [[2, 7]], "histogram": 20},
                {"messages": [{"role": "user", "content": "Name a fruit."}], "generation": "A comet."},
            ]
        },
    )

    prompt: str | None = Field(
        default=None, max_length=200_000, description="What the model was asked, before the template."
    )
    messages: list[Turn] = Field(
        default=[], max_length=1000, description="The turns before what it said, in the place of `prompt`."
    )
    tools: _Tools = []
    generation: str = Field(min_length=1, max_length=200_000, description="What it said.")


class GenerateRequest(_Shape):
    """A prompt, or several turns, to be answered by the model."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "Name a fruit.", "max_tokens": 40},
                {"messages": [{"role": "user", "content": "Name a fruit."}], "max_tokens": 40},
            ]
        },
    )

    prompt: str | None = Field(
        default=None, min_length=1, max_length=200_000, description="What to ask, before the template."
    )
    messages: list[Turn] = Field(
        default=[], max_length=1000, description="The turns to be answered, in the place of `prompt`."
    )
    tools: _Tools = []
    max_tokens: int = Field(default=128, ge=1, le=2048, description="Longest answer.")
    temperature: float = Field(
        default=0.0, ge=0.0, le=10.0, description="0 takes the most likely tokens; above, they are drawn."
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of what is drawn.")


class Generated(_Shape):
    """What the model said, and how."""

    prompt: str | None = None
    messages: list[Turn] | None = Field(default=None, description="Only where they were given: the turns before it.")
    generation: str
    max_tokens: int
    temperature: float
    seed: int


class IngestRequest(_Shape):
    """Records to be added."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"records": [{"id": "new-1", "instruction": "Name a fruit.", "output": "A pear."}]}]
        },
    )

    records: list[dict[str, Any]] = Field(min_length=1, max_length=100_000, description="As in a file of JSON lines.")
    split: str | None = Field(default=None, max_length=200)
    source: str | None = Field(default=None, max_length=200)
    on_bad_record: OnBadRecord = "stop"
    on_duplicate: OnDuplicate = "error"
    on_deleted: OnDeleted = "add"


class Seen(_Shape):
    """A sample as it was when somebody decided about it."""

    sample_id: str
    crc32: int = Field(
        ge=0, lt=2**32, description="CRC-32 of its prompt or nothing, a zero, and its response, in UTF-8."
    )


class ExportRequest(_Shape):
    """Which samples to write out as training data."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"without": ["demo-0003"], "where": "split = 'train'"},
                {"without": [{"sample_id": "demo-0003", "crc32": 1459025956}]},
            ]
        },
    )

    without: list[str | Seen] = Field(
        default=[],
        max_length=1_000_000,
        description="Ids of samples to leave out; or with a checksum of the texts meant: of others nothing is written.",
    )
    where: str | None = Field(default=None, max_length=10_000, description="SQL filter over those to write.")


_Piece = tuple[str, list[int]]
_Pieces = Annotated[
    list[_Piece] | None,
    Field(
        description="Only with `pieces=true`: the text in pieces, each with the numbers of the tokens it belongs to. "
        "One without text is what ends an answer that others follow."
    ),
]
_Ends = Annotated[
    list[int] | None,
    Field(description="Only with `pieces=true`: the tokens without any text at its end, as the end of sequence."),
]


class Told(_Shape):
    """One turn of a sample."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class SampleInPieces(StoredSample):
    """A sample, and where that was asked for, the pieces of its response, and its turns."""

    pieces: _Pieces = None
    ends: _Ends = None
    messages: Annotated[
        list[Told] | None,
        Field(
            description="Only with `pieces=true`: all turns of a conversation, as far as the stored texts show them; "
            "the last is an answer."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RankedInPieces(RankedSample):
    """One result, and where that was asked for, the pieces of its response."""

    pieces: _Pieces = None
    ends: _Ends = None


@dataclass(frozen=True, kw_only=True)
class RankingInPieces(Ranking):
    """A ranking, and where that was asked for, the pieces of its texts."""

    results: tuple[RankedInPieces, ...] | tuple[RankedToken, ...]
    harmful: tuple[RankedInPieces, ...] | tuple[RankedToken, ...] | None = None
    pieces: _Pieces = None
    ends: _Ends = None


class Info(_Shape):
    """What the database holds, and who serves it."""

    samples: int = Field(description="How many samples it holds.")
    tokens: int = Field(description="Response tokens of all samples.")
    width: int = Field(description="Length of a RapidGrad.")
    shuffles: int
    seed: int
    normalize: str = Field(description="layer or none")
    model: str = Field(description="As given when the database was made; of a folder, its path.")
    adapter: str | None
    table_version: int = Field(description="Grows with every commit.")
    indexes: list[IndexInfo] = Field(description="The built indexes.")
    bytes: int = Field(description="Size on disk, with indexes beside the tables.")
    token_gradients: int | None = Field(default=None, description="Tokens that have RapidGrads, where there are any.")
    token_width: int | None = Field(default=None, description="Length of those.")
    writable: bool = Field(description="Whether records may be added.")
    path: str = Field(description="Name of the database's folder.")
    identity: str = Field(description="What tells it from other databases, also from one made anew at its place.")


class Page(_Shape):
    """Some of the samples that match."""

    samples: list[StoredSample]
    total: int = Field(description="How many match.")
    offset: int
    limit: int


class Column(_Shape):
    """A column that a filter may use."""

    name: str
    type: str = Field(description="text, whole, number or truth")
    values: list[str | int | float | bool] | None = Field(description="All of its values, where there are few.")


class Detail(_Shape):
    """Why there is no answer."""

    detail: str


class Health(_Shape):
    """Whether the server is ready."""

    status: str = Field(description="ready, or not ready")
