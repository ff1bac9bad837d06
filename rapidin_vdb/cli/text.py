"""Texts of records, made fit for a terminal."""

import unicodedata

from rapidin_vdb.pieces import pieces_of


def printable(text: str | None, *, lines: bool = False) -> str:
    """Show control characters instead of sending them to the terminal: a record may hold escape sequences."""
    return "".join(
        character if _harmless(character) or (lines and character == "\n") else repr(character)[1:-1]
        for character in text or ""
    )


def _harmless(character: str) -> bool:
    # Wide spaces, and what joins emoji or letters, are part of a text; what turns its direction is not shown as it is.
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def token_label(text: str, length: int) -> str:
    """Return the text of a token on one line, so that white space is seen; `(end)` for the end of the sample.

    >>> token_label(" the", 16), token_label(" ", 16), token_label("\\n\\n", 16), token_label("", 16)
    ('the', '␣', '\\\\n\\\\n', '(end)')
    """
    if text.strip():
        return cut(text, length)
    return fitted(text.replace(" ", "␣"), length) or "(end)"


def cut(text: str, length: int) -> str:
    """Return a text on one line, cut to a number of columns."""
    text = " ".join(text.split())
    shown = printable(text)
    return shown if columns(shown) <= length else fitted(text, length - 1) + "…"


def fitted(text: str, length: int, *, last: bool = False) -> str:
    """Return as much of the beginning of a text, or of its end, as some columns hold: no character in part.

    >>> fitted("a\\x1b[0m", 3), fitted("a\\x1b[0m", 5), fitted("a\\x1b[0m", 6, last=True)
    ('a', 'a\\\\x1b', '[0m')
    """
    some = text[-4 * length :] if last else text[: 4 * length]
    characters = [piece.text for piece in pieces_of(some, [(place, place + 1) for place in range(len(some))])]
    kept: list[str] = []
    for character in reversed(characters) if last else characters:
        shown = printable(character)
        length -= columns(shown)
        if length < 0:
            break
        kept.append(shown)
    return "".join(reversed(kept) if last else kept)


def columns(text: str) -> int:
    """Return how many columns a text takes at the most: terminals do not agree on what is joined."""
    from rich.cells import cell_len

    return max(len(text), cell_len(text))


def padded(text: str, length: int) -> str:
    """Return a text with spaces up to a number of columns."""
    return text + " " * (length - columns(text))
