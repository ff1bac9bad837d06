"""What may be asked of all rows at once: the best of them, sums of scores over groups, and histograms of scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rapidin_vdb.index.groups import add_up, members_of
from rapidin_vdb.index.index import Queries, Ranked, ShardedIndex, check_top_k
from rapidin_vdb.index.searchable import Searchable
from rapidin_vdb.index.shard import Found, ScanShard, all_of, best_of, of_shards
from rapidin_vdb.index.source import ArraySource

T = TypeVar("T")
Sums = Float64[np.ndarray, "_ groups"]
Scores = Float32[np.ndarray, "_ rows"]
End = Literal["highest", "lowest"]
Counted = tuple[Int64[np.ndarray, " bins"], Float64[np.ndarray, " edges"]]
"""How many scores there are in each bin of a histogram, and its edges, one more than bins."""

_SIGNS: dict[End, int] = {"highest": 1, "lowest": -1}
# Scores of all rows that are held at a time, for their histograms.
_SCORES_BYTES = 256 << 20
# Sums over groups that shards hold for themselves: of more, they add to the same ones, one shard after another.
_SUMS_BYTES = 256 << 20
# Candidates beyond those of a search, where rows come from a disk: looking for others would take another pass.
_FURTHER = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouping:
    """Which group each of some rows belongs to."""

    row_ids: Int64[np.ndarray, " samples"]
    """The rows, by their row ids."""
    groups: Int64[np.ndarray, " samples"]
    """The group of each, from 0."""
    count: int
    """How many groups there are."""
    probes: Float32[np.ndarray, "probes sketch"] | None = None
    """Further queries, of which sums over these groups alone are wanted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What was found."""

    ends: tuple[list[Ranked], ...]
    """For each end asked for, the best samples of each query: of largest scores first, or of lowest."""
    sums: Float64[np.ndarray, "queries groups"]
    """Sums of scores over groups: of none, where no grouping was given."""
    probed: Float64[np.ndarray, "probes groups"]
    """Those of its probes."""
    histograms: list[Counted]
    """One for each query, where bins were asked for."""


def survey(
    index: Searchable,
    queries: Queries,
    top_k: int,
    *,
    ends: tuple[End, ...] = ("highest",),
    among: Int64[np.ndarray, " row_ids"] | None = None,
    grouping: Grouping | None = None,
    bins: int = 0,
) -> Survey:
    """Return what `search`, `group_sums` and `scores` of an index say, by fewer passes over its rows.

    Where this process scans the rows itself, from wherever they are, one pass gives all of it. It takes another one
    where rounding leaves open which rows are the best, as `search` does, though seldom where rows come from a disk; and
    another where the scores of all rows and queries would take more than 256 MiB, and `bins` asks for histograms of
    them. A coarse index finds its best rows by folded ones, and one pass over the full rows gives the rest.

    `among` restricts ends and histograms to rows of those ids; sums are over the rows of `grouping`. All of it equals
    what those methods give one by one, but for the order in which scores are added up.

    Raises:
        SpecError: `top_k` is not positive.
    """
    check_top_k(top_k)
    if isinstance(index, ShardedIndex) and len(queries) and (grouping is not None or bins):
        shards = [shard for shard in index.full_shards if isinstance(shard, ScanShard)]
        if len(shards) == len(index.full_shards):
            scan = _Scan(index, shards, among, grouping)
            if index.full is None:
                return scan.survey(queries, top_k, ends, bins)
            # Of a coarse index, folded rows tell which are the best.
            best = _ends(index, queries, top_k, ends, among)
            return replace(scan.survey(queries, top_k, (), bins), ends=best)
    sums, probed = np.zeros((len(queries), 0)), np.zeros((0, 0))
    if grouping is not None:
        members = grouping.row_ids, grouping.groups, grouping.count
        sums, probed = index.group_sums(queries, *members), np.zeros((0, grouping.count))
        if grouping.probes is not None:
            probed = index.group_sums(grouping.probes, *members)
    return Survey(
        ends=_ends(index, queries, top_k, ends, among),
        sums=sums,
        probed=probed,
        histograms=list(_histograms(index, queries, among, bins)) if bins else [],
    )


def _ends(
    index: Searchable, queries: Queries, top_k: int, ends: tuple[End, ...], among: np.ndarray | None
) -> tuple[list[Ranked], ...]:
    if len(ends) > 1:
        highest, lowest = index.search_both(queries, top_k, among=among)
        return tuple(highest if end == "highest" else lowest for end in ends)
    # What is lowest is highest of the negated query.
    return tuple(
        index.search(queries, top_k, among=among)
        if end == "highest"
        else _negated(index.search(-queries, top_k, among=among))
        for end in ends
    )


def _negated(found: list[Ranked]) -> list[Ranked]:
    return [[(name, -score) for name, score in ranked] for ranked in found]


def _histograms(index: Searchable, queries: Queries, among: np.ndarray | None, bins: int) -> Iterator[Counted]:
    step = max(1, _SCORES_BYTES // (4 * max(index.samples, 1)))
    for first in range(0, len(queries), step):
        for scores in index.scores(queries[first : first + step], among=among):
            yield _counted(scores, bins)


def _counted(scores: Float32[np.ndarray, " samples"], bins: int) -> Counted:
    """Return the histogram of some scores; zeros, where there are none."""
    if not len(scores):
        return np.zeros(bins, np.int64), np.zeros(bins + 1)
    counts, edges = np.histogram(scores.astype(np.float64), bins)
    return counts.astype(np.int64), edges


class _Best:
    """The rows at one end of those that came."""

    def __init__(self, end: End, wanted: int) -> None:
        self._sign = _SIGNS[end]
        self.wanted = wanted
        self.found: Found | None = None
        """Their scores, times the end's sign, and their numbers; None where no row came."""

    def add(self, scores: Scores, numbers: Int64[np.ndarray, " rows"]) -> None:
        """Add rows, with the scores of each query."""
        scores, found = scores if self._sign > 0 else -scores, [] if self.found is None else [self.found]
        if self.found is not None and self.found[0].shape[1] == self.wanted:
            # Behind the first few rows there is hardly one better than the last.
            some = np.flatnonzero((scores > self.found[0][:, -1:]).any(axis=0))
            scores, numbers = scores[:, some], numbers[some]
        if len(numbers):
            self.found = best_of([*found, all_of(scores, numbers)], self.wanted)


class _Gathered:
    """What the rows of one shard have shown."""

    def __init__(self, best: Sequence[_Best], sums: Sequence[Sums], scores: Scores) -> None:
        """`scores` has room for those of all rows, or of none."""
        self.best, self._sums = best, sums
        self._scores, self._held = scores, 0
        self.low, self.high = (np.full(len(scores), bound, np.float32) for bound in (np.inf, -np.inf))

    def add(self, numbers: Int64[np.ndarray, " rows"], scores: Scores) -> None:
        """Take rows for ends and histograms."""
        for best in self.best:
            best.add(scores, numbers)
        if self._scores.shape[1]:
            self._scores[:, self._held : self._held + len(numbers)] = scores
            self._held += len(numbers)
        self.low = np.minimum(self.low, scores.min(axis=1, initial=np.inf))
        self.high = np.maximum(self.high, scores.max(axis=1, initial=-np.inf))

    def add_up(self, groups: Int64[np.ndarray, " rows"], several: Sequence[Scores]) -> None:
        """Add scores to the sums of the groups that their rows belong to; -1 stands for none."""
        inside = groups >= 0
        if not inside.all():
            groups, several = groups[inside], [scores[:, inside] for scores in several]
        for sums, scores in zip(self._sums, several, strict=True):
            add_up(sums, groups, scores)


class _Scan:
    """A pass over the rows of an index, and of which of them what is wanted."""

    def __init__(
        self, index: ShardedIndex, shards: Sequence[ScanShard], among: np.ndarray | None, grouping: Grouping | None
    ) -> None:
        self._index, self._shards, self._owned = index, shards, index.full_numbers
        self._rows, self._grouping = index.rows_among(among), grouping
        # By number: of which rows ends and histograms are; and the group of each, or -1.
        self._mine = np.full(len(index.keys), self._rows is None)
        if self._rows is not None:
            self._mine[self._rows] = True
        self._members = np.full(len(index.keys), -1)
        if grouping is not None:
            self._members = members_of(index.keys, grouping.row_ids, grouping.groups)
        self._counts = [int(np.count_nonzero(self._mine[numbers])) for numbers in self._owned]

    def survey(self, queries: Queries, top_k: int, ends: tuple[End, ...], bins: int) -> Survey:
        """Return what is wanted."""
        grouping, count = self._grouping, sum(self._counts)
        probes = queries[:0] if grouping is None or grouping.probes is None else grouping.probes
        several = [queries, probes]
        asked, groups = sum(map(len, several)), 0 if grouping is None else grouping.count
        shared = 8 * groups * asked * len(self._shards) > _SUMS_BYTES
        sums = [
            [np.zeros((len(batch), groups)) for batch in several]
            for _ in (self._shards[:1] if shared else self._shards)
        ]
        held = bins > 0 and 4 * len(queries) * count <= _SCORES_BYTES
        scores = np.empty((len(queries), count if held else 0), np.float32)
        rooms = np.split(scores, np.minimum(np.cumsum(self._counts)[:-1], scores.shape[1]), axis=1)
        wanted = top_k + max(self._index.slack(top_k), 0 if _in_memory(self._shards) else _FURTHER)
        gathered = [
            _Gathered([_Best(end, wanted) for end in ends], sums[0 if shared else place], room)
            for place, room in enumerate(rooms)
        ]

        def take(place: int, local: np.ndarray | None) -> None:
            for places, found in self._shards[place].scores_of(several, local):
                numbers = self._owned[place][places]
                gathered[place].add_up(self._members[numbers], found)
                mine = self._mine[numbers]
                gathered[place].add(*((numbers, found[0]) if mine.all() else (numbers[mine], found[0][:, mine])))

        self._pass(take, self._mine | (self._members >= 0), asked, together=not shared)
        added = [np.sum(of_batch, axis=0) for of_batch in zip(*sums, strict=True)]
        histograms = [_counted(of_query, bins) for of_query in scores] if held else []
        if bins and not held:
            histograms = self._counted_again(queries, gathered, bins)
        return Survey(
            ends=self._settled(queries, top_k, ends, [part.best for part in gathered]),
            sums=added[0],
            probed=added[1],
            histograms=histograms,
        )

    def _pass(
        self, take: Callable[[int, np.ndarray | None], T], wanted: np.ndarray, queries: int, *, together: bool = True
    ) -> list[T]:
        together = together and all(shard.side_by_side(queries) for shard in self._shards)
        return of_shards(take, self._owned, None if wanted.all() else wanted, together=together)

    def _settled(
        self, queries: Queries, top_k: int, ends: tuple[End, ...], candidates: Sequence[Sequence[_Best]]
    ) -> tuple[list[Ranked], ...]:
        """Return the ends by exact scores, from the candidates of each shard."""
        of_ends = [
            [best.found for best in of_end if best.found is not None] for of_end in zip(*candidates, strict=True)
        ]
        found = [best_of(of_end, candidates[0][0].wanted) for of_end in of_ends if of_end]
        if not found:
            return tuple([[] for _ in queries] for _ in ends)
        # All at once: what rounding leaves open takes one more pass.
        asked = np.concatenate([np.float32(_SIGNS[end]) * queries for end in ends])
        scores, numbers = (np.concatenate([end[kind] for end in found]) for kind in range(2))
        ranked = self._index.settled(asked, (scores, numbers), top_k, self._rows)
        parts = [ranked[first : first + len(queries)] for first in range(0, len(asked), len(queries))]
        return tuple(part if _SIGNS[end] > 0 else _negated(part) for end, part in zip(ends, parts, strict=True))

    def _counted_again(self, queries: Queries, gathered: Sequence[_Gathered], bins: int) -> list[Counted]:
        """Return histograms of scores, whose bounds are known, by another pass that holds some of them at a time."""
        low, high = np.min([part.low for part in gathered], axis=0), np.max([part.high for part in gathered], axis=0)

        def count(place: int, local: np.ndarray | None) -> np.ndarray:
            counts = np.zeros((len(queries), bins), np.int64)
            for _, scores in self._shards[place].scores(queries, local):
                # Scores of many queries may be rounded otherwise than before.
                for query, some in enumerate(np.clip(scores, low[:, None], high[:, None]).astype(np.float64)):
                    counts[query] += np.histogram(some, bins, (low[query], high[query]))[0]
            return counts

        counts = np.sum(self._pass(count, self._mine, len(queries)), axis=0)
        bounds = zip(low.astype(np.float64), high.astype(np.float64), strict=True)
        return list(zip(counts, (np.histogram_bin_edges(np.empty(0), bins, one) for one in bounds), strict=True))


def _in_memory(shards: Sequence[ScanShard]) -> bool:
    """Say whether rows are read from memory, each time."""
    return all(
        isinstance(shard.source, ArraySource) and not any(isinstance(array, np.memmap) for array in shard.source.arrays)
        for shard in shards
    )
