"""A sample becomes token ids, with its prompt masked and the place of each response token in the text."""

from collections.abc import Sequence
from typing import Any

from rapidin_vdb.corpus.template import Template, Written
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Encoded, Sample

Tokenizer = Any
"""A fast tokenizer of Hugging Face transformers. No protocol: it makes its attributes up as they are asked for, which
Python 3.12 does not count as having them."""


def encode(
    samples: Sequence[Sample], *, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> list[Encoded | CorpusError]:
    """Return each sample's token ids, an error in the place of each that leaves no token with a loss.

    Prompt and response are tokenised together as one text, and the end-of-sequence token follows, or what a chat
    template ends an answer with. A token belongs to the response when it starts at or after the response's first
    character; the very first token of all is predicted from nothing and so carries no loss. Longer samples are cut from
    the right.
    """
    results: list[Encoded | CorpusError | None] = [None] * len(samples)
    texts: list[tuple[int, Written]] = []
    for place, sample in enumerate(samples):
        try:
            texts.append((place, template.write(sample)))
        except CorpusError as error:
            results[place] = error
    for special in (True, False):
        group = [(place, written) for place, written in texts if _adds_special(written, tokenizer) == special]
        if not group:
            continue
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


def _adds_special(written: Written, tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is to add its own tokens: not where the text begins with the first of them."""
    return written.special and not (bool(tokenizer.bos_token) and written.text.startswith(str(tokenizer.bos_token)))


def _encoded(
    sample: Sample, written: Written, ids: list[int], spans: list[tuple[int, int]], eos: int | None, max_tokens: int
) -> Encoded | CorpusError:
    length, begin, end = len(sample.response), written.start, written.start + len(written.response)
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
    truncated = len(ids) > max_tokens
    if truncated:
        ids, offsets = ids[:max_tokens], offsets[: max(max_tokens - first, 0)]
    if not offsets:
        return CorpusError(
            f"{sample.location}: no response token is left within --max-tokens {max_tokens}: the prompt takes {first}"
            if truncated
            else f"{sample.location}: the response has no token with a loss"
        )
    return Encoded(sample_id=sample.sample_id, input_ids=tuple(ids), offsets=tuple(offsets), truncated=truncated)
