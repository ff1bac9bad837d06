"""A record of one of the four known shapes becomes a sample with an identity."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rapidin_vdb.corpus.files import Record, read_records
from rapidin_vdb.corpus.turns import is_trained, joined
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import OWN_COLUMNS, Message, Sample, Scalar, Turns

# What a turn may say outside of its content.
_SAID_BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_SHAPES = "instruction/input/output, prompt/response (or completion), messages, or text"
RESPONSES = ("output", "response", "completion", "generation")
"""Names of a response; the first that is there counts."""
_PROMPTS = ("instruction", "prompt")
_KNOWN = frozenset((*_PROMPTS, *RESPONSES, "input", "messages", "text"))
# How like a name that is known another has to be to be taken for it, misspelt.
_NEAR = 0.75


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
    for path in paths:
        for record in read_records(path):
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
    """Return the sample that a record describes.

    Raises:
        CorpusError: the record has none of the known shapes, an empty response, or a value of the wrong kind.
    """
    fields, location, text = record.fields, record.location, _unicode_of(record)
    messages, said, used = _conversation(fields, location, turns)
    response, _ = joined(said)
    if not said[-1].content.strip():
        raise CorpusError(f"{location}: the response is empty; there is nothing to take a gradient of")
    split = split if split is not None else _text(fields, "split", location) or "train"
    source = source if source is not None else _text(fields, "source", location)
    sample_id = _sample_id(record, id_field, text)
    metadata = _metadata(fields, used | {id_field, "id", "split", "source"}, location)
    return Sample(
        sample_id=sample_id,
        prompt=_prompt_text(messages),
        response=response,
        split=split,
        source=source,
        metadata=metadata,
        messages=messages,
        turns=said if len(said) > 1 else (),
        fields=fields,
        content_hash=hash_of(text, split, source),
        location=location,
    )


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


def text_of(fields: dict[str, Any]) -> str:
    """Return a record as text, whatever the order of its fields."""
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)


def hash_of(text: str, split: str, source: str | None) -> str:
    """Return what tells a record, as text, from others of the same id."""
    identity = json.dumps([text, split, source], ensure_ascii=False)
    return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:32]


_Said = tuple[Message, ...]


def _conversation(fields: dict[str, Any], location: str, which: Turns) -> tuple[_Said, _Said, set[str]]:
    """Return the turns before the response, those of the response, and the names of the fields they came from."""
    check_shape(fields, location)
    if fields.get("messages") is not None:
        return *_turns(fields["messages"], location, which), {"messages"}
    response_name = next((name for name in RESPONSES if fields.get(name) is not None), None)
    prompt_name = next((name for name in _PROMPTS if fields.get(name) is not None), None)
    if response_name and prompt_name:
        used = {prompt_name, response_name, "input"} if prompt_name == "instruction" else {prompt_name, response_name}
        prompt = _text(fields, prompt_name, location) or ""
        context = _text(fields, "input", location) if prompt_name == "instruction" else None
        if context:
            prompt = f"{prompt}\n{context}"
        response = _text(fields, response_name, location) or ""
        return (Message(role="user", content=prompt),), (_answer(response),), used
    return (), (_answer(_text(fields, "text", location) or ""),), {"text"}


def check_shape(fields: dict[str, Any], location: str, *, wanted: str = _SHAPES) -> None:
    """Refuse a record of no known shape, and say of which of its names another seems to be meant.

    Raises:
        CorpusError: it has none.
    """
    there = {name for name, value in fields.items() if value is not None}
    if there & {"messages", "text"} or (there & set(_PROMPTS) and there & set(RESPONSES)):
        return
    found = [f"{name} (null)" if name in _KNOWN - there else str(name) for name in fields]
    near = ((name, difflib.get_close_matches(str(name).lower(), sorted(_KNOWN - there), 1, _NEAR)) for name in fields)
    meant = [f"; is {name} meant to be {known[0]}?" for name, known in near if known and name not in _KNOWN]
    raise CorpusError(f"{location}: found the fields {', '.join(found) or 'none'}; wanted {wanted}{''.join(meant)}")


def _turns(value: Any, location: str, which: Turns) -> tuple[_Said, _Said]:
    turns = [_turn(turn) for turn in value] if isinstance(value, list) else [None]
    if None in turns:
        wrong = value[turns.index(None)] if isinstance(value, list) else value
        where = f"[{turns.index(None)}]" if isinstance(value, list) else ""
        raise CorpusError(
            f"{location}: messages must be a list of objects with texts role and content; messages{where} is "
            f"{json.dumps(wrong, ensure_ascii=False, default=str)[:80]}"
        )
    said = [turn for turn in turns if turn is not None]
    answers = [place for place, turn in enumerate(said) if turn.role == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(turn.role for turn in said)) or "none"
        raise CorpusError(
            f"{location}: messages has no turn of the role assistant, which would be the response; found the roles "
            f"{roles}"
        )
    for place in answers if which == "all" else ():
        if (weight := said[place].more.get("weight", 1)) not in (0, 1):
            raise CorpusError(f"{location}: messages[{place}] has the weight {weight!r}; wanted 0 or 1")
    answers = [place for place in answers if is_trained(said[place])] if which == "all" else answers[-1:]
    if not answers:
        raise CorpusError(f"{location}: all of the assistant's turns have weight 0, so that none is to have a loss")
    for place in answers:
        lost = [name for name in _SAID_BESIDE if said[place].more.get(name)]
        if lost:
            named = "the response" if which == "last" else f"messages[{place}], which is to have a loss,"
            raise CorpusError(
                f"{location}: {named} has {lost[0]}, which would be lost; write all that the model is to say into its "
                "content, as the model would write it"
            )
    return tuple(said[: answers[0]]), tuple(said[answers[0] : answers[-1] + 1])


def _answer(content: str) -> Message:
    return Message(role="assistant", content=content)


def _turn(turn: Any) -> Message | None:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return None
    more = {name: value for name, value in turn.items() if name not in ("role", "content") and value is not None}
    content = turn.get("content")
    if content is None and (more.get("tool_calls") or more.get("function_call")):
        content = ""  # a turn that only calls tools
    return Message(role=turn["role"], content=content, more=more) if isinstance(content, str) else None


def _prompt_text(messages: tuple[Message, ...]) -> str | None:
    if not messages:
        return None
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in messages)


def _text(fields: dict[str, Any], name: str, location: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise CorpusError(f"{location}: {name} is {json.dumps(value, default=str)[:60]}; wanted a text")


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "none"


def _sample_id(record: Record, id_field: str, text: str) -> str:
    value, location = record.fields.get(id_field), record.location
    if value is None:
        if id_field != "id":
            found = _names(record.fields)
            raise CorpusError(f"{location}: no field {id_field!r}, which --id-field names; found {found}")
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what becomes of whole numbers in a column with gaps
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = json.dumps(value, default=str)[:60]
        raise CorpusError(f"{location}: {id_field} is {found}; wanted a text or a whole number")
    return str(value)


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
