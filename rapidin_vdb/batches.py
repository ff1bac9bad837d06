"""Samples cut into batches of like length; apart from `plan`, so that it needs no table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from rapidin_vdb.errors import CorpusError
from rapidin_vdb.records import Encoded, Sample

Pair = tuple[Sample, Encoded]
T = TypeVar("T")

# What the RapidGrads of a batch may take, in single precision and in half beside it.
_RAPIDGRAD_BYTES = 1 << 30


def padded_tokens(batch: Sequence[Encoded]) -> int:
    """Return how many tokens go through the model for a batch, padding included."""
    return len(batch) * max(len(sample.input_ids) for sample in batch)


def cut(items: Iterable[T], length: Callable[[T], int], *, tokens: int, most: int | None = None) -> Iterator[list[T]]:
    """Yield items in batches of like length: at most `most` of them, and `tokens` tokens with padding; or one item.

    Items of one length stay in their order.

    >>> list(cut(["aaaa", "b", "cc", "d"], len, tokens=4))
    [['b', 'd'], ['cc'], ['aaaa']]
    """
    batch: list[T] = []
    for item in sorted(items, key=length):
        # Sorted: the newest is the longest.
        if batch and (len(batch) == most or length(item) * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def planned_batches(
    window: Sequence[Pair | CorpusError], todo: dict[str, str], batch_tokens: int, *, width: int
) -> Iterator[list[Pair]]:
    """Yield the planned samples of a window in batches of like length, taking them off the plan.

    A batch has at most `batch_tokens` tokens, and no more samples than RapidGrads of that width fit 1 GiB.

    Batches are cut from all samples of the window and then lose those that are stored: so a run that goes on after
    another was killed forms the same batches as if it had not been. Batches that lost some samples are cut anew.
    """
    pairs = [entry for entry in window if not isinstance(entry, CorpusError)]
    pairs.sort(key=lambda pair: pair[1].sample_id)
    rest: list[Pair] = []
    most = max(1, _RAPIDGRAD_BYTES // (6 * width))
    batches = partial(cut, length=lambda pair: len(pair[1].input_ids), tokens=batch_tokens, most=most)
    for batch in batches(pairs):
        wanted = _wanted(batch, todo)
        if len(wanted) == len(batch):
            yield batch
        else:
            rest += wanted
    yield from batches(rest)


def _wanted(batch: Sequence[Pair], todo: dict[str, str]) -> list[Pair]:
    """Take the planned samples of a batch off the plan; of two with one id, the one that the plan settled on."""
    wanted = []
    for pair in batch:
        if todo.get(pair[0].sample_id) == pair[0].content_hash:
            del todo[pair[0].sample_id]
            wanted.append(pair)
    return wanted
