"""Many short texts in few bytes: one behind the other, in memory or mapped from a file."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
from jaxtyping import Int64, UInt8


class Texts(Sequence[str]):
    """A sequence of texts that takes 8 bytes for each besides its UTF-8."""

    def __init__(self, parts: Iterable[tuple[Int64[np.ndarray, " texts"], UInt8[np.ndarray, " bytes"]]]) -> None:
        """Take runs of texts: where each of them ends, and their bytes one behind the other.

        Raises:
            ValueError: the ends of a run do not ascend to where its bytes end.
        """
        self._parts = [(ends, content) for ends, content in parts if len(ends)]
        for ends, content in self._parts:
            if int(ends[-1]) != len(content) or int(ends[0]) < 0 or not (ends[1:] >= ends[:-1]).all():
                raise ValueError("the ends of texts do not fit them")
        self._starts = [0, *accumulate(len(ends) for ends, _ in self._parts)]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Return texts, packed."""
        encoded = [text.encode("utf-8") for text in texts]
        ends = np.fromiter(accumulate(map(len, encoded)), np.int64, len(encoded))
        return cls([(ends, np.frombuffer(b"".join(encoded), np.uint8))])

    @classmethod
    def joined(cls, several: Iterable["Texts"]) -> "Texts":
        """Return some texts and then others; nothing is copied."""
        return cls(part for texts in several for part in texts._parts)

    def packed(self) -> tuple[Int64[np.ndarray, " texts"], UInt8[np.ndarray, " bytes"]]:
        """Return where each text ends, and all their bytes one behind the other."""
        before = [0, *accumulate(len(content) for _, content in self._parts)]
        ends = [ends + start for (ends, _), start in zip(self._parts, before, strict=False)]
        return (
            np.concatenate([np.empty(0, np.int64), *ends]),
            np.concatenate([np.empty(0, np.uint8), *(content for _, content in self._parts)]),
        )

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> "Texts": ...

    def __getitem__(self, number: int | slice) -> "str | Texts":
        if isinstance(number, slice):
            return Texts.of(self[place] for place in range(*number.indices(len(self))))
        place = range(len(self))[number]  # as any sequence: from behind, too, and none beyond
        part = bisect_right(self._starts, place) - 1
        ends, content = self._parts[part]
        within = place - self._starts[part]
        start = int(ends[within - 1]) if within else 0
        return content[start : int(ends[within])].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        for ends, content in self._parts:
            start = 0
            for end in ends.tolist():
                yield content[start:end].tobytes().decode("utf-8")
                start = end
