"""Texts of records, made fit for a terminal."""


def printable(text: str | None, *, lines: bool = False) -> str:
    """Show control characters instead of sending them to the terminal: a record may hold escape sequences."""
    return "".join(
        character if character.isprintable() or (lines and character == "\n") else repr(character)[1:-1]
        for character in text or ""
    )


def cut(text: str, length: int) -> str:
    """Return a text on one line, cut to a length."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"
