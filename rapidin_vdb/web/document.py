"""What the OpenAPI document says of answers: their shapes, examples, events and refusals."""

from typing import Any

from rapidin_vdb.web import shapes

Responses = dict[int | str, dict[str, Any]]

EXPORTED: Responses = {
    200: {
        "description": "The records, in the table's order.",
        "content": {
            "application/x-ndjson": {
                "schema": {"type": "string"},
                "example": '{"id": "demo-0001", "split": "train", "prompt": "Name a fruit.", "response": "A pear."}\n',
            },
            "text/event-stream": {
                "schema": {
                    "type": "string",
                    "description": "Events, as of a query: "
                    "`progress`; then the records in some `part`s, each a text of whole lines; then `result`, with how "
                    "many `records` there are and how many `inexact_records`, as in the headers, and how many samples "
                    "are `matching` the filter, those left out among them. Or `error` at any time.",
                },
                "example": (
                    'event: progress\ndata: {"stage": "records", "done": 500, "total": 1000}\n\n'
                    'event: part\ndata: "{\\"id\\": \\"demo-0001\\"}\\n"\n\n'
                    'event: result\ndata: {"records": 1, "inexact_records": 0, "matching": 2}\n\n'
                ),
            },
        },
        "headers": {
            "x-records": {
                "description": "How many there are. Only with JSON lines.",
                "required": False,
                "schema": {"type": "integer"},
            },
            "x-inexact-records": {
                "description": "How many of them are not, for sure, what was ingested: a database keeps the "
                "conversation as text and the simple fields, no lists or objects. The others have the same fields and "
                "values, if in another order. Only with JSON lines.",
                "required": False,
                "schema": {"type": "integer"},
            },
        },
    }
}
EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "Events: `progress`, as often as there "
            "is any; then either `result`, with what the JSON answer would have been, or `error`, whose data has "
            "`detail` and `status`, which the JSON answer would have had (as below, or 500 where something "
            "went wrong in the server). Once they have begun the status is 200, whatever "
            "becomes of the request. A stream that ends with neither was broken off.",
        },
        "example": (
            'event: progress\ndata: {"stage": "gradients", "done": 1, "total": 1}\n\n'
            'event: result\ndata: {"query_id": "query"}\n\n'
        ),
    }
}
_SAMPLE = {
    "sample_id": "demo-0001", "split": "train", "source": "forum", "prompt": "Name a fruit.", "response": "A pear.",
    "token_offsets": [[0, 1], [1, 6], [6, 7], [7, 7]], "tokens": 4, "truncated": False, "loss": 1.25,
    "metadata": {"stars": 4},
}  # fmt: skip
_RANKED = {
    "rank": 1, "sample_id": "demo-0001", "score": 3.5, "exact_score": None, "split": "train", "source": "forum",
    "prompt": "Name a fruit.", "response": "A pear.", "metadata": {"stars": 4}, "tokens": None,
}  # fmt: skip
EXAMPLES: dict[str, Any] = {
    "ranking": {
        "query_id": "query", "score_unit": "epochs * learning_rate * inner product of RapidGrads (Eq. 5)",
        "searched": 1000, "where": "split = 'train'",
        "seconds": {"gradient": 0.02, "search": 0.01, "tokens": 0.0, "total": 0.03},
        "results": [_RANKED], "score_error": 0.36, "table_version": 7,
        "identity": "0f8fad5bd9cb469fa16570867728950e",
    },
    "sample": _SAMPLE,
    "page": {"samples": [_SAMPLE], "total": 1, "offset": 0, "limit": 50},
    "generated": {"prompt": "Name a fruit.", "generation": "A comet.", "max_tokens": 40, "temperature": 0.0, "seed": 0},
    "ingested": {
        "added": 1, "replaced": 0, "unchanged": 0, "repeated": 0, "kept": 0, "bad": [], "truncated": 0,
        "earlier_turns": 0, "unwritten": 0, "first_unwritten": "", "brought_back": 0, "left_deleted": 0,
        "mixed": {}, "tokens": 9, "token_gradients": 0,
        "seconds": 0.2, "table_version": 7,
    },
    "columns": [
        {"name": "source", "type": "text", "values": ["forum", "quiz"]},
        {"name": "stars", "type": "whole", "values": [1, 2, 3]},
    ],
    "info": {
        "samples": 1000, "tokens": 17000, "width": 4096, "shuffles": 20, "seed": 42, "normalize": "layer",
        "model": "model", "adapter": "adapter", "table_version": 7, "indexes": [], "bytes": 9000000,
        "writable": False, "path": "db", "identity": "0f8fad5bd9cb469fa16570867728950e",
    },
    "health": {"status": "ready"},
}  # fmt: skip
_REFUSALS = {
    400: "The request cannot be honoured; `detail` says why.",
    401: "The token is missing or wrong.",
    403: "The request comes from another site's page, or the server is read-only.",
    404: "There is no such sample.",
    409: "Another database is served here than the one that the request is for.",
    408: "The body did not arrive in time.",
    413: "The request is too large.",
    415: "The request is not JSON.",
    421: "The host is not served here.",
    500: "The database or the model cannot be read, or something went wrong in the server.",
    503: "Too many requests are waiting, the server is stopping, a purge or another writer came between, or something "
    "else takes the memory; try again.",
    504: "The request took too long.",
    507: "There is no room on the server's disk.",
}


_DETAIL = shapes.Detail.model_json_schema()


def documented(shape: Any, example: str | None = None, content: dict[str, Any] | None = None) -> Responses:
    """Return the document of an answer: its shape, an example of it, and other forms that it can take."""
    forms: dict[str, Any] = {} if example is None else {"application/json": {"example": EXAMPLES[example]}}
    return {200: ({} if shape is None else {"model": shape}) | {"content": forms | (content or {})}}


def refusals(*statuses: int) -> Responses:
    """Return the document of what is answered instead, besides what can happen to any request."""
    return {
        # Their form is said, too: it is JSON whatever the answer would have been.
        status: {"description": _REFUSALS[status], "content": {"application/json": {"schema": _DETAIL}}}
        for status in (401, 403, 421, 500, *statuses)
    }


def add_security(document: dict[str, Any], *, asked_for: bool) -> dict[str, Any]:
    """Return the document with the token in it, as one that this server asks for, or does not."""
    schemes = {"token": {"type": "http", "scheme": "bearer", "description": "The --token of the server."}}
    paths = {
        path: {
            method: one | ({"security": [{"token": []}]} if asked_for and guarded(path) else {})
            for method, one in operations.items()
        }
        for path, operations in document["paths"].items()
    }
    return document | {"paths": paths, "components": document["components"] | {"securitySchemes": schemes}}


def guarded(path: str) -> bool:
    """Say whether a path is answered only to who knows the token, where there is one."""
    return path.startswith(("/api/", "/metrics"))
