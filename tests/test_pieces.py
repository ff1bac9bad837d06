"""Texts cut for showing: nothing is lost, and nothing that is seen as one is split."""

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from rapidin_vdb.focus import occurrences
from rapidin_vdb.pieces import pieces_of

TEXTS = (
    "plain words",
    "grün 黄 e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
    "a\r\n\tb  ",
    "👍🏽!",
    "한국어 \u1112\u1161\u11ab",
    "",
    "\x1b[31m<script>",
)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_cover_the_text(text):
    encoding = byte_tokenizer()(text, return_offsets_mapping=True)
    spans = [tuple(span) for span in encoding["offset_mapping"]]
    pieces = pieces_of(text, spans)
    assert "".join(piece.text for piece in pieces) == text
    for number, (start, end) in enumerate(spans):
        inside = "".join(piece.text for piece in pieces if number in piece.tokens)
        assert text[start:end] in inside


@given(st.text(max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_any_spans(text, spans):
    spans = [(min(a, b, len(text)), min(max(a, b), len(text))) for a, b in spans]
    pieces = pieces_of(text, spans)
    assert "".join(piece.text for piece in pieces) == text
    place = 0
    for piece in pieces:
        end = place + len(piece.text)
        assert piece.tokens == tuple(n for n, (a, b) in enumerate(spans) if a < b and a < end and b > place)
        place = end


@pytest.mark.parametrize(
    "whole", ["e\u0301", "\U0001f468\u200d\U0001f469", "\U0001f1e9\U0001f1ea", "👍🏽", "\r\n", "❤\ufe0f"]
)
def test_what_is_seen_as_one_stays_one(whole):
    text = f"a{whole}b"
    spans = [(place, place + 1) for place in range(len(text))]
    assert [piece.text for piece in pieces_of(text, spans)] == ["a", whole, "b"]


def test_flags_are_pairs():
    text = "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7"
    assert [piece.text for piece in pieces_of(text, [(n, n + 1) for n in range(4)])] == [text[:2], text[2:]]


@given(st.text(alphabet="ab", max_size=12), st.text(alphabet="ab", min_size=1, max_size=3))
def test_occurrences(text, part):
    wanted = [(n, n + len(part)) for n in range(len(text)) if text[n : n + len(part)] == part]
    assert occurrences(text, part) == wanted
