"""Where the answers of a conversation stand in what a chat template writes of it."""

import re
from collections.abc import Sequence
from dataclasses import replace

from rapidin_vdb.corpus.template import Template
from rapidin_vdb.corpus.turns import joined
from rapidin_vdb.corpus.written import Answer, Written, mark_unlike
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Message, Sample


def write(template: Template, sample: Sample) -> Written:
    """Return the text that the model is trained on, with the places of all answers that have a loss.

    Of a response of several turns, the answers before the last are found by marks in their places.

    Raises:
        CorpusError: the template cannot write this conversation, or writes an answer otherwise than it is.
    """
    if not sample.turns:
        return template.write(sample)
    _, places = joined(sample.turns)
    *earlier, last = (number for number, turn in enumerate(sample.turns) if turn.role == "assistant")
    mark = mark_unlike(sample.turns)
    marked = tuple(
        replace(turn, content=f"{mark}{number}{mark}") if number in earlier else turn
        for number, turn in enumerate(sample.turns)
    )
    written, other = (
        template.write(_ending(sample, turns[:last], sample.turns[last])) for turns in (sample.turns, marked)
    )
    before, end = written.text[: written.start], written.text[written.start + len(written.response) :]
    around = re.split(f"{mark}[0-9]+{mark}", other.text[: other.start])
    answers: list[Answer] = []
    start = len(around[0])
    for number, follows in zip(earlier, around[1:], strict=False):
        said, final = sample.turns[number].content, number == earlier[-1]
        stop = _stop(before, start, said, follows, final=final)
        if stop is None:
            break
        ended = len(end) if follows.startswith(end) else 0
        answers.append(Answer(start, stop, stop + ended, places[number] + said.rindex(before[start:stop])))
        start = stop + len(follows)
    if len(around) != len(earlier) + 1 or len(answers) != len(earlier) or not before.startswith(around[0]):
        raise CorpusError(
            f"{sample.location}: the chat template writes answers before the last one otherwise than they are in "
            "this conversation; make a record of each answer, with what is before it"
        )
    left_out = places[last] + written.left_out
    return replace(written, left_out=left_out, earlier=tuple(answers))


def _ending(sample: Sample, turns: Sequence[Message], answer: Message) -> Sample:
    """Return a conversation with its last answer as the response."""
    before = (*sample.messages, *turns)
    return replace(sample, messages=before, prompt="", response=answer.content, turns=())


def _stop(text: str, start: int, said: str, follows: str, *, final: bool) -> int | None:
    """Return where an answer ends in a text, given where it starts and what follows it; None where it is another.

    Spaces around it, and a part before it, as thoughts, may be left out. What follows the `final` one ends the text.
    """
    stop = start + len(said)
    if final:
        stop = len(text) - len(follows)
    elif not text.startswith(said + follows, start):
        stop = text.find(follows, start)
    return stop if start <= stop and text.startswith(follows, stop) and text[start:stop] in said else None
