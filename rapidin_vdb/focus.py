"""Which tokens of a generation a question is about (the paper's Gamma(E), section 3.4)."""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.records import Encoded, Focus, Sample

_WANTED = "wanted a text of the generation, or a list of texts or of spans, [start, end]"


def check_focus(entries: Sequence[Any]) -> None:
    """See that all entries are texts, or spans of code points.

    Raises:
        SpecError: one is not, or is empty.
    """
    for entry in entries:
        if entry == "":
            raise SpecError("--focus is empty; give a text that is in the generation")
        if not isinstance(entry, str) and not _is_span(entry):
            raise SpecError(f"focus has {entry!r}; {_WANTED}")


def focus_of(query: Sample, given: Sequence[Focus]) -> tuple[Focus, ...]:
    """Return what a query is about: what its record's field `focus` names, else what is given for all.

    Raises:
        CorpusError: the field is neither a text nor a list of texts and spans, or one of them is empty.
    """
    own: Any = query.fields.get("focus")
    if own is None:
        return tuple(given)
    entries = [own] if isinstance(own, str) else own
    if not isinstance(entries, list | tuple):
        raise CorpusError(f"{query.location}: focus is {own!r}; {_WANTED}")
    try:
        check_focus(entries)
    except SpecError as error:
        raise CorpusError(f"{query.location}: {error}") from None
    return tuple(entry if isinstance(entry, str) else (entry[0], entry[1]) for entry in entries)


def focused(query: Sample, encoded: Encoded, entries: Sequence[Focus]) -> Encoded:
    """Return a query whose loss is the mean over the tokens of some texts' occurrences, or of spans, in the generation.

    They are found by their characters, so that they need not begin or end where tokens do: every token that shares a
    character with one counts. An empty span stands for the tokens of no text there, as the end of the sequence.

    Raises:
        SpecError: a text is not in the generation, a span goes beyond it, or no token that carries a loss stands there:
            because the generation was cut before, or because a token that begins in the prompt has it.
    """
    if not entries:
        return encoded
    chosen: set[int] = set()
    for entry in entries:
        spans = _spans_of(query, entry)
        found = _tokens_of(spans, encoded)
        if not found:
            raise SpecError(f"--focus {_said(entry)}{_why_none(query, encoded, spans)}")
        chosen |= found
    return dataclasses.replace(encoded, focus=tuple(sorted(chosen)))


def _why_none(query: Sample, encoded: Encoded, spans: Sequence[tuple[int, int]]) -> str:
    """Say why none of a generation's tokens stands at some spans of it."""
    generation, first, last = f"the generation of {_named(query)}", encoded.offsets[0][0], encoded.offsets[-1][1]
    if encoded.truncated and all(start >= last for start, _ in spans):
        return (
            f" is in {generation} only behind its first {len(encoded.offsets)} tokens, where it was cut to the "
            "database's --max-tokens"
        )
    if not any(start < min(first, end) for start, end in spans):
        return f": no token of {generation} stands there"
    # The first of all ids is predicted from nothing; else it is the prompt's last that goes on into the generation.
    where = (
        "the very first of all, which nothing predicts" if encoded.place(0) == 1 else "one that begins in the prompt"
    )
    return (
        f" belongs to a token of {generation} that has no loss of its own: {where}. The first token with a loss "
        f"begins at character {first} of: {query.response!r}"
    )


def _spans_of(query: Sample, entry: Focus) -> list[tuple[int, int]]:
    if isinstance(entry, str):
        spans = occurrences(query.response, entry)
        if not spans:
            raise SpecError(
                f"--focus {entry!r} is not in the generation of {_named(query)}, which is: {query.response!r}"
                f"{_seen_otherwise(entry, query.response)}"
            )
        return spans
    if not 0 <= entry[0] <= entry[1] <= len(query.response):
        raise SpecError(
            f"--focus {_said(entry)} is no span of the generation of {_named(query)}, which has "
            f"{len(query.response)} characters"
        )
    return [entry]


def _seen_otherwise(entry: str, text: str) -> str:
    """Say what in a text looks like one that is not in it."""
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        other = unicodedata.normalize(form, entry)
        if other != entry and other in text:
            return f". It is there in another Unicode form, {form}: {other!a} instead of {entry!a}"
    found = re.search(re.escape(entry), text, re.IGNORECASE)
    if found:
        return f". It is there with other letter case: {found[0]!r}"
    if _folded(entry) in _folded(text):
        return f". It is there in another Unicode form or letter case than {entry!a}: copy it from there"
    return ""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _named(query: Sample) -> str:
    """Name a query, and where it was read."""
    return f"{query.sample_id} ({query.location})" if query.location not in ("", query.sample_id) else query.sample_id


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
