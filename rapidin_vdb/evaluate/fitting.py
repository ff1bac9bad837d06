"""Which records of some files an experiment takes: those that fit, each question once."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rapidin_vdb.corpus import Template, by_itself, encode, read_records, sample_from
from rapidin_vdb.corpus.encode import Tokenizer
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.evaluate.corpora import Record
from rapidin_vdb.records import Encoded, Sample


def fitting(
    files: Sequence[Path], *, tokenizer: Tokenizer, template: Template, most: int,
    fits: Callable[[Sample, Encoded], bool], taken: Iterable[str] = (),
) -> list[Record]:  # fmt: skip
    """Return the first records of some files that fit, no question twice, as id, instruction and output.

    An id that is `taken`, or was seen before, as in another file, gets a number behind it.
    """
    found: list[Record] = []
    seen: set[str] = set()
    ids = set(taken)
    samples: list[Sample] = []
    for path in files:
        for record in read_records(path):
            if isinstance(record, CorpusError):
                continue
            try:
                samples.append(by_itself(sample_from(record)))  # as its template writes it
            except CorpusError:
                continue
    for first in range(0, len(samples), 1000):
        part = samples[first : first + 1000]
        encoded = encode(part, tokenizer=tokenizer, template=template, max_tokens=1 << 20)
        for sample, tokens in zip(part, encoded, strict=True):
            if isinstance(tokens, CorpusError) or sample.prompt is None or sample.prompt in seen:
                continue
            if not fits(sample, tokens):
                continue
            seen.add(sample.prompt)
            name = _unique(sample.sample_id, ids)
            ids.add(name)
            found.append({"id": name, "instruction": sample.prompt, "output": sample.response})
            if len(found) == most:
                return found
    return found


def _unique(name: str, taken: set[str]) -> str:
    """Return a name that is not taken.

    >>> _unique("a", {"b"}), _unique("a", {"a", "a-2"})
    ('a', 'a-3')
    """
    number, other = 1, name
    while other in taken:
        number += 1
        other = f"{name}-{number}"
    return other
