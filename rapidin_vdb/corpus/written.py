"""A sample as the text that a model is trained on, and where its answers stand in it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rapidin_vdb.records import Message

# Stands for an answer, to see what a chat template writes around it.
_MARK = "\ue0a1response\ue0a2"


@dataclass(frozen=True)
class Answer:
    """One answer of a response that is made of several turns."""

    start: int
    """Where it begins in the text."""
    stop: int
    """Where it ends."""
    end: int
    """Where that ends with which the template ends it."""
    place: int
    """Where what stands at its start stands in the response."""


@dataclass(frozen=True)
class Written:
    """A sample as one text."""

    text: str
    """Prompt, response, and what ends it where the template writes that."""
    start: int
    """Where the response begins in it, or its last answer."""
    response: str
    """That as it stands there: a template may leave out spaces around it."""
    left_out: int = 0
    """How many code points of the response are before what stands there."""
    special: bool = True
    """Whether the tokenizer's own tokens, such as that of the beginning of a sequence, are to be added."""
    ended: bool = False
    """Whether what ends the response is part of the text; else the end-of-sequence token is to follow."""
    earlier: tuple[Answer, ...] = ()
    """The answers before the last, in order, where the response has several."""
    said: str | None = None
    """All of the response, where answers say more than their contents."""


def mark_unlike(turns: Sequence[Message]) -> str:
    """Return a text that is in none of the turns."""
    texts = [turn.content for turn in turns]
    texts += [json.dumps(dict(turn.more), ensure_ascii=False, default=str) for turn in turns if turn.more]
    mark = _MARK
    while any(mark in text for text in texts):
        mark += _MARK
    return mark
