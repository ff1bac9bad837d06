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
from rapidin_vdb.results import RankedSample, Ranking

_HERE = Path(__file__).parent


def render_page(rankings: Sequence[Ranking], *, title: str) -> str:
    """Return the page of some rankings whose results have token scores, and matrices if generations are to be clicked.

    `title` says what was asked, as the name of the database.
    """
    style, script = ((_HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
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


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


def _escaped(text: str) -> str:
    return "".join(f"&#{ord(character)};" if character in "<>&\"'" else character for character in text)


def _json(value: Any) -> str:
    # ASCII only, and without what could end or begin anything in HTML.
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _ranking(ranking: Ranking) -> dict[str, Any]:
    spans = ranking.generation_tokens or ()
    return {
        "query_id": ranking.query_id,
        "prompt": ranking.prompt,
        "generation": _pieces(ranking.generation or "", [(span.start, span.end) for span in spans]),
        "ends": [number for number, span in enumerate(spans) if span.start == span.end],
        "focus": list(ranking.focus or ()),
        "unit": ranking.score_unit,
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
        "metadata": dict(result.metadata),
        "prompt": result.prompt,
        "response": _pieces(result.response, [(token.start, token.end) for token in tokens]),
        "ends": [number for number, token in enumerate(tokens) if token.start == token.end],
        "scores": [token.score for token in tokens],
        "matrix": result.to_dict().get("matrix"),
    }


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[list[Any]]:
    return [[piece.text, list(piece.tokens)] for piece in pieces_of(text, spans)]
