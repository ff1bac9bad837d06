"""The known shapes of records, and the turns of a conversation that each describes."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from rapidin_vdb.corpus.turns import is_trained
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Message, Turns

RESPONSES = ("output", "response", "completion", "generation")
"""Names of a response; the first that is there counts."""
PROMPTS = ("instruction", "prompt")
"""Names of a prompt."""
SAYERS: Mapping[str, str] = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""What some data call roles, and the names that chat templates know; any other name is a role as it stands."""
_CALL = "function_call"
_SHAPES = "instruction/input/output, prompt/response (or completion), messages, conversations, or text"
_KNOWN = frozenset((*PROMPTS, *RESPONSES, "input", "messages", "conversations", "text"))
# How like a name that is known another has to be to be taken for it, misspelt.
_NEAR = 0.75
_WANTED = {
    "messages": "a list of objects with texts role and content",
    "conversations": "a list of objects with texts from and value",
}
_TEXT_OR_TURNS = f"a text, or {_WANTED['messages']}"
_Said = tuple[Message, ...]


def conversation_of(fields: Mapping[str, Any], location: str, which: Turns) -> tuple[_Said, _Said, set[str]]:
    """Return the turns before the response, those of the response, and the names of the fields they came from.

    Raises:
        CorpusError: the record has none of the known shapes, or a value of the wrong kind.
    """
    check_shape(fields, location)
    name = next((name for name in _WANTED if fields.get(name) is not None), None)
    response_name = next((name for name in RESPONSES if fields.get(name) is not None), None)
    prompt_name = next((name for name in PROMPTS if fields.get(name) is not None), None)
    if name == "messages" or (name and not (response_name and prompt_name)):
        turns, used = _listed(fields[name], name, location), {name}
        if name == "conversations" and isinstance(fields.get("system"), str):
            used.add("system")
            if fields["system"] and turns[:1] and turns[0].role != "system":
                turns = (Message(role="system", content=fields["system"]), *turns)
        return *_parted(turns, name, location, which), used
    if response_name and prompt_name:
        used = {prompt_name, response_name, "input"} if prompt_name == "instruction" else {prompt_name, response_name}
        if isinstance(fields[prompt_name], list) or isinstance(fields[response_name], list):
            asked = _either(fields, prompt_name, "user", location)
            said = _either(fields, response_name, "assistant", location)
            before, said = _parted(said, response_name, location, which)
            return (*asked, *before), said, used
        prompt = text_field(fields, prompt_name, location) or ""
        context = text_field(fields, "input", location) if prompt_name == "instruction" else None
        if context:
            prompt = f"{prompt}\n{context}"
        response = text_field(fields, response_name, location) or ""
        return (Message(role="user", content=prompt),), (Message(role="assistant", content=response),), used
    text = text_field(fields, "text", location) or ""
    return (), (Message(role="assistant", content=text),), {"text"}


def is_conversation(fields: Mapping[str, Any]) -> bool:
    """Say whether a record gives its turns as such, rather than as texts."""
    lists = any(isinstance(fields.get(name), list) for name in (*PROMPTS, *RESPONSES))
    return lists or any(fields.get(name) is not None for name in _WANTED)


def check_shape(fields: Mapping[str, Any], location: str, *, wanted: str = _SHAPES) -> None:
    """Refuse a record of no known shape, and say of which of its names another seems to be meant.

    Raises:
        CorpusError: it has none.
    """
    there = {name for name, value in fields.items() if value is not None}
    if there & {*_WANTED, "text"} or (there & set(PROMPTS) and there & set(RESPONSES)):
        return
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


def _either(fields: Mapping[str, Any], name: str, role: str, location: str) -> _Said:
    """Return the turns of a field that is a list of them, or one text."""
    if isinstance(fields[name], list):
        return _listed(fields[name], name, location)
    return (Message(role=role, content=text_field(fields, name, location) or ""),)


def _listed(value: Any, name: str, location: str) -> _Said:
    """Return the turns that a field lists; a text, as in CSV, is JSON of that."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{location}: {name} is a text that is no JSON: {error}") from error
    if not isinstance(value, list):
        found = json.dumps(value, ensure_ascii=False, default=str)[:80]
        raise CorpusError(f"{location}: {name} must be {_WANTED.get(name, _TEXT_OR_TURNS)}; {name} is {found}")
    return tuple(_turn(turn, f"{name}[{place}]", name, location) for place, turn in enumerate(value))


def _turn(turn: Any, where: str, name: str, location: str) -> Message:
    wrong = CorpusError(
        f"{location}: {name} must be {_WANTED.get(name, _TEXT_OR_TURNS)}; {where} is "
        f"{json.dumps(turn, ensure_ascii=False, default=str)[:80]}"
    )
    if not isinstance(turn, dict):
        raise wrong
    said_by, said = ("from", "value") if name == "conversations" and turn.get("role") is None else ("role", "content")
    role, content = turn.get(said_by), turn.get(said)
    if not isinstance(role, str):
        raise wrong
    more = {key: value for key, value in turn.items() if key not in (said_by, said) and value is not None}
    if said_by == "from" and role == _CALL:
        return Message(role="assistant", content="", more=more | {"tool_calls": _calls(content, where, location)})
    if isinstance(content, list):
        content = _only_text(content, where, location)
    if content is None and (more.get("tool_calls") or more.get("function_call")):
        content = ""  # a turn that only calls tools
    if not isinstance(content, str):
        raise wrong
    return Message(role=SAYERS.get(role, role) if said_by == "from" else role, content=content, more=more)


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
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        said = json.dumps(value, ensure_ascii=False, default=str)[:80]
        raise CorpusError(f"{location}: {where} is from {_CALL}, with {said}; wanted JSON with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _parted(turns: _Said, name: str, location: str, which: Turns) -> tuple[_Said, _Said]:
    """Return the turns before the response, and those of the response."""
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(turn.role for turn in turns)) or "none"
        raise CorpusError(
            f"{location}: {name} has no turn of the role assistant, which would be the response; found the roles "
            f"{roles}"
        )
    for place in answers if which == "all" else ():
        if (weight := turns[place].more.get("weight", 1)) not in (0, 1):
            raise CorpusError(f"{location}: {name}[{place}] has the weight {weight!r}; wanted 0 or 1")
    answers = [place for place in answers if is_trained(turns[place])] if which == "all" else answers[-1:]
    if not answers:
        raise CorpusError(f"{location}: all of the assistant's turns have weight 0, so that none is to have a loss")
    return turns[: answers[0]], turns[answers[0] : answers[-1] + 1]
