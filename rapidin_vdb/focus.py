"""Which tokens of a generation a question is about (the paper's Gamma(E), section 3.4)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.records import Encoded, Focus, Sample


def focus_of(query: Sample, given: Sequence[Focus]) -> tuple[Focus, ...]:
    """Return what a query is about: what its record's field `focus` names, else what is given for all.

    Raises:
        CorpusError: the field is neither a text nor a list of texts and spans.
    """
    own: Any = query.fields.get("focus")
    if own is None:
        return tuple(given)
    entries = [own] if isinstance(own, str) else own
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) or _is_span(entry) for entry in entries):
        raise CorpusError(f"{query.location}: focus is {own!r}; wanted a text or a list of texts, or of [start, end]")
    return tuple(entry if isinstance(entry, str) else (entry[0], entry[1]) for entry in entries)


def focused(query: Sample, encoded: Encoded, entries: Sequence[Focus]) -> Encoded:
    """Return a query whose loss is the mean over the tokens of some texts' occurrences, or of spans, in the generation.

    They are found by their characters, so that they need not begin or end where tokens do: every token that shares a
    character with one counts. An empty span stands for the tokens of no text there, as the end of the sequence.

    Raises:
        SpecError: a text is not in the generation, a span goes beyond it, or it is only behind where it was cut.
    """
    if not entries:
        return encoded
    chosen: set[int] = set()
    for entry in entries:
        found = _tokens_of(_spans_of(query, entry), encoded)
        if not found:
            raise SpecError(
                f"--focus {_said(entry)} is in the generation of {query.sample_id} only behind its first "
                f"{len(encoded.offsets)} tokens, where it was cut to the database's --max-tokens"
                if isinstance(entry, str) or encoded.truncated
                else f"--focus {_said(entry)}: no token of the generation of {query.sample_id} stands there"
            )
        chosen |= found
    return dataclasses.replace(encoded, focus=tuple(sorted(chosen)))


def _spans_of(query: Sample, entry: Focus) -> list[tuple[int, int]]:
    if isinstance(entry, str):
        spans = occurrences(query.response, entry)
        if not spans:
            raise SpecError(
                f"--focus {entry!r} is not in the generation of {query.sample_id}, which is: {query.response!r}"
            )
        return spans
    if not 0 <= entry[0] <= entry[1] <= len(query.response):
        raise SpecError(
            f"--focus {_said(entry)} is no span of the generation of {query.sample_id}, which has "
            f"{len(query.response)} characters"
        )
    return [entry]


def _tokens_of(spans: Sequence[tuple[int, int]], encoded: Encoded) -> set[int]:
    return {
        number
        for number, (start, end) in enumerate(encoded.offsets)
        if any((start < last and end > first) or first == start == end == last for first, last in spans)
    }


def _said(entry: Focus) -> str:
    return repr(entry) if isinstance(entry, str) else f"[{entry[0]}, {entry[1]}]"


def _is_span(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in entry)
    )


def occurrences(text: str, part: str) -> list[tuple[int, int]]:
    """Return where a part stands in a text, overlapping occurrences too; an empty part is nowhere.

    >>> occurrences("banana", "ana")
    [(1, 4), (3, 6)]
    """
    found, start = [], text.find(part) if part else -1
    while start >= 0:
        found.append((start, start + len(part)))
        start = text.find(part, start + 1)
    return found
