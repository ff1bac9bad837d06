"""RapidGrads made on a cluster: actors that each hold the model once, fed from the driver's one queue of batches."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from rapidin_vdb.cluster.actor import GradientWorker
from rapidin_vdb.cluster.connection import (
    connect,
    first_words,
    lost_errors,
    may_lack_memory,
    model_from_anywhere,
    nodes_of,
)
from rapidin_vdb.cluster.layout import Layout, layout_of
from rapidin_vdb.compute import (
    Batch,
    Compute,
    DeviceError,
    Result,
    Road,
    Waiting,
    WorkerSpec,
    names_of,
    road_without_model,
)
from rapidin_vdb.errors import GradientError, SpecError
from rapidin_vdb.gradient import default_batch_tokens, weight_bytes

logger = logging.getLogger(__name__)

# A batch that has taken so many workers with it is not tried again; nor are more workers started in a row in vain.
_LIVES = 3
_STARTS = 5
# Batches that a worker has at once: the next is there while the driver writes what came before.
_AHEAD = 2
# The cluster may be busy with other work.
_ROOM_SECONDS = 600.0
_LOOK_SECONDS = 5.0


def road_on_cluster(
    spec: WorkerSpec, *, address: str, workers_per_device: int, batch_tokens: int | None
) -> tuple[Road, int]:
    """Return the road through a cluster's workers, and how many tokens a batch may have there.

    Raises:
        SpecError: there is no such cluster, no such device in it, or no room on it.
        ModelError: the model's tokenizer or configuration cannot be loaded here.
    """
    ray = connect(address)
    layout = layout_of(list(nodes_of(ray).values()), device=spec.device, workers_per_device=workers_per_device)
    # As every node finds them; what the database says of itself stays.
    spec = replace(
        spec,
        model=model_from_anywhere(spec.model, spec.fingerprint.model),
        adapter=model_from_anywhere(spec.adapter, spec.fingerprint.adapter),
        device=layout.device,
        threads=max(1, int(layout.cpus)),
    )
    road = road_without_model(spec, compute_on_cluster(ray, spec, layout))
    if batch_tokens is None:
        batch_tokens = _batch_tokens_there(ray, road, spec, layout, workers_per_device)
    return road, batch_tokens


def _batch_tokens_there(ray: Any, road: Road, spec: WorkerSpec, layout: Layout, workers_per_device: int) -> int:
    """Return how many tokens a batch may have, by the memory that is free where a worker may run.

    Raises:
        SpecError: no node had room to look, or could.
    """
    # A look takes no CPU to speak of, but not none: nodes without are not for workers. Where memory is short, Ray would
    # itself try again for ever.
    options = {"num_cpus": min(0.01, layout.cpus), "num_gpus": layout.gpus, "max_retries": 0}
    look = ray.remote(default_batch_tokens).options(**options)
    dtype, quantization = spec.fingerprint.dtype, spec.fingerprint.quantization
    weights = weight_bytes(road.config, dtype=dtype, quantization=quantization)
    for life in range(_LIVES):
        found = look.remote(road.config, dtype=dtype, device=layout.device, workers=workers_per_device, weights=weights)
        try:
            return int(ray.get(found, timeout=_ROOM_SECONDS))
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(found, force=True)
            raise SpecError(
                f"no node of the cluster had room within {_ROOM_SECONDS:.0f} s to look how much memory a worker has "
                f"there (which takes {layout.gpus:g} GPUs). Wait until other work is done, or say it: --batch-tokens N"
            ) from error
        except ray.exceptions.RayError as error:
            if isinstance(error, lost_errors(ray)) and life < _LIVES - 1:
                continue
            # Of what was raised there, Ray's own text is a traceback.
            raise SpecError(
                "no node of the cluster could look how much memory a worker has there: "
                f"{first_words(getattr(error, 'cause', None) or error)}. See to it, or say it: --batch-tokens N"
            ) from error
    raise AssertionError("unreachable")


def compute_on_cluster(ray: Any, spec: WorkerSpec, layout: Layout) -> Compute:
    """Return a function that shares batches among actors; a finished batch comes first, whoever did it.

    An actor that dies, or whose node does, or whose GPU fails, is reported; its batch goes back to the queue, and
    another actor is asked for, which need not find room: those that live go on. Where that one's GPU fails before it
    has done a batch, no other is asked for.
    """

    def compute(batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        first = next(batches, None)
        if first is None:
            return  # no worker need be started
        crew = _Crew(ray, spec, layout)
        try:
            yield from crew.share(chain([first], batches))
        finally:
            crew.end()

    return compute


class _Crew:
    """The actors of one ingest."""

    def __init__(self, ray: Any, spec: WorkerSpec, layout: Layout) -> None:
        self._ray, self._spec, self._layout = ray, spec, layout
        self._lost: tuple[type[Exception], ...] = (*lost_errors(ray), DeviceError)
        self._starting: dict[Any, Any] = {}
        # What each actor that runs has been given, in the order in which it does it.
        self._given: dict[Any, list[Any]] = {}
        self._busy: dict[Any, tuple[Any, Batch, int]] = {}
        # Those in the place of one whose GPU failed, most likely on the same, for as long as they have done nothing.
        self._doubted: set[Any] = set()
        self._failed = 0
        for _ in range(layout.workers):
            self._start()

    def _start(self, *, doubted: bool = False) -> None:
        actor = self._ray.remote(GradientWorker).options(**self._layout.options).remote(self._spec)
        self._starting[actor.ready.remote()] = actor
        if doubted:
            self._doubted.add(actor)

    def share(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        waiting, since = Waiting(batches), time.monotonic()
        while True:
            while self._give(waiting):
                pass
            if self._given and not self._busy:
                return  # nobody has anything to do
            # Of several that are ready Ray names the first: one that has started is not kept waiting by those at work.
            found, _ = self._ray.wait([*self._starting, *self._busy], num_returns=1, timeout=_LOOK_SECONDS)
            if self._busy or found:
                since = time.monotonic()
            elif time.monotonic() - since > _ROOM_SECONDS:
                raise SpecError(
                    f"the cluster has had no room for a worker for {_ROOM_SECONDS:.0f} s; each wants "
                    f"{self._layout.cpus:g} CPUs and {self._layout.gpus:g} GPUs of a node. What was done before is kept"
                )
            for ref in found:
                if ref in self._starting:
                    self._started(ref)
                    continue
                for done in self._done(ref, waiting):
                    # The next one is on its way before this one is written.
                    self._give(waiting)
                    yield done

    def _give(self, waiting: Waiting) -> bool:
        """Give the next batch to the actor that has least to do and may have it; say whether it could be."""
        sound = any(actor not in self._doubted for actor in self._given)
        for actor in sorted(self._given, key=lambda actor: len(self._given[actor])):
            if len(self._given[actor]) >= _AHEAD:
                return False
            # What came back from a GPU that failed is for others, so that it is found out whose fault it was.
            task = waiting.next(untried=sound and actor in self._doubted)
            if task is not None:
                ref = actor.make.remote(task[0])
                self._given[actor].append(ref)
                self._busy[ref] = (actor, *task)
                return True
        return False

    def _started(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._lost as error:
            self._failed += 1
            if self._failed >= _STARTS:
                raise GradientError(f"{self._failed} workers died while they started: {first_words(error)}") from error
            self._start()
            return
        self._failed = 0
        self._given[actor] = []

    def _done(self, ref: Any, waiting: Waiting) -> list[tuple[Batch, list[Result]]]:
        """Return what has become of a batch, or of all that an actor had which is lost."""
        actor = self._busy[ref][0]
        try:
            answer = self._answer(ref)
        except self._lost:
            return self._parted(actor, waiting)
        self._given[actor].remove(ref)
        self._doubted.discard(actor)
        return [(self._busy.pop(ref)[1], answer)]

    def _answer(self, ref: Any) -> list[Result]:
        answer = self._ray.get(ref)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _parted(self, actor: Any, waiting: Waiting) -> list[tuple[Batch, list[Result]]]:
        """Part with an actor that is lost: return what it has done, and put the rest back into the queue."""
        self._ray.kill(actor)  # it may only be out of reach
        done: list[tuple[Batch, list[Result]]] = []
        blamed: Exception | None = None
        for ref in self._given.pop(actor):
            _, batch, attempt = self._busy.pop(ref)
            try:
                done.append((batch, self._answer(ref)))
                self._doubted.discard(actor)
            except self._lost as error:
                if blamed is not None:
                    waiting.back(batch, attempt)  # it had not begun
                    continue
                blamed = error
                waiting.back(batch, attempt + 1, too_large=self._bury(actor, batch, attempt, error))
        if not (isinstance(blamed, DeviceError) and actor in self._doubted):
            self._start(doubted=isinstance(blamed, DeviceError))
        return done

    def _bury(self, actor: Any, batch: Batch, attempt: int, error: Exception) -> bool:
        """Report a dead worker, and say whether its batch is likely to have been too large.

        Raises:
            GradientError: others would end as it did, or there is no other.
        """
        names = names_of(batch)
        if attempt >= _LIVES:
            raise GradientError(
                f"{attempt} workers died on the {len(batch)} samples {names} (the last: {first_words(error)}); what "
                "was done before is kept. Run again with fewer --workers-per-device or smaller --batch-tokens"
            ) from error
        if isinstance(error, DeviceError) and actor in self._doubted:
            if not (self._given or self._starting):
                raise GradientError(
                    f"{error}, as before, with no batch done in between, and no other worker is left; what was done "
                    "before is kept. See to that GPU, and run it again to go on"
                ) from error
            logger.warning("%s, as before: its %d samples (%s) go back to the queue, and others go on without it",
                           error, len(batch), names)  # fmt: skip
            return False
        killed = len(batch) > 1 and may_lack_memory(self._ray, error, attempt)
        what = str(error) if isinstance(error, DeviceError) else "a worker died"
        logger.warning("%s: its %d samples (%s) go back to the queue%s, and another is started",
                       what, len(batch), names, " in halves" if killed else "")  # fmt: skip
        return killed

    def end(self) -> None:
        """Let all actors go."""
        for actor in [*self._given, *self._starting.values()]:
            self._ray.kill(actor)
