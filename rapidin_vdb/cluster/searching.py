"""An index spread over the nodes of a cluster: every actor holds a share of the rows, and all of them must answer."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from rapidin_vdb.cluster.connection import (
    connect,
    could_not_begin,
    first_words,
    lost_errors,
    nodes_of,
    told_from_here,
)
from rapidin_vdb.compute import use_threads
from rapidin_vdb.errors import PurgedError, RapidInError, SpecError, TableError
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.index import Held, Ranked, check_top_k
from rapidin_vdb.machine import cores
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.store import SAMPLES, Place, SampleTable, Share, TableVersion
from rapidin_vdb.table_index import held_by

logger = logging.getLogger(__name__)

# A share that is lost is read again from the table; so often, with one question.
_LIVES = 3
_LOOK_SECONDS = 30.0


class ShardWorker:
    """Holds one share of a database's rows, at whatever version the last question was about."""

    def __init__(self, uri: str, part: int, parts: int, settings: dict[str, str]) -> None:
        """`settings` are those of the driver's environment that say where an object store is."""
        os.environ.update(settings)
        # To an actor that claims no CPU, Ray gives one thread.
        use_threads(cores())
        self._uri, self._part, self._parts = uri, part, parts
        self._table: SampleTable | None = None
        # In memory only: nothing is built under a name that does not exist.
        self._keepers = {name: IndexKeeper(Path(f"/nonexistent/{name}")) for name in ("samples", "tokens")}

    def ask(self, held: Held, method: str, arguments: tuple[Any, ...], among: Any) -> Any:
        """Return what the share's index says at a version of a table, or why it cannot."""
        try:
            version = self._version(held)
            if version is None or held_by(version) != held:
                raise TableError(f"version {held.version} of {self._uri} is another one here; is it the same place?")
            index = self._keepers[held.table].fresh(Share(version, self._part, self._parts))
            if method == "count":
                return index.samples
            if method == "group_sums":
                return index.group_sums(*arguments)
            return getattr(index, method)(*arguments, among=among)
        except RapidInError as error:
            return told_from_here(error)

    def _version(self, held: Held) -> TableVersion | None:
        """Return the version that is asked about.

        Raises:
            PurgedError: it is gone, since it was asked about.
        """
        if self._table is None:
            self._table = SampleTable(self._uri)
        table = self._table if held.table == SAMPLES else self._table.tokens
        try:
            return table.snapshot(held.version)
        except TableError as error:
            newest = table.snapshot()
            # It was there a moment ago, for whoever asked.
            if newest is not None and newest.version > held.version and newest.digest_of(held.version) is None:
                raise PurgedError(
                    f"version {held.version} of {self._uri} is gone: a purge removed it; run the same command again"
                ) from error
            raise


class ClusterIndex:
    """The RapidGrads of one version of a table, on the nodes of a cluster; asked as an index of one machine is."""

    def __init__(self, ask: Callable[..., list[Any]], held: Held, samples: int) -> None:
        self._ask = ask
        self.held = held
        """Which version of which table it holds."""
        self.samples = samples
        """How many samples it holds."""

    def search(self, queries: np.ndarray, top_k: int, *, among: np.ndarray | None = None) -> list[Ranked]:
        """Return the `top_k` samples of largest inner product with each query, best first, ties by sample id.

        Each share's answer is exact, and so is their merge.

        Raises:
            SpecError: `top_k` is not positive.
        """
        check_top_k(top_k)
        return _merged(self._ask(self.held, "search", queries, (top_k,), among), top_k, sign=1)

    def search_both(
        self, queries: np.ndarray, top_k: int, *, among: np.ndarray | None = None
    ) -> tuple[list[Ranked], list[Ranked]]:
        """Return what `search` does, and the `top_k` of lowest inner product, lowest first."""
        check_top_k(top_k)
        answers = self._ask(self.held, "search_both", queries, (top_k,), among)
        return (
            _merged([answer[0] for answer in answers], top_k, sign=1),
            _merged([answer[1] for answer in answers], top_k, sign=-1),
        )

    def group_sums(self, queries: np.ndarray, row_ids: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
        """Return the sum of each query's scores over each of `count` groups of rows, [queries, groups]."""
        answers = self._ask(self.held, "group_sums", queries, (row_ids, groups, count), None)
        return np.sum(answers, axis=0)

    def scores(self, queries: np.ndarray, *, among: np.ndarray | None = None) -> np.ndarray:
        """Return the scores of all samples, or of those among some row ids, in float32 and in no particular order."""
        return np.concatenate(self._ask(self.held, "scores", queries, (), among), axis=1)


class ClusterKeeper:
    """Keeps the shares of one database on the nodes of a cluster, and brings them to whatever version is asked for."""

    def __init__(self, place: Place, address: str) -> None:
        """Ask for an actor a node.

        Raises:
            SpecError: there is no such cluster, or no node in it has CPUs.
        """
        self._ray = connect(address)
        self._uri, self._settings = place.address, place.settings
        self._parts = max(1, len(nodes_of(self._ray)))
        self._nodes: dict[int, str] = {}
        self._answered: set[int] = set()
        self._indexes: dict[str, ClusterIndex] = {}
        """The last of each table: what is known of an index, such as the lengths of groups, goes by the object."""
        self._actors = {part: self._start(part) for part in range(self._parts)}

    def _start(self, part: int, *, besides: Collection[str] = ()) -> Any:
        """Start the actor of a share on the node that has the fewest, if possible on none of some others."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = sorted(nodes_of(self._ray))
        if not nodes:
            raise SpecError("the cluster has no node with CPUs")
        self._nodes.pop(part, None)
        self._answered.discard(part)
        shares = Counter(self._nodes.values())
        chosen = min(nodes, key=lambda node: (node in besides, shares[node]))
        self._nodes[part] = chosen
        # No CPUs are claimed: where a node is lost, another takes its share besides its own. What claims nothing goes
        # to nodes drawn by lot, whatever node was asked for, unless it is to go to no other.
        where = NodeAffinitySchedulingStrategy(chosen, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": where, "max_concurrency": 1}
        worker = self._ray.remote(ShardWorker).options(**options)
        return worker.remote(self._uri, part, self._parts, self._settings)

    def check(self, name: str | None) -> None:
        """Refuse the name of an index (`SpecError`)."""
        if name is not None:
            raise SpecError("--index names an index of this machine; leave it or --cluster out")

    def fresh(self, snapshot: TableVersion, *, name: str | None = None, progress: Progress = silent) -> ClusterIndex:
        """Return an index of exactly this version of the table.

        Raises:
            SpecError: a built index is asked for.
            TableError: the shares do not make up the table.
        """
        self.check(name)
        held, rows = held_by(snapshot), snapshot.rows()
        progress("index", 0, rows)
        found = sum(self._ask(held, "count", None, (), None))
        if found != rows:
            raise TableError(f"the nodes of the cluster hold {found} of {rows} rows of {self._uri}; no answer is given")
        progress("index", rows, rows)
        index = self._indexes.get(held.table)
        if index is None or index.held != held:
            index = self._indexes[held.table] = ClusterIndex(self._ask, held, rows)
        return index

    def _ask(
        self, held: Held, method: str, queries: np.ndarray | None, more: tuple[Any, ...], among: np.ndarray | None
    ) -> list[Any]:
        """Return what every share says; one that is lost is read again from the table, and asked again."""
        arguments = (*(() if queries is None else (queries,)), *more)
        shared = self._ray.put(arguments), self._ray.put(among)
        lives = dict.fromkeys(range(self._parts), _LIVES)
        answers: dict[int, Any] = {}
        # Ray takes a node for living until some time after its end.
        lost: set[str] = set()
        waiting = {self._put(part, held, method, shared): part for part in lives}
        told = False
        while waiting:
            done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=_LOOK_SECONDS)
            if not done and not told:
                silent_nodes = ", ".join(sorted({self._nodes[part] for part in waiting.values()}))
                logger.warning("still waiting for %d shares of the index, on nodes %s", len(waiting), silent_nodes)
                told = True
            for ref in done:
                part = waiting.pop(ref)
                try:
                    answer = self._ray.get(ref)
                except lost_errors(self._ray) as error:
                    if could_not_begin(error):
                        # Others may be as dead: with the next question, all that never answered are started anew.
                        self._actors = {each: self._actors[each] for each in self._answered}
                        raise TableError(
                            f"node {self._nodes[part]} cannot hold a share of the index: {first_words(error)}; no "
                            "answer is given. All nodes need the same packages"
                        ) from error
                    lives[part] -= 1
                    if not lives[part]:
                        raise TableError(
                            f"a share of the index was lost {_LIVES} times: {first_words(error)}; no answer is given"
                        ) from error
                    logger.warning("a share of the index was lost: it is read again from the table")
                    lost.add(self._nodes[part])
                    self._actors[part] = self._start(part, besides=lost)
                    waiting[self._put(part, held, method, shared)] = part
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                self._answered.add(part)
                answers[part] = answer
        return [answers[part] for part in range(self._parts)]

    def _put(self, part: int, held: Held, method: str, shared: tuple[Any, Any]) -> Any:
        if part not in self._actors:
            self._actors[part] = self._start(part)
        return self._actors[part].ask.remote(held, method, *shared)


def _merged(answers: list[list[Ranked]], top_k: int, *, sign: int) -> list[Ranked]:
    """Return the first `top_k` of all shares for each query: by score, then by id.

    >>> _merged([[[("b", 2.0), ("c", 1.0)]], [[("a", 2.0)]]], 2, sign=1)
    [[('a', 2.0), ('b', 2.0)]]
    """
    return [
        sorted((pair for ranked in found for pair in ranked), key=lambda pair: (-sign * pair[1], pair[0]))[:top_k]
        for found in zip(*answers, strict=True)
    ]
