"""Several turns as one text, as a database keeps them, and the turns of such a text."""

import re
from collections.abc import Sequence

from rapidin_vdb.records import Message

_TURN = re.compile(r"\n\n(system|developer|user|assistant|tool): ")


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


def taken_apart(text: str) -> tuple[Message, ...]:
    """Return the turns of a text that begins and ends with an answer, where it looks like some.

    >>> [(turn.role, turn.content) for turn in taken_apart("Hi.\\n\\nuser: Bye.\\n\\nassistant: No.\\n\\nuser: no")]
    [('assistant', 'Hi.'), ('user', 'Bye.'), ('assistant', 'No.\\n\\nuser: no')]
    """
    first, *more = _TURN.split(text)
    turns = [Message(role="assistant", content=first)]
    answers = [place for place, role in enumerate(more[::2]) if role == "assistant"]
    ended = answers[-1] + 1 if answers else 0
    turns += [
        Message(role=role, content=content)
        for role, content in zip(more[: 2 * ended : 2], more[1 : 2 * ended : 2], strict=True)
    ]
    # What looks like a turn behind the last answer is part of it.
    rest = "".join(
        f"\n\n{role}: {content}" for role, content in zip(more[2 * ended :: 2], more[2 * ended + 1 :: 2], strict=True)
    )
    turns[-1] = Message(role="assistant", content=turns[-1].content + rest)
    return tuple(turns)
