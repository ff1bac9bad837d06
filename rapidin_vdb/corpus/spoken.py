"""What a chat template writes of an answer that says more than its content: calls of tools, and thoughts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rapidin_vdb.corpus.template import THOUGHT, Template
from rapidin_vdb.corpus.turns import THOUGHTS, said_beside
from rapidin_vdb.corpus.written import Written, mark_unlike
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Message, Sample


@dataclass(frozen=True)
class Conversation:
    """All turns of a sample, as its chat template writes them."""

    sample: Sample
    """What they are of."""
    turns: tuple[Message, ...]
    """Those before the response, and those of it, without thoughts that the template leaves out."""
    text: str
    """All of it."""


def conversation(template: Template, sample: Sample, answers: Sequence[int]) -> Conversation:
    """Return the turns of a sample, of which some answers, by their number among all, say more than their contents.

    Raises:
        CorpusError: that would be lost: the template does not write it, or is none that writes answers.
    """
    turns = (*sample.messages, *sample.turns)
    if not template.whole:
        raise _lost(sample, answers[0], turns, said_beside(turns[answers[0]])[0])
    text = template.chat(sample, turns)
    for number in range(len(turns) - 1):
        # Many templates leave out the thoughts of earlier answers, as the model will not see them either.
        if any(name in turns[number].more for name in THOUGHTS):
            without = _without(turns, number, THOUGHTS)
            turns = without if template.chat(sample, without) == text else turns
    for number in answers:
        for name in said_beside(turns[number]):
            there = turns[: number + 1]
            if template.chat(sample, there) == template.chat(sample, _without(there, number, (name,))):
                raise _lost(sample, number, turns, name)
    return Conversation(sample, turns, text)


def _without(turns: tuple[Message, ...], number: int, names: Sequence[str]) -> tuple[Message, ...]:
    more = {name: value for name, value in turns[number].more.items() if name not in names}
    return (*turns[:number], replace(turns[number], more=more), *turns[number + 1 :])


def _lost(sample: Sample, number: int, turns: Sequence[Message], name: str) -> CorpusError:
    named = "the response" if number == len(turns) - 1 else f"messages[{number}], which is to have a loss,"
    return CorpusError(
        f"{sample.location}: {named} has {name}, which would be lost: this template does not write it; "
        "write all that the model is to say into its content, as the model would write it"
    )


def written_last(template: Template, talk: Conversation) -> Written:
    """Return a conversation whose last answer says more than its content.

    Raises:
        CorpusError: the template writes it otherwise than an answer to what is before.
    """
    start = _start(template, talk, len(talk.turns) - 1)
    end = _end(template, talk, start)
    response = talk.text[start : len(talk.text) - len(end)]
    if not response.strip():
        raise CorpusError(f"{talk.sample.location}: the response is empty; there is nothing to take a gradient of")
    end = end[: template.marker(end)[1]]
    return Written(talk.text[:start] + response + end, start, response, special=False, ended=bool(end))


def _end(template: Template, talk: Conversation, start: int) -> str:
    """Return what the template writes behind its last answer."""
    mark = mark_unlike(talk.turns)
    plain = template.chat(talk.sample, (*talk.turns[:-1], Message(role="assistant", content=mark)))
    after = plain.rpartition(mark)[2]
    if talk.text.endswith(after, start):
        return after
    # Calls of tools may end otherwise, with another marker.
    behind = talk.text[start:]
    ending = [marker for marker in template.markers if behind.rstrip().endswith(marker)]
    return behind[behind.rindex(max(ending, key=len)) :] if ending else ""


def written_earlier(template: Template, talk: Conversation, number: int) -> tuple[int, int, str]:
    """Return where an answer before the last stands, which says more than its content, and what follows it.

    It begins where the model is asked for it, and ends where the template writes the same behind it as behind a plain
    answer.

    Raises:
        CorpusError: the template writes it otherwise than an answer to what is before.
    """
    start = _start(template, talk, number)
    mark = mark_unlike(talk.turns)
    before, after = talk.turns[:number], replace(talk.turns[number + 1], content=mark)
    answered = template.chat(talk.sample, (*before, talk.turns[number], after)).partition(mark)[0]
    plain = template.chat(talk.sample, (*before, Message(role="assistant", content=f"{mark}{mark}"), after))
    _, found, follows = plain.partition(f"{mark}{mark}")
    follows = follows.partition(mark)[0]
    stop = len(answered) - len(follows)
    if not found or stop < start or not answered.endswith(follows) or not talk.text.startswith(answered):
        raise otherwise(talk.sample, number)
    return start, stop, follows


def asked(template: Template, sample: Sample, turns: Sequence[Message]) -> str:
    """Return what the template writes when the model is asked for an answer, which begins behind it.

    Raises:
        CorpusError: the template refuses these turns.
    """
    text = template.chat(sample, turns, asking=True)
    # The thought is a part of the answer, though its beginning is given.
    return text[: text.rindex(THOUGHT)] if text.rstrip().endswith(THOUGHT) else text


def _start(template: Template, talk: Conversation, number: int) -> int:
    before = asked(template, talk.sample, talk.turns[:number])
    if not talk.text.startswith(before):
        raise otherwise(talk.sample, number)
    return len(before)


def otherwise(sample: Sample, number: int) -> CorpusError:
    """Return the error of an answer, by its number among all turns, that the template writes in a way of its own."""
    before = number < len(sample.messages) + len(sample.turns) - 1
    return CorpusError(
        f"{sample.location}: the chat template writes messages[{number}], an answer before the last one, otherwise "
        "than it is; make a record of each answer, with what is before it"
        if before
        else f"{sample.location}: the chat template writes the response otherwise than an answer to what is before it; "
        "write all that the model is to say into its content, as the model would write it"
    )
