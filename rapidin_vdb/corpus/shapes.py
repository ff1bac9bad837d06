"""The known shapes of records, and the turns of a conversation that each describes."""

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidin_vdb.corpus.beside import BESIDE, turns_beside
from rapidin_vdb.corpus.turns import SAID_BESIDE, is_trained, said_beside
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Message, Turns

RESPONSES = ("output", "response", "completion", "generation")
"""Names of a response; the first that is there counts."""
PROMPTS = ("instruction", "prompt")
"""Names of a prompt."""
TURNS = ("messages", "conversations")
"""Names of a list of turns."""
# What some data call roles, and the names that chat templates know; any other name is a role as it stands.
_SAYERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "ai": "assistant"}
_FROM = _SAYERS | {"model": "assistant", "observation": "tool", "function_response": "tool"}
_CALL = "function_call"
_FIELDS = {name.replace("_", ""): name for name in (*SAID_BESIDE, "tool_call_id")}
"""What a turn may have, by its letters alone: in other spellings no chat template would see it."""
_SHAPES = "instruction/input/output, prompt/response (or completion), messages, conversations, or text"
_KNOWN = frozenset((*PROMPTS, *RESPONSES, *TURNS, "input", "text"))
# How like a name that is known another has to be to be taken for it, misspelt.
_NEAR = 0.75
_WANTED = "a list of objects with texts role and content, or from and value"
_Said = tuple[Message, ...]


@dataclass(frozen=True)
class Conversation:
    """What a record says, turn by turn."""

    before: _Said
    """The turns before the response."""
    response: _Said
    """Those of the response."""
    behind: _Said
    """Those behind it."""
    used: frozenset[str]
    """The names of the fields that they came from."""
    beside: frozenset[str] = frozenset()
    """Those of them that stand beside the conversation: `system`, where that is no part of it, and `history`."""


def conversation_of(
    fields: Mapping[str, Any], location: str, which: Turns, *, beside: Collection[str] = BESIDE
) -> Conversation:
    """Return the turns of a record, of which the assistant's last one is the response, or all from the first of them.

    A field `system` is the first of them where they have none like it, and `history` makes turns before a prompt that
    is a text, as far as `beside` names them.

    Raises:
        CorpusError: the record has none of the known shapes, or a value of the wrong kind.
    """
    check_shape(fields, location)
    names = _pair(fields)
    if not _is_there(fields, "messages") and names:
        prompt, response = names
        used = {prompt, response} | ({"input"} if prompt == "instruction" else set())
        asked, said = _asked(fields, prompt, location), _said(fields, response, location)
        if is_conversation(fields):
            first = turns_beside(fields, asked, {"system"}.intersection(beside))
            before, said, behind = _parted(said, response, location, which)
            return _with(first, used, (*first, *asked, *before), said, behind)
        first = turns_beside(fields, (), beside)
        return _with(first, used, *_parted((*first, *asked, *said), response, location, which))
    if not is_conversation(fields):
        return Conversation((), _said(fields, "text", location), (), frozenset({"text"}))
    name, turns = next(name for name in TURNS if _is_there(fields, name)), turns_of(fields, location)
    system = {"system"} if turns and turns[0].place == "system" else set[str]()
    first = turns_beside(fields, turns, {"system"}.intersection(beside)) if not system else ()
    return _with(first, {name, *system}, *_parted((*first, *turns), name, location, which))


def _with(first: _Said, used: set[str], before: _Said, response: _Said, behind: _Said) -> Conversation:
    """Return a conversation that begins with turns from fields beside it."""
    beside = frozenset(turn.place.partition("[")[0] for turn in first)
    return Conversation(before, response, behind, frozenset(used) | beside, beside)


def asked_fields(
    prompt: str | None, said: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the record of a prompt, or of several turns, and what was said to it."""
    if tools and prompt is not None:
        messages = [{"role": "user", "content": prompt}]
    if messages:
        turns = [*messages, {"role": "assistant", "content": said}]
        return {"messages": turns} | ({"tools": list(tools)} if tools else {})
    return {"text": said} if prompt is None else {"prompt": prompt, "generation": said}


def is_conversation(fields: Mapping[str, Any]) -> bool:
    """Say whether a record gives its turns as such, rather than as texts."""
    names = _pair(fields)
    if _is_there(fields, "messages"):
        return True
    if names:
        return any(isinstance(fields[name], list) for name in names)
    return fields.get("text") is None and _is_there(fields, "conversations")


def turns_of(fields: Mapping[str, Any], location: str) -> _Said:
    """Return all turns of a record that lists them as `messages` or `conversations`; of any other, none.

    Raises:
        CorpusError: they are no turns.
    """
    name = next((name for name in TURNS if _is_there(fields, name)), None)
    if name is None or not is_conversation(fields):
        return ()
    turns = _listed(fields[name], name, location)
    if name == "conversations" and turns and turns[0].role != "system":
        system = text_field(fields, "system", location)
        turns = (Message(role="system", content=system, place="system"), *turns) if system else turns
    return turns


def check_shape(fields: Mapping[str, Any], location: str, *, wanted: str = _SHAPES) -> None:
    """Refuse a record of no known shape, and say of which of its names another seems to be meant.

    Raises:
        CorpusError: it has none.
    """
    if _pair(fields) or fields.get("text") is not None or any(_is_there(fields, name) for name in TURNS):
        return
    there = {name for name, value in fields.items() if value is not None}
    found = [f"{name} (null)" if name in _KNOWN - there else str(name) for name in fields]
    near = ((name, difflib.get_close_matches(str(name).lower(), sorted(_KNOWN - there), 1, _NEAR)) for name in fields)
    meant = [f"; is {name} meant to be {known[0]}?" for name, known in near if known and name not in _KNOWN]
    raise CorpusError(f"{location}: found the fields {', '.join(found) or 'none'}; wanted {wanted}{''.join(meant)}")


def text_field(fields: Mapping[str, Any], name: str, location: str) -> str | None:
    """Return a field that is a text, or None where there is none.

    Raises:
        CorpusError: it is something else.
    """
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise CorpusError(f"{location}: {name} is {json.dumps(value, default=str)[:60]}; wanted a text")


def _is_there(fields: Mapping[str, Any], name: str) -> bool:
    """Say whether a record has a list of turns under a name; CSV has empty texts where there is none."""
    value = fields.get(name)
    return value is not None and not (isinstance(value, str) and not value.strip())


def _pair(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of a record's prompt and response, if it has both."""
    prompt = next((name for name in PROMPTS if fields.get(name) is not None), None)
    response = next((name for name in RESPONSES if fields.get(name) is not None), None)
    return (prompt, response) if prompt and response else None


def _asked(fields: Mapping[str, Any], name: str, location: str) -> _Said:
    """Return the turns of a prompt: a list of them, or one of the user's."""
    context = text_field(fields, "input", location) if name == "instruction" else None
    if isinstance(fields[name], list):
        if context:
            raise CorpusError(f"{location}: instruction is a list of turns, and input a text; wanted one of both")
        return _listed(fields[name], name, location)
    text = text_field(fields, name, location) or ""
    return (Message(role="user", content=f"{text}\n{context}" if context else text),)


def _said(fields: Mapping[str, Any], name: str, location: str) -> _Said:
    """Return the turns of a response: a list of them, or one of the assistant's."""
    if isinstance(fields[name], list):
        return _listed(fields[name], name, location)
    return (Message(role="assistant", content=text_field(fields, name, location) or ""),)


def _listed(value: Any, name: str, location: str) -> _Said:
    """Return the turns that a field lists; a text, as in CSV, is JSON of that."""
    if isinstance(value, str):
        value = _parsed(value, name, location)
    if not isinstance(value, list):
        raise _no_turns(value, name, name, location)
    return tuple(_turn(turn, f"{name}[{place}]", name, location) for place, turn in enumerate(value))


def _parsed(text: str, name: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{location}: {name} is a text that is no JSON: {error}") from error


def _no_turns(value: Any, where: str, name: str, location: str) -> CorpusError:
    wanted = _WANTED if name in TURNS else f"a text, or {_WANTED}"
    found = json.dumps(value, ensure_ascii=False, default=str)[:80]
    return CorpusError(f"{location}: {name} must be {wanted}; {where} is {found}")


def _turn(turn: Any, where: str, name: str, location: str) -> Message:
    keys = ("role", "content")
    if isinstance(turn, dict) and turn.get("role") is None and turn.get("from") is not None:
        keys = ("from", "value")
    role = turn.get(keys[0]) if isinstance(turn, dict) else None
    if not isinstance(role, str):
        raise _no_turns(turn, where, name, location)
    for field, value in turn.items():
        meant = _FIELDS.get("".join(filter(str.isalnum, str(field))).lower(), field)
        if value and meant not in turn:
            raise CorpusError(f"{location}: {where} has a field {field}; is it meant to be {meant}?")
    content = turn.get(keys[1])
    more = {key: value for key, value in turn.items() if key not in keys and value is not None}
    if isinstance(more.get("tool_calls"), str):
        more["tool_calls"] = _parsed(more["tool_calls"], f"tool_calls of {where}", location)
    if keys[0] == "from" and role == _CALL and "tool_calls" not in more:
        more["tool_calls"] = _calls(content, where, location)
        return Message(role="assistant", content="", more=more, place=where)
    if isinstance(content, list):
        content = _only_text(content, where, location)
    known = _FROM if keys[0] == "from" else _SAYERS
    said = content if isinstance(content, str) else ""
    found = Message(role=known.get(role.lower(), role), content=said, more=more, place=where)
    if not isinstance(content, str) and not (content is None and said_beside(found)):
        raise _no_turns(turn, where, name, location)
    return found


def _only_text(parts: list[Any], where: str, location: str) -> str:
    """Return the text of a content that is a list of one part, as OpenAI's interfaces have it."""
    match parts:
        case [{"type": "text", "text": str(text)}]:
            return text
    kinds = [str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in parts]
    raise CorpusError(
        f"{location}: {where} has a content of the parts {', '.join(kinds) or '(none)'}; wanted a text, or one part of "
        "the type text"
    )


def _calls(value: Any, where: str, location: str) -> list[dict[str, Any]]:
    """Return the calls of tools that a turn from `function_call` writes as JSON: an object, or a list of them."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    listed = found if isinstance(found, list) else [found]
    calls = [call.get("function", call) if isinstance(call, dict) else None for call in listed]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= set(call) for call in calls):
        said = json.dumps(value, ensure_ascii=False, default=str)[:80]
        raise CorpusError(f"{location}: {where} is from {_CALL}, with {said}; wanted JSON with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _parted(turns: _Said, name: str, location: str, which: Turns) -> tuple[_Said, _Said, _Said]:
    """Return the turns before the response, those of the response, and those behind it."""
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(turn.role for turn in turns)) or "none"
        raise CorpusError(
            f"{location}: {name} has no turn of the role assistant, which would be the response (in a query, so would "
            f"a field generation); found the roles {roles}"
        )
    for place in answers if which == "all" else ():
        if (weight := turns[place].more.get("weight", 1)) not in (0, 1):
            raise CorpusError(f"{location}: {turns[place].place} has the weight {weight!r}; wanted 0 or 1")
    answers = [place for place in answers if is_trained(turns[place])] if which == "all" else answers[-1:]
    if not answers:
        raise CorpusError(f"{location}: all of the assistant's turns have weight 0, so that none is to have a loss")
    first, end = answers[0], answers[-1] + 1
    return turns[:first], turns[first:end], turns[end:]
