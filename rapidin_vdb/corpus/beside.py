"""What a record says beside its conversation, and what stands before that: a field `system`, and `history`.

Conversations in ShareGPT's form have a `system` of their own, which is one of their turns.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rapidin_vdb.errors import is_unicode
from rapidin_vdb.records import Message, Sample

BESIDE = frozenset(("system", "history"))
"""Names of the fields."""
_FIRST = ("system", "developer")
"""The roles of turns in whose place a field `system` would stand."""
_MOST_NESTED = 3
"""In how many lists a text of a field is looked for: in pairs of a history, and in parts of what some write."""
_LABELS = frozenset(("role", "from", "type"))


def turns_beside(
    fields: Mapping[str, Any], turns: Sequence[Message], names: Collection[str] = BESIDE
) -> tuple[Message, ...]:
    """Return the turns that fields of some names make, which come before others: the system's, and earlier pairs.

    A text `system` makes one where the others begin with none of that role. `history` is a list of pairs, of what the
    user said and what the assistant did, oldest first, or such a list as JSON. What is neither makes no turn.

    >>> [turn.role for turn in turns_beside({"system": "Be kind.", "history": [["Hi", "Hello."]]}, [])]
    ['system', 'user', 'assistant']
    """
    system, found = fields.get("system"), tuple[Message, ...]()
    if "system" in names and isinstance(system, str) and system.strip():
        own = bool(turns) and turns[0].role in _FIRST
        found = () if own else (Message(role="system", content=system, place="system"),)
    return found + (_earlier(fields.get("history")) if "history" in names else ())


def is_beside(turn: Message, names: Collection[str]) -> bool:
    """Say whether a turn comes from fields of some names."""
    return turn.place.partition("[")[0] in names


def unwritten_fields(sample: Sample) -> list[str]:
    """Return which of the fields say something that is neither in a sample's prompt nor in its response.

    >>> fields = {"prompt": "Hi", "response": "Ho", "system": "Be kind."}
    >>> unwritten_fields(Sample(sample_id="a", prompt="Hi", response="Ho", split="train", source=None, fields=fields))
    ['system']
    """
    if BESIDE.isdisjoint(sample.fields):
        return []
    text = f"{sample.prompt or ''}\n{sample.response}"
    return [
        name
        for name in ("system", "history")
        if any(said.strip() not in text for said in _texts(_parsed(sample.fields.get(name))))
    ]


def _earlier(value: Any) -> tuple[Message, ...]:
    """Return the turns of a history; none where it is no list of pairs of texts."""
    pairs, turns = _parsed(value), []
    if not isinstance(pairs, list):
        return ()
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or [isinstance(said, str) and is_unicode(said) for said in pair] != [True, True]:
            return ()
        turns += [
            Message(role=role, content=said, place=f"history[{number}][{place}]")
            for place, (role, said) in enumerate(zip(("user", "assistant"), pair, strict=True))
        ]
    return tuple(turns)


def _parsed(value: Any) -> Any:
    """Return what a field holds; CSV has a list as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the texts of a field, of lists and objects in it too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([inner for name, inner in value.items() if name not in _LABELS], depth)
    elif isinstance(value, list) and depth < _MOST_NESTED:
        for inner in value:
            yield from _texts(inner, depth + 1)
