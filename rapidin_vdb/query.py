"""Queries are read, encoded, and turned into RapidGrads by the road that samples take."""

import difflib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rapidin_vdb.corpus import Template, Tokenizer, as_written, encode, read_records, sample_from
from rapidin_vdb.corpus.files import Record
from rapidin_vdb.corpus.shapes import PROMPTS, RESPONSES, TURNS, asked_fields, check_shape
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.focus import focus_of, focused
from rapidin_vdb.gradient import RapidGradMaker
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded, Focus, Sample

_OPTIONS = ("focus", "query_id", "generation", "tools")
# What is asked for over HTTP with each query. Others of these options are also what fields of records are called.
_FOR_ALL = ("where", "top_k", "refine", "group_by", "as_of")
# How like one of them a name has to be to be taken for it, misspelt: `focsu` is, `query` is not.
_NEAR = 0.8
_SHAPES = (
    "prompt and generation, or another shape of records (instruction/input/output, messages, conversations, or text)"
)


@dataclass(frozen=True, kw_only=True)
class Sketched:
    """The RapidGrads of some queries."""

    query_ids: tuple[str, ...]
    """Their names."""
    vectors: np.ndarray
    """float32 [queries, width]."""
    seconds: tuple[float, ...]
    """How long each took."""
    focus: tuple[tuple[Focus, ...], ...]
    """The texts and spans that each is about; none for the whole generation."""
    looked_at: tuple[int | None, ...] = ()
    """Of each generation that was cut, how many of its tokens have a part in the scores; None where that is all."""


def query_from(
    prompt: str | None, generation: str, *, query_id: str = "query", messages: Sequence[Mapping[str, Any]] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> Sample:  # fmt: skip
    """Return the query of one prompt and generation; without a prompt, all of the text is generation.

    In the place of a prompt there may be several turns, each with `role` and `content`, as in records. `tools` are
    those that the model could call, for chat templates that write them.

    >>> query_from(None, "A pear.", messages=[{"role": "user", "content": "Name a fruit."}]).prompt
    'Name a fruit.'

    Raises:
        CorpusError: the generation is empty, or the last of the turns, or a turn has no such texts.
        SpecError: there are both a prompt and turns, or tools and neither.
    """
    if messages and prompt is not None:
        raise SpecError("a query has a prompt, or messages before its generation; give one of both")
    if tools and not messages and prompt is None:
        raise SpecError(
            "tools are given without a prompt or messages: no chat template writes them; give what was asked"
        )
    fields = asked_fields(prompt, generation, messages, tools) | {"id": query_id}
    return _said_once(sample_from(Record(location=query_id, fields=fields)))


def queries_of(
    prompt: str | None, generation: str | None, *, file: str | Path | None, queries: Iterable[Sample] | None
) -> list[Sample]:
    """Return the queries of one prompt and generation, of a file, or those that are given.

    Raises:
        CorpusError: a query cannot be read.
        SpecError: not one kind of query is given, or some are no queries.
    """
    if (generation is not None) + (file is not None) + (queries is not None) != 1 or (
        prompt is not None and generation is None
    ):
        raise SpecError("give one of: --prompt and --generation, or --file QUERIES.jsonl")
    if generation is not None:
        return [query_from(prompt, generation)]
    if isinstance(queries, Sample):
        raise SpecError("queries is one query; wanted a list: queries=[...]")
    found = read_queries(Path(file)) if file is not None else [] if queries is None else list(queries)
    wrong = next((query for query in found if not isinstance(query, Sample)), None)
    if wrong is not None:
        raise SpecError(f"one of the queries is of type {type(wrong).__name__}; make it with rapidin_vdb.query_from")
    return found


def read_queries(path: Path) -> list[Sample]:
    """Return the queries of a file: records of any shape, their response being the generation.

    A query is named by its field `query_id` or `id`, else by its number, from 1.

    Raises:
        CorpusError: the file cannot be read, or one of its records cannot be a query.
    """
    queries: list[Sample] = []
    for number, record in enumerate(read_records(path), start=1):
        if isinstance(record, CorpusError):
            raise record
        check_shape(record.fields, record.location, wanted=_SHAPES)
        _check_options(record)
        names = (record.fields.get("query_id"), record.fields.get("id"))
        name = next((name for name in names if name is not None), None)
        fields = _after_turns(record) | {"query_id": str(number) if name is None else name}
        query = sample_from(Record(location=record.location, fields=fields), id_field="query_id")
        queries.append(query if record.fields.get("generation") is None else _said_once(query))
    if not queries:
        raise CorpusError(f'{path}: no query in it; wanted lines such as {{"prompt": "...", "generation": "..."}}')
    return queries


def _check_options(record: Record) -> None:
    """Refuse a field that is an option of all queries, or seems to be one of a query, misspelt: it would go unheard.

    Raises:
        CorpusError: there is one.
    """
    for name, value in record.fields.items():
        if name in _FOR_ALL and value is not None:
            option = f"--{name.replace('_', '-')}"
            raise CorpusError(
                f"{record.location}: {name} is an option of all queries, not of one: leave it out, and give {option}"
            )
        meant = difflib.get_close_matches(str(name).lower(), _OPTIONS, 1, _NEAR)
        if meant and name != meant[0] and meant[0] not in record.fields:
            raise CorpusError(f"{record.location}: is {name} meant to be {meant[0]}? Rename it, or leave it out")


def _after_turns(record: Record) -> dict[str, Any]:
    """Return the fields of a query, whose generation follows its turns where it has both.

    Raises:
        CorpusError: it has a prompt beside them, or what it says under another name.
    """
    fields = {name: value for name, value in record.fields.items() if value is not None}
    beside = [name for name in (*PROMPTS, *RESPONSES) if name in fields]
    turns = next((name for name in TURNS if name in fields), None)
    pair = bool({*beside} & {*PROMPTS} and {*beside} & {*RESPONSES})
    if turns is None or not beside or (pair and turns == "conversations"):
        return dict(record.fields)
    if beside != ["generation"] or not isinstance(fields[turns], list):
        raise CorpusError(
            f"{record.location}: a query has {' and '.join(beside)} beside {turns}; give the turns as {turns}, and "
            "what was said after them as generation, or as the last of them"
        )
    said = {"role": "assistant", "content": fields.pop("generation")}
    return fields | {turns: [*fields[turns], said]}


def _said_once(query: Sample) -> Sample:
    """Return a query whose generation is not the last of the turns before it as well, as if it had been said twice.

    Raises:
        CorpusError: it is.
    """
    last = query.messages[-1] if query.messages else None
    # What calls tools is made of turns: several may follow one another, all without a content.
    if last is None or last.role != "assistant" or query.turns:
        return query
    if last.content.strip() == query.response.strip():
        raise CorpusError(
            f"{query.location}: the last of the messages is the generation itself, which is to follow them; leave it "
            "out of the messages"
        )
    return query


def encode_queries(
    queries: Sequence[Sample],
    *,
    tokenizer: Tokenizer,
    template: Template,
    max_tokens: int,
    focus: Sequence[Focus] = (),
) -> list[Encoded]:
    """Return the tokens of queries; those of a query's own focus, or of the one given, carry its loss.

    Raises:
        CorpusError: one of them leaves no token with a loss.
        SpecError: a focus is not in its generation.
    """
    for query in queries:
        _check_end(query, template)
    encoded = []
    results = encode(queries, tokenizer=tokenizer, template=template, max_tokens=max_tokens)
    for query, result in zip(queries, results, strict=True):
        if isinstance(result, CorpusError):
            raise result
        encoded.append(focused(as_written(query, result), result, focus_of(query, focus)))
    return encoded


def _check_end(query: Sample, template: Template) -> None:
    """Refuse a generation that ends with what a chat template writes behind it: that would stand there twice.

    Raises:
        CorpusError: it does.
    """
    end = "" if query.turns else template.end(query).strip()
    if end and query.response.rstrip().endswith(end):
        raise CorpusError(
            f"{query.location}: the generation ends with {end}, which the template writes behind it; leave it out"
        )


def sketch_queries(
    maker: RapidGradMaker,
    encoded: Sequence[Encoded],
    *,
    focus: Sequence[tuple[Focus, ...]] | None = None,
    progress: Progress = silent,
) -> Sketched:
    """Return the RapidGrads of queries, by the same road as samples take; `focus` says what each is about.

    Raises:
        GradientError: a query gives no gradient, or one that is not finite.
    """
    vectors, seconds = [], []
    for number, query in enumerate(encoded):
        progress("gradients", number, len(encoded))
        started = time.monotonic()
        vectors.append(maker.within_memory(partial(maker.make, query), "query", query)[0])
        seconds.append(time.monotonic() - started)
    progress("gradients", len(encoded), len(encoded))
    return Sketched(
        query_ids=tuple(query.sample_id for query in encoded),
        vectors=np.stack(vectors),
        seconds=tuple(seconds),
        focus=tuple(focus) if focus is not None else ((),) * len(encoded),
        looked_at=tuple(len(query.offsets) if query.truncated else None for query in encoded),
    )
