"""Every noun that travels between modules: frozen, plain Python values, no verbs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scalar = str | int | float | bool | None
Normalize = Literal["layer", "none"]
Quantization = Literal["none", "nf4", "int8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
OnBadRecord = Literal["stop", "skip"]
OnDuplicate = Literal["skip", "replace", "error"]
OnDeleted = Literal["add", "skip"]
OnUnscored = Literal["stop", "keep", "leave-out"]
Aggregate = Literal["sum", "mean"]
Level = Literal["sample", "token"]
ProfileName = Literal["quick", "full", "gpu"]
Turns = Literal["last", "all"]
LOSSES: Mapping[Turns, str] = {
    "last": "mean cross-entropy over the response tokens",
    "all": "mean cross-entropy over the tokens of all turns of the assistant",
}
"""What a fingerprint says of the loss, by which of the assistant's turns have one."""

OWN_COLUMNS = frozenset(
    "sample_id split source prompt response input_ids token_offsets tokens truncated loss content_hash "
    "checksum vector rank score exact_score query_id".split()
)
"""Names that mean something of ours; a record's field of that name is stored as `record_NAME`."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant`, or whatever else its record calls it, such as `tool`."""
    content: str
    """What was said."""
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the turn holds, such as calls of tools."""
    place: str = field(default="", compare=False)
    """Where in its record it stands, for messages."""


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
    turns: tuple[Message, ...] = ()
    """The turns that the response is made of, where it has several answers, or one that says more than its content; the
    first and the last are answers."""
    behind: tuple[Message, ...] = ()
    """The turns behind the response: they have no loss, but a template may write the response otherwise for them."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The record as it was read, for Jinja templates."""
    content_hash: str = ""
    """Hash of the record as it was read, with split and source; tells two records of the same id apart."""
    location: str = ""
    """File and line, for messages."""


Focus = str | tuple[int, int]
"""What a question is about: a text of the generation, wherever it stands, or a half-open span of its code points."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as token ids, its prompt masked."""

    sample_id: str
    """The sample's."""
    input_ids: tuple[int, ...]
    """Prompt, response and end-of-sequence token, in order."""
    offsets: tuple[tuple[int, int], ...]
    """Half-open spans, in code points of the response, of its tokens: the last `len(offsets)` ids, unless `places`."""
    truncated: bool
    """Whether ids were cut from the right to respect `max_tokens`."""
    focus: tuple[int, ...] | None = None
    """Which response tokens carry loss, by their number from 0; None for all (the paper's Gamma(E))."""
    places: tuple[int, ...] | None = None
    """Where the response tokens stand among the ids, ascending, where other turns stand between them."""
    response: str | None = None
    """The response that offsets are of, where a template wrote what it says beside its contents, such as tool calls.

    Set, too, where turns from a field `system` or `history` were written.
    """
    unwritten: str = ""
    """Which turn is not among the ids as it is, if any: a template may leave out roles that it does not know."""

    @property
    def response_tokens(self) -> int:
        """How many tokens the response has (the paper's G)."""
        return len(self.offsets)

    @property
    def loss_tokens(self) -> tuple[int, ...]:
        """The response tokens that carry loss, by their number from 0."""
        return tuple(range(len(self.offsets))) if self.focus is None else self.focus

    @property
    def loss_places(self) -> tuple[int, ...]:
        """Where those tokens stand among the ids; the logits before each predict it."""
        # Asked for in every batch: not by `place`, one by one.
        if self.places is not None:
            return tuple(self.places[number] for number in self.loss_tokens)
        first = len(self.input_ids) - len(self.offsets)
        return tuple(first + number for number in self.loss_tokens)

    def place(self, number: int) -> int:
        """Return where a response token stands among the ids.

        >>> Encoded(sample_id="a", input_ids=(1, 2, 3), offsets=((0, 1), (1, 2)), truncated=False).place(0)
        1
        """
        return len(self.input_ids) - len(self.offsets) + number if self.places is None else self.places[number]


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
    def turns(self) -> Turns:
        """Which turns of the assistant are the response of a conversation."""
        return "all" if self.loss == LOSSES["all"] else "last"

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What was said at `init`, or followed from it, besides the model and the sketch."""
        return {
            "parameters": self.parameters, "coordinates": self.gradient_length, "dtype": self.dtype,
            "quantization": self.quantization, "template": self.template, "turns": self.turns,
            "max_tokens": self.max_tokens,
            "epochs": self.epochs, "learning_rate": self.learning_rate,
        }  # fmt: skip

    @property
    def gradient_length(self) -> int:
        """Number of coordinates of a gradient (the paper's D, before padding)."""
        return sum(shape.count for shape in self.theta)
