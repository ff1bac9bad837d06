"""Texts of records, made fit for a terminal."""

import unicodedata


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
    return printable(text.replace(" ", "␣"))[:length] or "(end)"


def cut(text: str, length: int) -> str:
    """Return a text on one line, cut to a length."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"
