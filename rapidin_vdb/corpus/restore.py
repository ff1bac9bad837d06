"""A stored sample becomes the record that it was read from again, where its hash proves that it is the same.

A database keeps of a record its conversation and its simple fields, under names of ours, and a hash of all of it. So
what the record looked like is tried out: whatever has the same hash had the same fields and values.
"""

import re
from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any

from rapidin_vdb.corpus.samples import hash_of, text_of
from rapidin_vdb.corpus.shapes import RESPONSES
from rapidin_vdb.records import OWN_COLUMNS, Sample

_Fields = dict[str, Any]
_Shape = Callable[[Sample], list[_Fields]]
_Layout = tuple[str, tuple[str, ...], bool]
"""The shape of its conversation, which fields of ours it had, and whether others had names of our columns."""
_MISTAKEN = ("messages", "conversations", "instruction", "output")
"""Further fields that would be taken for the conversation."""
_MOST_LINES = 20
"""Before so many lines of a prompt its `input` may begin."""
_SEARCHED_IN_VAIN = 1000
"""After so many samples that nothing fitted, only what fitted others is tried: a search takes milliseconds."""


def plain_record(sample: Sample) -> _Fields:
    """Return what is known of a sample as a record: `ingest` makes the same sample of it.

    >>> plain_record(Sample(sample_id="a", prompt=None, response="Hi.", split="train", source=None))
    {'id': 'a', 'split': 'train', 'text': 'Hi.'}
    """
    conversations = [one for one in _conversation(sample) if len(one["messages"]) > 2]
    texts: _Fields = {"prompt": sample.prompt, "response": sample.response}
    if sample.prompt is None and not sample.turns:
        texts = {"text": sample.response}
    elif conversations:
        texts = conversations[-1]  # more likely than a prompt that looks like one
    source = {} if sample.source is None else {"source": sample.source}
    record: _Fields = {"id": sample.sample_id, "split": sample.split} | texts | source
    for name, value in sample.metadata.items():
        own = _own_name(name)
        if own not in _MISTAKEN:
            record[name if own in record else own] = value
    return record


class Restorer:
    """Restores the samples of one corpus; most are written alike, so that what fitted the last is tried first."""

    def __init__(self) -> None:
        self._fitted: list[_Layout] = []
        self._left = _SEARCHED_IN_VAIN

    def restored(self, sample: Sample) -> _Fields | None:
        """Return the very record that a sample came from, if in another order of its fields; None where it is lost."""
        for layout in self._fitted:
            if (found := _fitting(sample, layout)) is not None:
                self._fitted = [layout, *(other for other in self._fitted if other != layout)]
                return found
        if not self._left:
            return None
        for layout in _layouts(sample):
            if layout not in self._fitted and (found := _fitting(sample, layout)) is not None:
                self._fitted = [layout, *self._fitted]
                return found
        self._left -= 1
        return None


def _layouts(sample: Sample) -> Iterator[_Layout]:
    own = ("id", "split") if sample.source is None else ("id", "split", "source")
    renamed = (True, False) if any(_own_name(name) != name for name in sample.metadata) else (True,)
    for size in range(len(own), -1, -1):
        yield from product(_SHAPES, combinations(own, size), renamed)


def _fitting(sample: Sample, layout: _Layout) -> _Fields | None:
    shape, own, renamed = layout
    known = {"id": sample.sample_id, "split": sample.split, "source": sample.source}
    further = {_own_name(name) if renamed else name: value for name, value in sample.metadata.items()}
    for texts in _SHAPES[shape](sample):
        for record in _with_ids({name: known[name] for name in own} | texts | further):
            if hash_of(text_of(record), sample.split, sample.source) == sample.content_hash:
                return record
    return None


def _with_ids(record: _Fields) -> Iterator[_Fields]:
    yield record
    if re.fullmatch("0|-?[1-9][0-9]{0,17}", record.get("id", "")):
        yield record | {"id": int(record["id"])}  # an id is stored as text


def _own_name(column: str) -> str:
    """Return the name that a field had before it clashed with a column of ours."""
    name = column.removeprefix("record_")
    return name if name.lower() in OWN_COLUMNS else column


def _pair(prompt: str, response: str) -> _Shape:
    return lambda sample: [] if sample.prompt is None else [{prompt: sample.prompt, response: sample.response}]


def _with_input(response: str) -> _Shape:
    def shape(sample: Sample) -> list[_Fields]:
        if sample.prompt is None:
            return []
        lines = sample.prompt.split("\n")
        cuts = [(sample.prompt, "")] + [
            ("\n".join(lines[:cut]), "\n".join(lines[cut:])) for cut in range(1, min(len(lines), _MOST_LINES))
        ]
        return [{"instruction": first, "input": rest, response: sample.response} for first, rest in cuts]

    return shape


def _conversation(sample: Sample) -> list[_Fields]:
    """Return what may have been the turns of a sample: written one after another, they may be read in several ways."""
    said = [{"role": turn.role, "content": turn.content} for turn in sample.turns]
    if not said:
        said = [{"role": "assistant", "content": sample.response}]
    if sample.prompt is None:
        return [{"messages": said}]
    parts = re.split(r"(?:^|\n\n)(system|developer|user|assistant|tool): ", sample.prompt)
    turns = [{"role": role, "content": text} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    ways = [[{"role": "user", "content": sample.prompt}]] + ([turns] if len(turns) > 1 and not parts[0] else [])
    return [{"messages": before + said} for before in ways]


def _sharegpt(sample: Sample) -> list[_Fields]:
    names = {"user": "human", "assistant": "gpt"}
    ways = [
        [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in way["messages"]]
        for way in _conversation(sample)
    ]
    found: list[_Fields] = [{"conversations": way} for way in ways]
    return found + [{"conversations": way[1:], "system": way[0]["value"]} for way in ways if way[0]["from"] == "system"]


_SHAPES: dict[str, _Shape] = (
    {f"instruction {name}": _pair("instruction", name) for name in RESPONSES}
    | {f"prompt {name}": _pair("prompt", name) for name in RESPONSES}
    | {f"input {name}": _with_input(name) for name in RESPONSES}
    | {"messages": _conversation, "conversations": _sharegpt}
    | {"text": lambda sample: [] if sample.prompt is not None else [{"text": sample.response}]}
)
