"""What a ranking asks of an index, wherever its rows are."""

from typing import Any, Protocol, runtime_checkable

from rapidin_vdb.index.index import Ranked


@runtime_checkable
class Searchable(Protocol):
    """What a ranking needs of an index; `ShardedIndex` says what each returns."""

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        ...

    def search(self, queries: Any, top_k: int, *, among: Any = None) -> list[Ranked]:
        """Return the best samples for each query."""
        ...

    def search_both(self, queries: Any, top_k: int, *, among: Any = None) -> tuple[list[Ranked], list[Ranked]]:
        """Return the best, and the worst."""
        ...

    def group_sums(self, queries: Any, row_ids: Any, groups: Any, count: int) -> Any:
        """Return sums of scores."""
        ...

    def scores(self, queries: Any, *, among: Any = None) -> Any:
        """Return all scores."""
        ...
