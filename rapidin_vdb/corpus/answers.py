"""Where the answers of a conversation stand in what a chat template writes of it."""

import re
from collections.abc import Sequence
from dataclasses import replace

from rapidin_vdb.corpus.template import Template
from rapidin_vdb.corpus.turns import is_trained, joined
from rapidin_vdb.corpus.written import Answer, Written, mark_unlike
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Message, Sample

_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def write(template: Template, sample: Sample) -> Written:
    """Return the text that the model is trained on, with the places of all answers that have a loss.

    Of a response of several turns, the answers before the last are found by marks in their places.

    Raises:
        CorpusError: the template cannot write this conversation, or writes an answer otherwise than it is.
    """
    if not sample.turns:
        return template.write(sample)
    _, places = joined(sample.turns)
    *earlier, last = (number for number, turn in enumerate(sample.turns) if is_trained(turn))
    mark = mark_unlike((*sample.messages, *sample.turns))
    # Thoughts stay before the marks: some templates write an empty one where there is none.
    marked = tuple(
        replace(turn, content=f"{_thought(turn.content)}{mark}{number}{mark}") if number in earlier else turn
        for number, turn in enumerate(sample.turns)
    )
    written, other = (
        template.write(_ending(sample, turns[:last], sample.turns[last])) for turns in (sample.turns, marked)
    )
    before, end = written.text[: written.start], written.text[written.start + len(written.response) :]
    around = re.split(f"{mark}[0-9]+{mark}", other.text[: other.start])
    if len(around) != len(earlier) + 1 or not before.startswith(around[0]):
        raise _otherwise(sample, earlier[0])
    answers: list[Answer] = []
    start = len(around[0])
    for number, follows in zip(earlier, around[1:], strict=True):
        said, final = sample.turns[number].content, number == earlier[-1]
        found = _found(before, start, said, follows, final=final)
        if found is None:
            raise _otherwise(sample, number)
        start, stop = found
        ended = _end_length(template, follows, end)
        answers.append(Answer(start, stop, stop + ended, places[number] + said.rindex(before[start:stop])))
        start = stop + len(follows)
    left_out = places[last] + written.left_out
    return replace(written, left_out=left_out, earlier=tuple(answers))


def _otherwise(sample: Sample, number: int) -> CorpusError:
    return CorpusError(
        f"{sample.location}: the chat template writes messages[{len(sample.messages) + number}], an answer before the "
        "last one, otherwise than it is; make a record of each answer, with what is before it"
    )


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
