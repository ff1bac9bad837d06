"""A sample becomes token ids, with its prompt masked and the place of each response token in the text."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rapidin_vdb.corpus.answers import write
from rapidin_vdb.corpus.samples import by_itself
from rapidin_vdb.corpus.template import Template
from rapidin_vdb.corpus.written import Written
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Encoded, Sample

Tokenizer = Any
"""A fast tokenizer of Hugging Face transformers. No protocol: it makes its attributes up as they are asked for, which
Python 3.12 does not count as having them."""


# A tokenizer's tokens take some 200 bytes a character in Python.
_CHARACTERS = 4 << 20


def encode(
    samples: Sequence[Sample], *, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> list[Encoded | CorpusError]:
    """Return each sample's token ids, an error in the place of each that leaves no token with a loss.

    Prompt and response are tokenised together as one text, and the end-of-sequence token follows, or what a chat
    template ends an answer with. A token belongs to the response when it starts at or after the response's first
    character; the very first token of all is predicted from nothing and so carries no loss. Where a response is made of
    several turns, the tokens of its answers belong to it, and what ends each. Longer samples are cut from the right.
    Turns from fields beside a conversation have no part in what a template writes that cannot write them.
    """
    samples = [template.fitting(sample) for sample in samples]
    results: list[Encoded | CorpusError | None] = [None] * len(samples)
    texts: list[tuple[int, Written]] = []
    for place, sample in enumerate(samples):
        try:
            texts.append((place, write(template, sample)))
        except CorpusError as error:
            results[place] = error
    for special in (True, False):
        for group in _in_parts([entry for entry in texts if _adds_special(entry[1], tokenizer) == special]):
            tokens = tokenizer(
                [written.text for _, written in group],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                truncation=False,
                verbose=False,
            )
            for (place, written), ids, spans in zip(group, tokens["input_ids"], tokens["offset_mapping"], strict=True):
                results[place] = _encoded(samples[place], written, ids, spans, tokenizer.eos_token_id, max_tokens)
    return [result for result in results if result is not None]


def _in_parts(texts: Sequence[tuple[int, Written]]) -> Iterator[Sequence[tuple[int, Written]]]:
    """Yield texts in parts of some characters: all tokens of a part are held, also of texts that are cut then."""
    first = held = 0
    for number, (_, written) in enumerate(texts):
        if held and held + len(written.text) > _CHARACTERS:
            yield texts[first:number]
            first, held = number, 0
        held += len(written.text)
    if first < len(texts):
        yield texts[first:]


def _adds_special(written: Written, tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is to add its own tokens: not where the text begins with the first of them."""
    return written.special and not (bool(tokenizer.bos_token) and written.text.startswith(str(tokenizer.bos_token)))


def _encoded(
    sample: Sample, written: Written, ids: list[int], spans: list[tuple[int, int]], eos: int | None, max_tokens: int
) -> Encoded | CorpusError:
    response = sample.response if written.said is None else written.said
    length, begin, end = len(response), written.start, written.start + len(written.response)
    # Nor a second one behind a text that ends with it.
    if not written.ended and eos is not None and not (ids and ids[-1] == eos):
        ids, spans = [*ids, eos], [*spans, (0, 0)]
    offsets: list[tuple[int, int]] = []
    # The response is a suffix, with what ends it: walk back until a token starts before it.
    for place in range(len(ids) - 1, 0, -1):
        first, last = spans[place]
        if (first, last) == (0, 0):
            # A special token of no text: the end of the sequence, or (with no response token behind it) a beginning.
            if offsets and offsets[-1][0] < length:
                break
            offsets.append((length, length))
        elif first >= end:
            offsets.append((length, length))
        elif first >= begin:
            offsets.append((first - begin + written.left_out, min(last, end) - begin + written.left_out))
        else:
            break
    offsets.reverse()
    first = len(ids) - len(offsets)
    places = None
    if written.earlier:
        earlier = _earlier(written, spans[:first])
        places = [place for place, _ in earlier] + list(range(first, len(ids)))
        offsets, first = [span for _, span in earlier] + offsets, places[0] if places else first
    truncated = len(ids) > max_tokens
    if truncated:
        ids = ids[:max_tokens]
        kept = max_tokens - first if places is None else sum(place < max_tokens for place in places)
        offsets, places = offsets[: max(kept, 0)], places and places[:kept]
        if places:
            ids = ids[: places[-1] + 1]  # nothing behind it is predicted
    if not offsets:
        return CorpusError(
            f"{sample.location}: no response token is left within --max-tokens {max_tokens}: the prompt takes {first}"
            if truncated
            else f"{sample.location}: the response has no token with a loss"
        )
    # Said, too, where turns from fields beside it were written: by this `as_written` knows it.
    said = sample.response if written.said is None and by_itself(sample) is not sample else written.said
    return Encoded(
        sample_id=sample.sample_id,
        input_ids=tuple(ids),
        offsets=tuple(offsets),
        truncated=truncated,
        places=None if places is None else tuple(places),
        response=said,
        unwritten=_unwritten(sample, written.text),
    )


def _unwritten(sample: Sample, text: str) -> str:
    """Return where the first turn stands in its record that a text does not have as it is, thoughts aside."""
    for turn in (*sample.messages, *sample.turns) if len(sample.messages) > 1 or sample.turns else ():
        said = turn.content.rpartition("</think>")[2].strip()
        if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            return f"{turn.place or 'a turn'} (role {turn.role})"
    return ""


def as_written(sample: Sample, encoded: Encoded) -> Sample:
    """Return a sample as its tokens are of it: with what a template wrote beside its contents, and no more turns."""
    return by_itself(sample) if encoded.response is None else replace(sample, response=encoded.response)


def _earlier(written: Written, spans: Sequence[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
    """Return which of the tokens before the last answer belong to others, and where they stand in the response."""
    found: list[tuple[int, tuple[int, int]]] = []
    answers = iter(written.earlier)
    answer = next(answers, None)
    for place, (first, last) in enumerate(spans):
        while answer is not None and first >= answer.end:
            answer = next(answers, None)
        if answer is None:
            break
        if place == 0 or first < answer.start or first == last:
            continue
        begin, end = (min(border, answer.stop) - answer.start + answer.place for border in (first, last))
        found.append((place, (begin, end)))
    return found
