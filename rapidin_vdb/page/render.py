"""One self-contained HTML page of rankings, in the form of the paper's Figure 4.

Texts of records never become markup: they travel as JSON inside a data block, in which no character that HTML knows is
left, and the page's script puts them in place as text. Nothing but that script may run, and nothing is loaded.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapidin_vdb.pieces import pieces_of
from rapidin_vdb.records import Message, Scalar
from rapidin_vdb.results import RankedSample, Ranking, Span, StoredSample, TokenScore

_HERE = Path(__file__).parent


def render_page(rankings: Sequence[Ranking], *, title: str) -> str:
    """Return the page of some rankings whose results have token scores, and matrices if generations are to be clicked.

    `title` says what was asked, as the name of the database.
    """
    style = page_style()
    script = heat_script() + (_HERE / "page.js").read_text("utf-8")
    parts = {
        "TITLE": _escaped(f"rapidin-vdb: {title}"),
        "POLICY": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _json({"title": title, "rankings": [_ranking(ranking) for ranking in rankings]}),
    }
    page = (_HERE / "page.html").read_text("utf-8")
    before, *fields = page.split("{{")
    return before + "".join(parts[name] + after for name, after in (field.split("}}", 1) for field in fields))


def heat_script() -> str:
    """Return the script that shows texts whose tokens carry numbers."""
    return (_HERE / "heat.js").read_text("utf-8")


def page_style() -> str:
    """Return the style of the page, and of such texts."""
    return (_HERE / "page.css").read_text("utf-8")


def with_pieces(ranking: Ranking) -> dict[str, Any]:
    """Return a ranking's plain values, with each text in the pieces that can be coloured beside.

    A piece is a text and the numbers of the tokens that it belongs to; one without text is what ends an answer that
    others follow. `ends` are the tokens without any text at the end.
    """
    values, spans = ranking.to_dict(), ranking.generation_tokens or ()
    if ranking.generation_tokens is not None:
        said = ranking.generation or ""
        values |= {"pieces": _pieces(said, _spans(spans)), "ends": _ends(said, _spans(spans))}
    for end in ("results", "harmful"):
        for result, shown in zip(getattr(ranking, end) or (), values.get(end, ()), strict=True):
            if isinstance(result, RankedSample):
                own = _spans(result.tokens or ())
                shown |= {"pieces": _pieces(result.response, own), "ends": _ends(result.response, own)}
    return values


def sample_pieces(sample: StoredSample, turns: Sequence[Message] = ()) -> dict[str, Any]:
    """Return a sample's plain values, with its response in pieces beside, as of a ranking, and its turns if any."""
    spans = sample.token_offsets
    said = [{"role": turn.role, "content": turn.content} for turn in turns]
    beside = {"pieces": _pieces(sample.response, spans), "ends": _ends(sample.response, spans)}
    return sample.to_dict() | beside | {"messages": said or None}


def _spans(tokens: Sequence[Span | TokenScore]) -> list[tuple[int, int]]:
    return [(token.start, token.end) for token in tokens]


def _ends(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    return [number for number, span in enumerate(spans) if span == (len(text), len(text))]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


def _escaped(text: str) -> str:
    return "".join(f"&#{ord(character)};" if character in "<>&\"'" else character for character in text)


def _json(value: Any) -> str:
    # ASCII only, and without what could end or begin anything in HTML.
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _ranking(ranking: Ranking) -> dict[str, Any]:
    spans, said = _spans(ranking.generation_tokens or ()), ranking.generation or ""
    return {
        "query_id": ranking.query_id,
        "prompt": ranking.prompt,
        "generation": _pieces(said, spans),
        "ends": _ends(said, spans),
        "focus": list(ranking.focus or ()),
        "unit": ranking.score_unit,
        "error": ranking.score_error,
        "note": ranking.note,
        "table_version": ranking.table_version,
        "identity": ranking.identity,
        "searched": ranking.searched,
        "where": ranking.where,
        "results": [_result(result) for result in ranking.results if isinstance(result, RankedSample)],
        "harmful": [_result(result) for result in ranking.harmful or () if isinstance(result, RankedSample)],
    }


def _result(result: RankedSample) -> dict[str, Any]:
    tokens = result.tokens or ()
    return {
        "rank": result.rank,
        "sample_id": result.sample_id,
        "score": result.score,
        "exact_score": result.exact_score,
        "split": result.split,
        "source": result.source,
        "metadata": {name: _shown(value) for name, value in result.metadata.items()},
        "prompt": result.prompt,
        "response": _pieces(result.response, _spans(tokens)),
        "ends": _ends(result.response, _spans(tokens)),
        "scores": [token.score for token in tokens],
        "matrix": result.rounded_matrix,
    }


def _shown(value: Scalar) -> Scalar:
    """Return what a script can show as it is: its numbers have 53 bits."""
    return str(value) if isinstance(value, int) and abs(value) > 1 << 53 else value


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """Return the pieces of a text, those without text among them where an answer ends before the end of it."""
    ended: dict[int, list[int]] = {}
    for number, (start, end) in enumerate(spans):
        if start == end < len(text):
            ended.setdefault(start, []).append(number)
    pieces: list[list[Any]] = []
    place = 0
    for piece in pieces_of(text, spans):
        for start in sorted(start for start in ended if start <= place):
            pieces.append(["", ended.pop(start)])
        pieces.append([piece.text, list(piece.tokens)])
        place += len(piece.text)
    return pieces + [["", numbers] for _, numbers in sorted(ended.items())]
