"""Which sample each row of the table `tokens` belongs to, in 12 bytes a row."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64

# An array of plain strings holds 2 GiB of text, which are the names of some 33 million samples.
_NAME = pa.large_string()


@dataclass(frozen=True, eq=False)
class Owners:
    """The samples of one version's tokens."""

    row_ids: Int64[np.ndarray, " tokens"]
    """Of the tokens."""
    numbers: Int32[np.ndarray, " tokens"]
    """Which of the samples each belongs to."""
    samples: pa.Array
    """The samples, each once, as `named` names them."""

    def tokens_of(self, samples: pa.ChunkedArray) -> tuple[Int64[np.ndarray, " matching"], int]:
        """Return the row ids of the tokens of some samples, named by `named`, and how many of these have any."""
        mine = pc.is_in(self.samples, samples.cast(_NAME)).to_numpy(zero_copy_only=False)
        having = int(mine.sum())
        return self.row_ids if having == len(mine) else self.row_ids[mine[self.numbers]], having


def named(rows: Any) -> Any:
    """Return what names each row's sample and its content, of a table or batch with both columns.

    A hash has no NUL in it, so that no two pairs share a name.
    """
    return pc.binary_join_element_wise(rows.column("sample_id"), rows.column("content_hash"), "\0")


def owners_of(batches: Iterable[pa.RecordBatch], row_id: str) -> Owners:
    """Return the owners of tokens, whose rows come some at a time; `row_id` names the column of their row ids.

    Those of one sample lie side by side as a rule: the names of a run of them are kept once.
    """
    row_ids, lengths, samples = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [pa.array([], _NAME)]
    for batch in batches:
        runs = pc.run_end_encode(named(batch))
        row_ids.append(batch.column(row_id).to_numpy().astype(np.int64))
        lengths.append(np.diff(runs.run_ends.to_numpy(), prepend=0))
        samples.append(runs.values.cast(_NAME))
    encoded = pa.concat_arrays(samples).dictionary_encode()
    numbers = np.repeat(encoded.indices.to_numpy().astype(np.int32), np.concatenate(lengths))
    return Owners(np.concatenate(row_ids), numbers, encoded.dictionary)


class Having:
    """Which samples may have tokens in one version of the table: all that have any, and hardly another.

    They are known by hashes, in 8 bytes a sample: a writer that knows them needs not read the table to see that what it
    is about to write is not there.
    """

    def __init__(self, version: int, sample_ids: Iterable[str]) -> None:
        self.version = version
        """The version."""
        self._hashes = np.unique(hashes_of(sample_ids))

    def among(self, sample_ids: Iterable[str]) -> list[str]:
        """Return those of some samples that may have tokens, each once, in order."""
        names = sorted(set(sample_ids))
        found = np.isin(hashes_of(names), self._hashes, kind="sort")
        return [name for name, is_found in zip(names, found.tolist(), strict=True) if is_found]

    def add(self, sample_ids: Iterable[str]) -> None:
        """Note that some samples have tokens, too."""
        new = np.setdiff1d(hashes_of(sample_ids), self._hashes)
        self._hashes = np.insert(self._hashes, np.searchsorted(self._hashes, new), new)

    def note_ours(self, version: int) -> None:
        """Note a version that we made, of which all is known; where another came between, both are looked at again."""
        if version == self.version + 1:
            self.version = version


def hashes_of(names: Iterable[str]) -> Int64[np.ndarray, " names"]:
    """Return a hash of each name, which is another in each process: it is kept nowhere else."""
    return np.fromiter(map(hash, names), np.int64)
