"""Where the answers of a conversation stand in what a chat template writes of it."""

from collections.abc import Sequence
from dataclasses import replace

from rapidin_vdb.corpus.marks import answer_at, find_marked, marked, otherwise
from rapidin_vdb.corpus.spoken import write_spoken
from rapidin_vdb.corpus.template import Template
from rapidin_vdb.corpus.turns import is_trained, joined, said_beside
from rapidin_vdb.corpus.written import Written, mark_unlike
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Message, Sample


def write(template: Template, sample: Sample) -> Written:
    """Return the text that the model is trained on, with the places of all answers that have a loss.

    Raises:
        CorpusError: the template cannot write this conversation, or writes an answer otherwise than it is.
    """
    written = _write(template, sample, ())
    if not sample.behind or not template.whole:
        return written
    said = sample.turns or (Message(role="assistant", content=sample.response),)
    try:
        whole = template.chat(sample, (*sample.messages, *said, *sample.behind))
    except CorpusError:
        return written
    # Some write the thoughts of an answer only where no user's turn follows.
    return written if whole.startswith(written.text) else _write(template, sample, sample.behind)


def _write(template: Template, sample: Sample, behind: Sequence[Message]) -> Written:
    """Return the text up to the response's end, as it is written where some turns stand behind it."""
    if not sample.turns:
        return template.write(sample, behind)
    # Where only the last answer has a loss, whatever its weight, it is the only one here.
    numbers = [number for number, turn in enumerate(sample.turns) if is_trained(turn)] or [0]
    if any(said_beside(sample.turns[number]) for number in numbers):
        return write_spoken(template, sample, numbers, behind)
    return _write_plain(template, sample, numbers, behind)


def _write_plain(template: Template, sample: Sample, numbers: Sequence[int], behind: Sequence[Message]) -> Written:
    """Return a conversation whose answers say no more than their contents."""
    first, (*earlier, last) = len(sample.messages), numbers
    mark = mark_unlike((*sample.messages, *sample.turns, *behind))
    written, other = (
        template.write(_ending(sample, turns[:last], sample.turns[last]), behind)
        for turns in (sample.turns, marked(sample.turns, earlier, mark))
    )
    before, end = written.text[: written.start], written.text[written.start + len(written.response) :]
    found = find_marked(before, other.text[: other.start], mark, [sample.turns[number] for number in earlier])
    if isinstance(found, int):
        raise otherwise(sample, first + earlier[found])
    _, places = joined(sample.turns)
    answers = [
        answer_at(template, before, stands, end, sample.turns[number].content, places[number])
        for number, stands in zip(earlier, found, strict=True)
    ]
    return replace(written, left_out=places[last] + written.left_out, earlier=tuple(answers))


def _ending(sample: Sample, turns: Sequence[Message], answer: Message) -> Sample:
    """Return a conversation with its last answer as the response."""
    before = (*sample.messages, *turns)
    return replace(sample, messages=before, prompt="", response=answer.content, turns=())
