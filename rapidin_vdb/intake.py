"""What is to be ingested: the samples of some files, window by window, with their tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rapidin_vdb.batches import Pair
from rapidin_vdb.corpus import Template, Tokenizer, as_written, encode, read_corpus
from rapidin_vdb.errors import CorpusError, check_unicode
from rapidin_vdb.records import Sample, Turns

# Records checked, encoded and sorted by length together.
_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What to ingest."""

    paths: tuple[Path, ...]
    """Files, in order."""
    split: str | None = None
    """Wins over the records' own field; `train` without either."""
    source: str | None = None
    """Wins over the records' own field."""
    id_field: str = "id"
    """Which field holds the sample id."""
    limit: int | None = None
    """How many records to read at most."""
    turns: Turns = "last"
    """Which turns of the assistant have a loss."""

    def __post_init__(self) -> None:
        """Refuse what no sample could have.

        Raises:
            SpecError: a split or source is no valid Unicode.
        """
        check_unicode(self.split, "--split")
        check_unicode(self.source, "--source")

    def read(self) -> Iterator[Sample | CorpusError]:
        """Yield the samples, an error in the place of each record that cannot be one."""
        samples = read_corpus(
            self.paths, split=self.split, source=self.source, id_field=self.id_field, turns=self.turns
        )
        return islice(samples, self.limit)


def encoded_windows(
    corpus: Corpus, *, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> Iterator[list[Pair | CorpusError]]:
    """Yield a corpus's samples with their tokens, some at a time, an error in the place of each that has none."""
    samples = corpus.read()
    while window := list(islice(samples, _WINDOW)):
        yield _encode_window(window, tokenizer=tokenizer, template=template, max_tokens=max_tokens)


def _encode_window(
    window: Sequence[Sample | CorpusError], *, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> list[Pair | CorpusError]:
    samples = [entry for entry in window if isinstance(entry, Sample)]
    encoded = iter(encode(samples, tokenizer=tokenizer, template=template, max_tokens=max_tokens))
    result: list[Pair | CorpusError] = []
    for entry in window:
        if isinstance(entry, CorpusError):
            result.append(entry)
        else:
            tokens = next(encoded)
            result.append(tokens if isinstance(tokens, CorpusError) else (as_written(entry, tokens), tokens))
    return result
