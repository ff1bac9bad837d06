"""Several turns as one text, as a database keeps them, and the turns of such a text."""

import json
import re
from collections.abc import Sequence

from rapidin_vdb.records import Message

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Under which names a turn may have thoughts outside of its content."""
SAID_BESIDE = ("tool_calls", "function_call", *THOUGHTS)
"""What a turn may say outside of its content."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TURN = re.compile(r"\n\n([^\s:]{1,40}): ")


def joined(turns: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
    """Return turns as one text, each but the first behind its role, and where in it each turn's content begins.

    >>> joined([Message(role="assistant", content="Hi."), Message(role="user", content="Bye.")])
    ('Hi.\\n\\nuser: Bye.', (0, 11))
    """
    text, starts = "", []
    for number, turn in enumerate(turns):
        text += f"\n\n{turn.role}: " if number else ""
        starts.append(len(text))
        text += turn.content
    return text, tuple(starts)


def is_trained(turn: Message) -> bool:
    """Say whether a turn is an answer that the model is trained on: one of weight 0, as some data have, is not."""
    return turn.role == "assistant" and turn.more.get("weight") != 0


def said_beside(turn: Message) -> list[str]:
    """Return the names of what a turn says outside of its content."""
    return [name for name in SAID_BESIDE if turn.more.get(name) and str(turn.more[name]).strip()]


def told(turn: Message) -> str:
    """Return a turn's content, and what calls of tools it has, as JSON, on a line of their own.

    >>> told(Message(role="assistant", content="", more={"tool_calls": [{"name": "look"}]}))
    '[{"name": "look"}]'
    """
    calls = [turn.more[name] for name in ("tool_calls", "function_call") if turn.more.get(name)]
    texts = [turn.content, *(json.dumps(call, ensure_ascii=False, default=str) for call in calls)]
    return "\n".join(text for text in texts if text)


def taken_apart(text: str, spans: Sequence[tuple[int, int]]) -> tuple[Message, ...]:
    """Return the turns of a text that several answers and what was said between them make, by their tokens.

    `spans` are those of the answers' tokens, as `joined` has them. What they cover is said by an answer, whatever it
    looks like; between two of them stand turns, of which the first and the last are sure, and others where they begin
    with a role that is known. So are all behind the last token, where the text was cut.

    >>> [turn.role for turn in taken_apart("Hi.\\n\\nuser: Bye.\\n\\nassistant: No.", [(0, 3), (28, 31)])]
    ['assistant', 'user', 'assistant']
    """
    covered = sorted(span for span in spans if span[0] < span[1])
    last = max((end for _, end in covered), default=0)
    found: list[re.Match[str]] = []
    place = 0
    for start, end in [*covered, (len(text), len(text))]:
        inside = list(_TURN.finditer(text, place, start))
        known = [match for match in inside if match[1] in _ROLES]
        if place >= last:
            answers = [number for number, match in enumerate(known) if match[1] == "assistant"]
            found += known[: answers[-1] + 1] if answers else []
        elif known and known[-1][1] == "assistant":
            found += sorted({inside[0], *known}, key=lambda match: match.start())
        place = max(place, end)
    borders = [(0, 0, "assistant"), *((match.start(), match.end(), match[1]) for match in found)]
    ends = [start for start, _, _ in borders[1:]] + [len(text)]
    return tuple(
        Message(role=role, content=text[begin:end]) for (_, begin, role), end in zip(borders, ends, strict=True)
    )
