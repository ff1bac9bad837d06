"""Answers that say more than their contents, calls of tools and thoughts, as a chat template writes them.

Such an answer is all that the template writes in its place: between what it writes before and behind a plain answer
there, or, where that differs, from where the model is asked for it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from rapidin_vdb.corpus.marks import Stands, answer_at, find_marked, marked, named, otherwise
from rapidin_vdb.corpus.template import THOUGHT, Template
from rapidin_vdb.corpus.turns import THOUGHTS, joined, said_beside
from rapidin_vdb.corpus.written import Written, mark_unlike
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.records import Message, Sample

_Turns = tuple[Message, ...]
_Told = list[tuple[int, str, str, str]]
"""Of each thing that an answer says: the answer's number, what it is, the mark in its place, and its text."""


def write_spoken(template: Template, sample: Sample, numbers: Sequence[int], behind: Sequence[Message]) -> Written:
    """Return a conversation with some answers, by their number in the response, as it is written before other turns.

    Raises:
        CorpusError: something that an answer says is not written, or an answer not where it is known to stand.
    """
    first, turns = len(sample.messages), (*sample.messages, *sample.turns, *behind)
    places = [first + number for number in numbers]
    if not template.whole:
        number = next(number for number in places if said_beside(turns[number]))
        raise _lost(sample, number, said_beside(turns[number])[0])
    mark = mark_unlike(turns)
    instead, told = _with_marks(sample, turns, places, mark)
    talk = _Talk(template, sample, turns, places, template.chat(sample, turns), mark)
    unseen = _check_marks(talk, instead, told)
    written, stands = _placed(talk)
    start, stop = written.start, written.start + len(written.response)
    end = written.text[stop:]
    stands = [*stands, (start, stop, end)]
    _check_words(talk, unseen, dict(zip(places, stands, strict=True)))
    said = list(sample.turns)
    for number, (begin, close, _) in zip(numbers, stands, strict=True):
        if said_beside(said[number]):
            said[number] = replace(said[number], content=talk.text[begin:close])
    response, begins = joined(said)
    earlier = [
        answer_at(template, talk.text, place, end, said[number].content, begins[number])
        for number, place in zip(numbers[:-1], stands, strict=False)
    ]
    left_out = begins[numbers[-1]] + written.left_out
    return replace(written, left_out=left_out, earlier=tuple(earlier), said=response)


@dataclass(frozen=True)
class _Talk:
    """All turns of a sample, and what a template writes of them."""

    template: Template
    sample: Sample
    turns: _Turns
    answers: Sequence[int]
    """Which of them are to have a loss, by their number."""
    text: str
    mark: str
    """A text that is in none of them."""

    def write(self, turns: Sequence[Message]) -> str:
        return self.template.chat(self.sample, turns)

    def asked(self, turns: Sequence[Message]) -> str:
        """Return what is written when the model is asked for an answer to some turns."""
        text = self.template.chat(self.sample, turns, asking=True)
        # The thought is a part of the answer, though its beginning is given.
        return text[: text.rindex(THOUGHT)] if text.rstrip().endswith(THOUGHT) else text

    def ending(self, text: str) -> str:
        """Return the marker that a text ends with, and the space behind it; nothing where it ends with none."""
        markers = [marker for marker in self.template.markers if text.rstrip().endswith(marker)]
        return text[text.rindex(max(markers, key=len)) :] if markers else ""


def _check_marks(talk: _Talk, instead: _Turns, told: _Told) -> _Told:
    """See that all marks are written that stand in the place of what is said; return what could not be seen so.

    Raises:
        CorpusError: something is lost.
    """
    try:
        text = talk.write(instead)
    except CorpusError:
        return told  # it knows calls by their names, or wants them to be known
    for number, name, new, _ in told:
        if new not in text and json.dumps(new)[1:-1] not in text:
            raise _lost(talk.sample, number, name)
    return []


def _check_words(talk: _Talk, told: _Told, stands: Mapping[int, Stands]) -> None:
    """See that what is said stands, as it is and as often, in what was found of its answer.

    Raises:
        CorpusError: something is lost.
    """
    for (number, name, part), times in Counter((number, name, part) for number, name, _, part in told).items():
        start, stop, _ = stands[number]
        if len(re.findall(rf"(?<!\w){re.escape(part)}(?!\w)", talk.text[start:stop])) < times:
            raise _lost(talk.sample, number, name)


def _placed(talk: _Talk) -> tuple[Written, list[Stands]]:
    """Return the text up to the last answer's end, and where the answers before it stand."""
    *earlier, last = talk.answers
    for written, before in _last_answer(talk, last):
        try:
            other = before(marked(talk.turns, earlier, talk.mark))
        except CorpusError:
            continue
        stands = find_marked(
            written.text[: written.start], other, talk.mark, [talk.turns[number] for number in earlier]
        )
        if not isinstance(stands, int) and not _swallows(talk, stands):
            return written, stands
    # Some write what is between answers by what was called, or refuse results of tools that nothing called.
    for written, _ in _last_answer(talk, last):
        turns = _without_unseen_thoughts(talk)
        return written, [_by_what_is_before(talk, turns, number) for number in earlier]
    raise CorpusError(
        f"{talk.sample.location}: the chat template writes the response otherwise than an answer to what is before it; "
        "write all that the model is to say into its content, as the model would write it"
    )


def _swallows(talk: _Talk, stands: Sequence[Stands]) -> bool:
    """Say whether what was taken for an answer holds what others say behind it.

    Some write results of tools into the turn that called for them, and none behind a plain answer.
    """
    for (number, next_one), (_, _, follows) in zip(pairwise(talk.answers), stands, strict=True):
        others = talk.turns[number + 1 : next_one]
        if said_beside(talk.turns[number]) and any(turn.content.strip() not in follows for turn in others):
            return True
    return False


def _last_answer(talk: _Talk, last: int) -> Iterator[tuple[Written, Callable[[_Turns], str]]]:
    """Yield the text up to the last answer's end, in each way that it is found, and what gives what is before it."""
    answer, behind, text = talk.turns[last], talk.turns[last + 1 :], talk.text
    if not said_beside(answer):

        def plainly(turns: _Turns) -> Written:
            messages = turns[:last]
            sample = replace(talk.sample, messages=messages, prompt="", response=answer.content, turns=())
            return talk.template.write(sample, behind)

        def before_it(turns: _Turns) -> str:
            written = plainly(turns)
            return written.text[: written.start]

        if text.startswith((written := plainly(talk.turns)).text):
            yield written, before_it
        return

    def parts(turns: _Turns) -> tuple[str, str]:
        mark = f"{talk.mark}{talk.mark}"
        before, _, after = talk.write((*turns[:last], replace(answer, content=mark, more={}), *behind)).rpartition(mark)
        return before, after

    try:
        before, after = parts(talk.turns)
    except CorpusError:
        before, after = "", ""
    if before and text.startswith(before) and text.endswith(after, len(before)):
        yield _up_to(talk, len(before), after), lambda turns: parts(turns)[0]
    asked = talk.asked(talk.turns[:last]) if last else ""
    if text.startswith(asked):
        if not (before and text.endswith(after, len(asked))):
            after = "" if behind else talk.ending(text[len(asked) :])
        if after or not behind:
            yield _up_to(talk, len(asked), after), lambda turns: talk.asked(turns[:last])


def _up_to(talk: _Talk, start: int, after: str) -> Written:
    response = talk.text[start : len(talk.text) - len(after)]
    if not response.strip():
        raise CorpusError(f"{talk.sample.location}: the response is empty; there is nothing to take a gradient of")
    end = after[: talk.template.marker(after)[1]]
    return Written(talk.text[:start] + response + end, start, response, special=False, ended=bool(end))


def _by_what_is_before(talk: _Talk, turns: _Turns, number: int) -> Stands:
    """Return where an answer stands, from where the model is asked for it to the marker that ends it."""
    asked, there = talk.asked(turns[:number]) if number else "", talk.write(turns[: number + 1])
    said, plain = there[len(asked) :], turns[number].content.strip()
    end = talk.ending(said)
    if not there.startswith(asked) or not talk.text.startswith(there) or not end:
        raise otherwise(talk.sample, number)
    start, stop = len(asked), len(there) - len(end)
    if not said_beside(turns[number]):
        inside = talk.text[start:stop].rstrip()
        if not inside.endswith(plain):
            raise otherwise(talk.sample, number)
        start, stop = start + len(inside) - len(plain), start + len(inside)
    return start, stop, talk.text[stop : len(there)]


def _without_unseen_thoughts(talk: _Talk) -> _Turns:
    """Return the turns without thoughts that the template leaves out, which it may write where nothing follows them."""
    turns = talk.turns
    for number in range(len(turns) - 1):
        if any(name in turns[number].more for name in THOUGHTS):
            more = {name: value for name, value in turns[number].more.items() if name not in THOUGHTS}
            without = (*turns[:number], replace(turns[number], more=more), *turns[number + 1 :])
            turns = without if talk.write(without) == talk.text else turns
    return turns


def _with_marks(sample: Sample, turns: _Turns, answers: Sequence[int], mark: str) -> tuple[_Turns, _Told]:
    """Return turns with a mark in the place of each thing that answers say, but thoughts of earlier ones.

    Raises:
        CorpusError: a call of a tool has no name.
    """
    changed, told = list(turns), _Told()
    for number in answers:
        turn, beside = turns[number], said_beside(turns[number])
        if not beside:
            continue

        def instead(name: str, said: str, number: int = number) -> str:
            told.append((number, name, f"{mark}{len(told)}{mark}", said.strip()))
            return told[-1][2]

        content = instead("content", turn.content) if turn.content.strip() else turn.content
        more = dict(turn.more)
        if number == answers[-1]:
            thoughts = {str(more[name]): name for name in beside if name in THOUGHTS}
            for said, name in thoughts.items():  # one thought may stand under several names
                new = instead(name, said)
                more |= {other: new for other in THOUGHTS if str(more.get(other)) == said}
        try:
            if "tool_calls" in beside:
                calls = more["tool_calls"] if isinstance(more["tool_calls"], list) else [more["tool_calls"]]
                more["tool_calls"] = [_renamed(call, partial(instead, "tool_calls")) for call in calls]
            if "function_call" in beside:
                more["function_call"] = _renamed(more["function_call"], partial(instead, "function_call"))
        except SpecError as error:
            raise CorpusError(f"{sample.location}: in {named(sample, number)} {error}") from None
        changed[number] = replace(turn, content=content, more=more)
    return tuple(changed), told


def _renamed(call: Any, rename: Callable[[str], str]) -> Any:
    """Return the call of a tool with another name.

    Raises:
        SpecError: it has none.
    """
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return call | {"function": _renamed(call["function"], rename)}
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        return call | {"name": rename(call["name"])}
    raise SpecError(f"a call of a tool is {json.dumps(call, default=str)[:60]}; wanted an object with a name")


def _lost(sample: Sample, number: int, name: str) -> CorpusError:
    of = "the response" if number == len(sample.messages) + len(sample.turns) - 1 else named(sample, number)
    return CorpusError(
        f"{sample.location}: {of} has {name}, which would be lost: this template does not write it; write all that "
        "the model is to say into its content, as the model would write it"
    )
