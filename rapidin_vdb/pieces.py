"""A text cut where its tokens are, to be shown in colours: no piece begins inside what is seen as one."""

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A run of text."""

    text: str
    """As it stands."""
    tokens: tuple[int, ...]
    """The tokens that share a character with it, by number; none for text that no token covers."""


def pieces_of(text: str, spans: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """Cut a text at the borders of its tokens' half-open spans, in code points; together they are the whole text.

    Several tokens share a piece where they share a character, as the bytes of an emoji do, or where a border would
    split what is seen as one, as a letter from its accent. Tokens of no text are in no piece.

    >>> [(piece.text, piece.tokens) for piece in pieces_of("né e", [(0, 1), (1, 2), (1, 2), (3, 4)])]
    [('n', (0,)), ('é', (1, 2)), (' ', ()), ('e', (3,))]
    """
    borders = {0, len(text)} | {border for span in spans if span[0] < span[1] for border in span}
    cuts = sorted(border for border in borders if border in (0, len(text)) or not _joined(text, border))
    pieces, first = [], 0
    order = sorted((start, end, number) for number, (start, end) in enumerate(spans) if start < end)
    for start, end in itertools.pairwise(cuts):
        while first < len(order) and order[first][1] <= start:
            first += 1
        inside = []
        for place in range(first, len(order)):
            begin, last, number = order[place]
            if begin >= end:
                break
            if last > start:
                inside.append(number)
        pieces.append(Piece(text[start:end], tuple(sorted(inside))))
    return tuple(pieces)


def _joined(text: str, border: int) -> bool:
    """Say whether the code points around a border are seen as one character."""
    before, after = text[border - 1], text[border]
    if unicodedata.category(after).startswith("M") or "\u200d" in (before, after) or before + after == "\r\n":
        return True
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\u1160" <= after <= "\u11ff" or "\U000e0020" <= after <= "\U000e007f":
        return True  # skin tones, the later parts of a Hangul syllable, tags of a flag
    if not (_regional(before) and _regional(after)):
        return False
    # Flags are pairs: a border between two of them is none.
    run = 0
    while run < border and _regional(text[border - 1 - run]):
        run += 1
    return run % 2 == 1


def _regional(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
