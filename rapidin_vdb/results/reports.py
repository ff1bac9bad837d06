"""What operations report, and what the table holds; each prints itself as plain values."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rapidin_vdb.records import Level, Scalar


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
class ReadRecords:
    """What an ingest finds in its files before the first gradient; what it did with it, or would do."""

    unchanged: int
    """Records whose samples were there already."""
    repeated: int
    """Records that others of these files repeat, id and content alike, and that were not there before."""
    kept: int
    """Records whose id stands for other content, which is kept (`--on-duplicate skip`)."""
    bad: tuple[str, ...]
    """One message for each record that cannot be stored."""
    truncated: int
    """Samples with more tokens than the database's `max_tokens`, of which only the first ones count."""
    earlier_turns: int
    """Samples with turns of the assistant before their response, which are read and have no gradient."""
    unwritten: int
    """Samples with a turn that the template does not write as it is, such as one of a role that it does not know."""
    first_unwritten: str
    """Where the first of these turns is; empty where there is none."""
    brought_back: int
    """Samples to be written that had been deleted before, by the last 32 deletions among the last 512 versions kept."""
    left_deleted: int
    """Records that are left out because their samples had been, under `on_deleted="skip"`."""
    mixed: Mapping[str, str]
    """New columns that hold text, though some of their values do not, and a place that shows it."""


@dataclass(frozen=True, kw_only=True)
class IngestReport(ReadRecords):
    """What an ingest did."""

    added: int
    """Samples written."""
    replaced: int
    """Samples that took the place of one with the same id."""
    tokens: int
    """Tokens of the samples that went through the model, prompts included."""
    token_gradients: int
    """Response tokens whose own RapidGrads were written."""
    seconds: float
    """In one process, loading the model apart; several load theirs meanwhile."""
    table_version: int
    """The table's version afterwards."""


@dataclass(frozen=True, kw_only=True)
class IngestEstimate(ReadRecords):
    """What an ingest would take."""

    samples: int
    """Samples to write."""
    tokens: int
    """Tokens of the samples to write, prompts included, padding not."""
    batches: int
    """Batches they make."""
    token_gradients: int
    """Response tokens whose own RapidGrads would be written."""
    bytes: int
    """What the database will grow by."""
    peak_memory: int
    """Bytes at the most, of the device or of this process, seen while a few batches were timed."""
    seconds: float
    """Expected from the timed batches, apart from loading the model, in each worker that is started."""


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
    """How many samples, or tokens, it holds."""
    table_version: int
    """The version of the table that it holds."""
    recall: Mapping[str, Any] | None
    """What a coarse index was measured to find of the best `at` samples, with `queries` of its own; None if exact.

    `recall` is the share of these, `recall_harmful` that of as many that are most negative, where it was measured.
    """
    level: Level = "sample"
    """What it holds: samples, or single tokens."""


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
    """As given at `init`; of a folder, its whole path then."""
    adapter: str | None
    """Likewise."""
    table_version: int
    """Grows with every commit."""
    indexes: tuple[IndexInfo, ...]
    """The built indexes."""
    bytes: int
    """Size on disk, indexes included that lie beside the tables; those of an object store lie on this machine."""
    token_gradients: int
    """Response tokens that have RapidGrads of their own."""
    token_width: int | None
    """Length of those; None where there are none."""
    columns: tuple[str, ...]
    """What a filter may use, with types; not in the JSON, whose fields are fixed."""
    made_with: Mapping[str, str | int | float]
    """What else was said at `init`, or followed from it; not in the JSON either."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `info --json` prints."""
        hidden = {"columns", "made_with"} | (set() if self.token_width else {"token_gradients", "token_width"})
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in hidden}


@dataclass(frozen=True, kw_only=True)
class KeptVersion:
    """A version of the table of samples that queries can be answered from (`as_of`)."""

    version: int
    """Its number."""
    made: datetime
    """When it was committed, in local time."""
    samples: int
    """How many samples it holds."""
    made_by: str
    """What its commit did, in a word, such as ingest, replace, delete, scalar index or columns; empty if not known."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without what made it."""
        return {"version": self.version, "made": self.made.isoformat(timespec="seconds"), "samples": self.samples}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    place: str
    """Which sample, token or index."""
    what: str
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class CleanReport:
    """What was written of some files."""

    written: int
    """Records written."""
    left_out: int
    """Records that were not."""
    not_found: int
    """Of the samples that were named, how many no record is of."""
    first_not_found: tuple[str, ...]
    """The ids of the first of them."""
    bad: tuple[str, ...]
    """One message for each record that cannot be one of a sample, and whether it was kept."""
    out: str
    """Where they were written."""
    deleted: int
    """With `absent`: how many of those left out are of samples that had been deleted."""
    changed: int
    """Records with the id of a sample to be left out, and another prompt or response than was scored under it."""
    never: int
    """With `absent`: records that are not in the database, and were not deleted as far as kept versions show it."""
    unscored: tuple[str, ...]
    """A message for each of these two kinds, with the first of its records, where there are any."""
    by_id_alone: int
    """Records left out by an id of which no sample is known, so that what they say could not be compared."""
    as_text: Mapping[str, int]
    """Columns with values that JSON cannot hold, such as times, and how many records have them as texts now."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found."""

    samples: int
    """Samples in the table."""
    tokens: int
    """Rows in the table of tokens."""
    findings: tuple[Finding, ...]
    """What is wrong, and cannot be mended from the rest."""
    mended: tuple[Finding, ...]
    """What was wrong with caches, and is mended."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `verify --json` prints."""
        return dataclasses.asdict(self)
