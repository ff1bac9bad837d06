"""How likely a generation is for two models, token by token; prints itself as plain values."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rapidin_vdb.records import Focus


@dataclass(frozen=True, kw_only=True)
class ComparedToken:
    """One token of a generation, for two models."""

    text: str
    """The token's part of the generation; empty for what ends it."""
    start: int
    """First code point of the generation."""
    end: int
    """One past the last."""
    loss_before: float
    """Its cross-entropy for the database's model, in nats: minus the logarithm of its probability."""
    loss_after: float
    """The same for the other model."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How likely one generation is for a database's model, and for one that was trained anew."""

    query_id: str
    """Which query."""
    prompt: str | None
    """What was asked."""
    generation: str
    """What the model had said."""
    loss_before: float
    """Mean cross-entropy over the generation's tokens for the database's model, in nats."""
    loss_after: float
    """The same for the other model: higher where the generation is less likely by now."""
    change: float = dataclasses.field(init=False)
    """By how much the mean loss grew, in nats a token."""
    tokens: tuple[ComparedToken, ...]
    """The tokens that these are the means of: all, or those of the focus."""
    focus: tuple[Focus, ...] | None = None
    """The texts, or spans of code points, of the generation whose tokens alone were looked at."""
    answer: str | None = None
    """What the other model says to the prompt by now, where that was asked for."""
    answer_cut: bool = False
    """Whether the answer was cut to the tokens that it may have, and the model had not ended it."""
    truncated: bool = False
    """Whether the generation was cut to the database's `max_tokens`: what stands behind that was not looked at."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "change", self.loss_after - self.loss_before)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `compare --json` prints; what was not asked for is left out."""
        values = dataclasses.asdict(self)
        optional = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not optional[name]}
