"""Answers are found in what a chat template writes by writing it a second time, with marks in their places."""

import re
from collections.abc import Collection, Iterator, Sequence

from rapidin_vdb.corpus.template import Template
from rapidin_vdb.corpus.turns import said_beside
from rapidin_vdb.corpus.written import Answer
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Message, Sample

Stands = tuple[int, int, str]
"""Where an answer begins and ends in a text, and what follows it there."""
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def marked(turns: Sequence[Message], numbers: Collection[int], mark: str) -> tuple[Message, ...]:
    """Return turns with marks in the place of some answers, without what these say beside their contents."""
    # Thoughts stay before the marks: some templates write an empty one where there is none.
    return tuple(
        Message(role=turn.role, content=f"{_thought(turn.content)}{mark}{number}{mark}", more=_plain(turn))
        if number in numbers
        else turn
        for number, turn in enumerate(turns)
    )


def _plain(turn: Message) -> dict[str, object]:
    beside = said_beside(turn)
    return {name: value for name, value in turn.more.items() if name not in beside}


def find_marked(text: str, other: str, mark: str, answers: Sequence[Message]) -> list[Stands] | int:
    """Return where answers stand in a text, whose `other` form has marks in their places; or which is not there.

    The text ends where another answer begins. One that says more than its content is all that stands between what is
    before and what follows; any other has to be its content, but for spaces and thoughts that are left out.
    """
    around = re.split(f"{mark}[0-9]+{mark}", other)
    if len(around) != len(answers) + 1 or not text.startswith(around[0]):
        return 0
    found: list[Stands] = []
    start = len(around[0])
    for number, (answer, follows) in enumerate(zip(answers, around[1:], strict=True)):
        final = number == len(answers) - 1
        if said_beside(answer):
            stop = len(text) - len(follows) if final else text.find(follows, start)
            stands = (start, stop) if stop > start and text.startswith(follows, stop) else None
        else:
            stands = _found(text, start, answer.content, follows, final=final)
        if stands is None:
            return number
        found.append((*stands, follows))
        start = stands[1] + len(follows)
    return next((number for number in _ambiguous(text, around, found) if said_beside(answers[number])), found)


def _ambiguous(text: str, around: Sequence[str], found: Sequence[Stands]) -> Iterator[int]:
    """Yield which answers stand elsewhere if they are looked for from the end: what follows one may be in another."""
    stop = len(text)
    for number in range(len(found) - 1, -1, -1):
        stop -= len(around[number + 1])
        before = text.rfind(around[number], 0, stop) if number else 0
        start = before + len(around[number])
        if (start, stop) != found[number][:2]:
            yield number
        stop = start


def _found(text: str, start: int, said: str, follows: str, *, final: bool) -> tuple[int, int] | None:
    """Return where an answer stands in a text, given where what is behind its thought starts, and what follows it.

    None where it is written otherwise. Spaces around it, and its thought, may be left out. What follows the `final`
    one ends the text.
    """
    thought = _thought(said)
    rest = said[len(thought) :]
    stop = start + len(rest)
    if final:
        stop = len(text) - len(follows)
    elif not text.startswith(rest + follows, start):
        stop = text.find(follows, start)
    if start > stop or not text.startswith(follows, stop):
        return None
    if thought and text[:start].rstrip().endswith("</think>"):
        # Kept, so that it is learned; in another form it has no place in the answer.
        start -= len(thought)
        if not text.startswith(thought, start):
            return None
    return (start, stop) if text[start:stop].strip() in (said.strip(), rest.strip()) else None


def _thought(said: str) -> str:
    """Return the thought that an answer begins with, and the space around it.

    >>> _thought("<think>Hm.</think>\\n\\nYes."), _thought("Yes.")
    ('<think>Hm.</think>\\n\\n', '')
    """
    found = _THOUGHT.match(said)
    return found[0] if found else ""


def answer_at(template: Template, text: str, stands: Stands, end: str, said: str, place: int) -> Answer:
    """Return where an answer stands that says `said` at a place of the response; `end` is what ends the last one."""
    start, stop, follows = stands
    return Answer(start, stop, stop + _end_length(template, follows, end), place + said.rindex(text[start:stop]))


def _end_length(template: Template, follows: str, end: str) -> int:
    """Return how much of what follows an answer ends it: what ends the last, or a marker that is next to it."""
    if end and follows.startswith(end):
        return len(end)
    start, stop = template.marker(follows)
    return stop if not follows[:start].strip() else 0


def named(sample: Sample, number: int) -> str:
    """Name a turn, by its number among those before the response and of it."""
    return (*sample.messages, *sample.turns)[number].place or f"messages[{number}]"


def otherwise(sample: Sample, number: int) -> CorpusError:
    """Return the error of an answer before the last, by its number, that the template writes in a way of its own."""
    return CorpusError(
        f"{sample.location}: the chat template writes {named(sample, number)}, an answer before the last one, "
        "otherwise than it is; make a record of each answer, with what is before it"
    )
