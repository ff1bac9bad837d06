"""Where the answers of a conversation stand in what a chat template writes of it."""

import re
from collections.abc import Sequence
from dataclasses import replace

from rapidin_vdb.corpus.spoken import asked, conversation, otherwise, written_earlier, written_last
from rapidin_vdb.corpus.template import Template
from rapidin_vdb.corpus.turns import is_trained, joined, said_beside
from rapidin_vdb.corpus.written import Answer, Written, mark_unlike
from rapidin_vdb.records import Message, Sample

_Stands = tuple[int, int, str]
"""Where an answer begins and ends in a text, and what follows it there."""
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def write(template: Template, sample: Sample) -> Written:
    """Return the text that the model is trained on, with the places of all answers that have a loss.

    Of a response of several turns, the answers before the last are found by marks in their places; those that say more
    than their contents by what the template writes up to them.

    Raises:
        CorpusError: the template cannot write this conversation, or writes an answer otherwise than it is.
    """
    if not sample.turns:
        return template.write(sample)
    # Where only the last answer has a loss, whatever its weight, it is the only one here.
    *earlier, last = [number for number, turn in enumerate(sample.turns) if is_trained(turn)] or [0]
    first, more = len(sample.messages), [n for n in (*earlier, last) if said_beside(sample.turns[n])]
    said, found = list(sample.turns), dict[int, _Stands]()
    talk = conversation(template, sample, [first + number for number in more]) if more else None
    if talk is not None:
        sample = replace(sample, messages=talk.turns[:first], turns=talk.turns[first:])
        for number in more:
            if number != last:
                start, stop, _ = found[number] = written_earlier(template, talk, first + number)
                said[number] = replace(said[number], content=talk.text[start:stop])
    if talk is not None and last in more:
        written = written_last(template, talk)
        said[last] = replace(said[last], content=written.response)
    else:
        written = template.write(_ending(sample, sample.turns[:last], sample.turns[last]))
        if talk is not None and not talk.text.startswith(written.text[: written.start]):
            raise otherwise(sample, first + last)
    found |= _marked(template, sample, written, [n for n in earlier if n not in more], last, spoken=last in more)
    response, places = joined(said)
    end = written.text[written.start + len(written.response) :]
    answers: list[Answer] = []
    for number in earlier:
        start, stop, follows = found[number]
        if answers and start < answers[-1].end:
            raise otherwise(sample, first + number)
        place = places[number] + said[number].content.rindex(written.text[start:stop])
        answers.append(Answer(start, stop, stop + _end_length(template, follows, end), place))
    left_out = places[last] + written.left_out
    return replace(written, left_out=left_out, earlier=tuple(answers), said=response if more else None)


def _marked(
    template: Template, sample: Sample, written: Written, numbers: Sequence[int], last: int, *, spoken: bool
) -> dict[int, _Stands]:
    """Return where those answers before the last stand that say no more than their contents, by marks in their places.

    `spoken` says whether the last says more than its content.
    """
    if not numbers:
        return {}
    mark = mark_unlike((*sample.messages, *sample.turns))
    # Thoughts stay before the marks: some templates write an empty one where there is none.
    marked = tuple(
        replace(turn, content=f"{_thought(turn.content)}{mark}{number}{mark}") if number in numbers else turn
        for number, turn in enumerate(sample.turns)
    )
    if spoken:
        other = asked(template, sample, (*sample.messages, *marked[:last]))
    else:
        ending = template.write(_ending(sample, marked[:last], sample.turns[last]))
        other = ending.text[: ending.start]
    before, around = written.text[: written.start], re.split(f"{mark}[0-9]+{mark}", other)
    first = len(sample.messages)
    if len(around) != len(numbers) + 1 or not before.startswith(around[0]):
        raise otherwise(sample, first + numbers[0])
    found: dict[int, _Stands] = {}
    start = len(around[0])
    for number, follows in zip(numbers, around[1:], strict=True):
        stands = _found(before, start, sample.turns[number].content, follows, final=number == numbers[-1])
        if stands is None:
            raise otherwise(sample, first + number)
        found[number] = (*stands, follows)
        start = stands[1] + len(follows)
    return found


def _thought(said: str) -> str:
    """Return the thought that an answer begins with, and the space around it.

    >>> _thought("<think>Hm.</think>\\n\\nYes."), _thought("Yes.")
    ('<think>Hm.</think>\\n\\n', '')
    """
    found = _THOUGHT.match(said)
    return found[0] if found else ""


def _end_length(template: Template, follows: str, end: str) -> int:
    """Return how much of what follows an answer ends it: what ends the last, or a marker that is next to it."""
    if end and follows.startswith(end):
        return len(end)
    start, stop = template.marker(follows)
    return stop if not follows[:start].strip() else 0


def _ending(sample: Sample, turns: Sequence[Message], answer: Message) -> Sample:
    """Return a conversation with its last answer as the response."""
    before = (*sample.messages, *turns)
    return replace(sample, messages=before, prompt="", response=answer.content, turns=())


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
    return (start, stop) if text[start:stop] in said else None
