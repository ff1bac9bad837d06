"""Which tokens of a generation a question is about (the paper's Gamma(E), section 3.4)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.records import Encoded, Sample


def focus_of(query: Sample, given: Sequence[str]) -> tuple[str, ...]:
    """Return the texts that a query is about: those of its record's field `focus`, else those given for all.

    Raises:
        CorpusError: the field is neither a text nor a list of texts.
    """
    own: Any = query.fields.get("focus")
    if own is None:
        return tuple(given)
    texts = [own] if isinstance(own, str) else own
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise CorpusError(f"{query.location}: focus is {own!r}; wanted a text or a list of texts")
    return tuple(texts)


def focused(query: Sample, encoded: Encoded, texts: Sequence[str]) -> Encoded:
    """Return a query whose loss is the mean over the tokens of some texts' occurrences in the generation.

    Texts are found by their characters, so that they need not begin or end where tokens do: every token that shares a
    character with an occurrence counts.

    Raises:
        SpecError: a text is not in the generation, or only behind where it was cut.
    """
    if not texts:
        return encoded
    chosen: set[int] = set()
    for text in texts:
        spans = occurrences(query.response, text)
        if not spans:
            raise SpecError(
                f"--focus {text!r} is not in the generation of {query.sample_id}, which is: {query.response!r}"
            )
        found = {
            number
            for number, (start, end) in enumerate(encoded.offsets)
            if any(start < last and end > first for first, last in spans)
        }
        if not found:
            raise SpecError(
                f"--focus {text!r} is in the generation of {query.sample_id} only behind its first "
                f"{len(encoded.offsets)} tokens, where it was cut to the database's --max-tokens"
            )
        chosen |= found
    return dataclasses.replace(encoded, focus=tuple(sorted(chosen)))


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
