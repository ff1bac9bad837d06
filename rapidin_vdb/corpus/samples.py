"""A record of one of the known shapes becomes a sample with an identity."""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapidin_vdb.corpus.beside import BESIDE, is_beside
from rapidin_vdb.corpus.files import Record, read_records
from rapidin_vdb.corpus.shapes import conversation_of, text_field
from rapidin_vdb.corpus.turns import joined, said_beside, told
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import OWN_COLUMNS, Message, Sample, Scalar, Turns


def read_corpus(
    paths: Iterable[Path],
    *,
    split: str | None = None,
    source: str | None = None,
    id_field: str = "id",
    turns: Turns = "last",
) -> Iterator[Sample | CorpusError]:
    """Yield the samples of some files in order, an error in the place of each record that cannot be one.

    `split` and `source` win over the record's own fields of that name; without either, a sample's split is `train`.
    The response of a conversation is the assistant's last turn, or all that begins with its first one.

    Raises:
        CorpusError: a file is missing, of no known format, or cannot be read at all.
    """
    # All are looked for first: the last of them would be missed only after hours.
    for records in [read_records(path) for path in paths]:
        for record in records:
            if isinstance(record, CorpusError):
                yield record
                continue
            try:
                yield sample_from(record, split=split, source=source, id_field=id_field, turns=turns)
            except CorpusError as error:
                yield error


def sample_from(
    record: Record,
    *,
    split: str | None = None,
    source: str | None = None,
    id_field: str = "id",
    turns: Turns = "last",
) -> Sample:
    """Return the sample that a record describes, with the turns that its fields `system` and `history` make.

    Raises:
        CorpusError: the record has none of the known shapes, an empty response, or a value of the wrong kind.
    """
    fields, location, text = record.fields, record.location, _unicode_of(record)
    conversation = conversation_of(fields, location, turns, beside=BESIDE - {id_field})
    messages, said = conversation.before, conversation.response
    response, _ = joined(said)
    if not said[-1].content.strip() and not said_beside(said[-1]):
        raise CorpusError(f"{location}: the response is empty; there is nothing to take a gradient of")
    split = split if split is not None else text_field(fields, "split", location) or "train"
    source = source if source is not None else text_field(fields, "source", location)
    sample_id = _sample_id(record, id_field, text)
    # Checked with the fields beside the conversation, which are columns where a template writes no turns of them.
    used = {*conversation.used - conversation.beside} | {id_field, "id", "split", "source"}
    metadata = _metadata(fields, used, location)
    return Sample(
        sample_id=sample_id,
        prompt=_prompt_text(messages),
        response=response,
        split=split,
        source=source,
        metadata={name: value for name, value in metadata.items() if name not in conversation.beside},
        messages=messages,
        turns=said if len(said) > 1 or said_beside(said[-1]) else (),
        behind=conversation.behind,
        fields=fields,
        content_hash=hash_of(text, split, source, conversation.beside),
        location=location,
    )


def by_itself(sample: Sample) -> Sample:
    """Return a sample without the turns that fields beside its conversation make, as templates write it that cannot.

    The fields are columns then, and its hash is that of databases made before such turns were.
    """
    all_turns = (*sample.messages, *sample.turns)
    if BESIDE.isdisjoint(sample.fields) or not any(is_beside(turn, BESIDE) for turn in all_turns):
        return sample
    beside = conversation_of(sample.fields, sample.location, "last").beside
    messages, turns = (
        tuple(turn for turn in turns if not is_beside(turn, beside)) for turns in (sample.messages, sample.turns)
    )
    if (messages, turns) == (sample.messages, sample.turns):
        return sample
    response = sample.response
    if turns != sample.turns:
        # Where all turns have a loss, an earlier pair is a part of the response: what is left is a question and answer.
        *asked, said = turns
        messages, turns, response = (*messages, *asked), (), said.content
    columns = {name: sample.fields[name] for name in sorted(beside) if isinstance(sample.fields[name], str)}
    return replace(
        sample, prompt=_prompt_text(messages), response=response, messages=messages, turns=turns,
        metadata={**sample.metadata, **columns},
        content_hash=hash_of(text_of(sample.fields), sample.split, sample.source),
    )  # fmt: skip


def is_named_by_content(sample: Sample) -> bool:
    """Say whether a sample's id is the hash of its record, which has none."""
    return sample.fields.get("id") is None and sample.sample_id == _content_id(text_of(sample.fields))


def sample_id_of(record: Record, *, id_field: str = "id") -> str:
    """Return the id of a record's sample, whether or not there can be one.

    Raises:
        CorpusError: the field of ids is named and missing, or holds neither a text nor a whole number.
    """
    return _sample_id(record, id_field, _unicode_of(record))


def _unicode_of(record: Record) -> str:
    """Return a record as text.

    Raises:
        CorpusError: it holds half of a surrogate pair, or bytes that are no UTF-8.
    """
    text = text_of(record.fields)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(f"{record.location}: holds text that is not valid Unicode: {error.reason}") from error
    return text


def text_of(fields: Mapping[str, Any]) -> str:
    """Return a record as text, whatever the order of its fields."""
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)


def hash_of(text: str, split: str, source: str | None, beside: Collection[str] = ()) -> str:
    """Return what tells a record, as text, from others of the same id.

    With the names of fields beside its conversation that made turns: in databases that were made before they did, the
    same record is other content.
    """
    identity = json.dumps([text, split, source, *sorted(beside)], ensure_ascii=False)
    return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:32]


def _prompt_text(messages: tuple[Message, ...]) -> str | None:
    if not messages:
        return None
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{turn.role}: {told(turn)}" for turn in messages)


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "none"


def _sample_id(record: Record, id_field: str, text: str) -> str:
    value, location = record.fields.get(id_field), record.location
    if value is None:
        if id_field != "id":
            found = _names(record.fields)
            raise CorpusError(f"{location}: no field {id_field!r}, which --id-field names; found {found}")
        return _content_id(text)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what becomes of whole numbers in a column with gaps
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = json.dumps(value, default=str)[:60]
        raise CorpusError(f"{location}: {id_field} is {found}; wanted a text or a whole number")
    return str(value)


def _content_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def _metadata(fields: dict[str, Any], used: set[str], location: str) -> dict[str, Scalar]:
    """Every further scalar field, under the name of its column."""
    metadata: dict[str, Scalar] = {}
    for name, value in fields.items():
        if name in used or value is None or isinstance(value, list | dict | bytes):
            continue
        # Lance reads a dot as a path into a struct, and SQL has its own ideas of quotes and backticks; a column of no
        # name is what pandas writes for its index.
        column = re.sub(r"[^\w -]", "_", str(name)).strip() or "unnamed"
        if column.lower() in OWN_COLUMNS or column.startswith("_"):
            column = f"record_{column.lstrip('_')}"
        if any(column.lower() == other.lower() for other in metadata):
            raise CorpusError(f"{location}: two fields would both be the column {column!r}; rename one of them")
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
            value = str(value)
        metadata[column] = value if isinstance(value, str | int | float) else str(value)
    return metadata
