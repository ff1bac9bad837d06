"""RapidGrads made on a cluster: actors that each hold the model once, fed from the driver's one queue of batches."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from rapidin_vdb.cluster.connection import connect, nodes_of
from rapidin_vdb.compute import (
    Batch,
    Compute,
    Result,
    Road,
    WorkerSpec,
    load_of,
    make_batch,
    road_without_model,
    use_threads,
)
from rapidin_vdb.engine import Engine
from rapidin_vdb.errors import GradientError, RapidInError, SpecError
from rapidin_vdb.gradient import default_batch_tokens

logger = logging.getLogger(__name__)

# A batch that has taken so many workers with it is not tried again; nor are more workers started in a row in vain.
_LIVES = 3
_STARTS = 5
# The cluster may be busy with other work.
_ROOM_SECONDS = 600.0
_LOOK_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How workers are spread over a cluster."""

    workers: int
    """How many."""
    device: str
    """Where each computes, `cpu` or `cuda`."""
    cpus: float
    """What each takes of a node's CPUs."""
    gpus: float
    """What each takes of a node's GPUs."""

    @property
    def options(self) -> dict[str, Any]:
        """The same in Ray's words."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": "SPREAD"}


def layout_of(nodes: list[dict[str, float]], *, device: str, workers_per_device: int) -> Layout:
    """Return how workers are spread: so many a GPU, or, where there are none, so many a node.

    >>> layout_of([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}], device="auto", workers_per_device=2)
    Layout(workers=8, device='cuda', cpus=1.0, gpus=0.5)
    >>> layout_of([{"CPU": 8.0}, {"CPU": 4.0}], device="auto", workers_per_device=2)
    Layout(workers=4, device='cpu', cpus=2.0, gpus=0.0)

    Raises:
        SpecError: there is no such device in the cluster.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise SpecError(f"--device is {device}; with --cluster, wanted auto, cpu or cuda: Ray deals out the GPUs")
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if device == "cuda" and not gpus:
        raise SpecError("the cluster has no GPU; leave --device out")
    if gpus and device != "cpu":
        return Layout(workers=gpus * workers_per_device, device="cuda", cpus=1.0, gpus=1 / workers_per_device)
    if not nodes:
        raise SpecError("the cluster has no node with CPUs")
    share = min(node["CPU"] for node in nodes) / workers_per_device
    return Layout(
        workers=len(nodes) * workers_per_device, device="cpu", cpus=share if share < 1 else float(int(share)), gpus=0.0
    )


class GradientWorker:
    """A worker on some node: it loads the model when the first batch comes, and answers batches."""

    def __init__(self, spec: WorkerSpec) -> None:
        use_threads(spec.threads)
        self._spec = spec
        self._engine: Engine | None = None

    def ready(self) -> bool:
        """Answer, once it runs."""
        return True

    def make(self, batch: Batch) -> list[Result] | RapidInError:
        """Return what each sample of a batch is turned into, or why the model cannot be loaded here."""
        try:
            if self._engine is None:
                self._engine = load_of(self._spec)
        except RapidInError as error:
            from ray.util import get_node_ip_address

            return type(error)(f"on the node {get_node_ip_address()}: {error}")
        return make_batch(self._engine, batch, self._spec.token_width)


def road_on_cluster(
    spec: WorkerSpec, *, address: str, workers_per_device: int, batch_tokens: int | None
) -> tuple[Road, int]:
    """Return the road through a cluster's workers, and how many tokens a batch may have there.

    Raises:
        SpecError: there is no such cluster, or no such device in it.
        ModelError: the model's tokenizer or configuration cannot be loaded here.
    """
    ray = connect(address)
    layout = layout_of(nodes_of(ray), device=spec.device, workers_per_device=workers_per_device)
    spec = replace(spec, device=layout.device, threads=max(1, int(layout.cpus)))
    road = road_without_model(spec, compute_on_cluster(ray, spec, layout))
    if batch_tokens is None:
        free = ray.remote(default_batch_tokens).options(**layout.options)
        batch_tokens = ray.get(
            free.remote(road.config, dtype=spec.fingerprint.dtype, device=layout.device, workers=workers_per_device)
        )
    assert batch_tokens is not None
    return road, batch_tokens


def compute_on_cluster(ray: Any, spec: WorkerSpec, layout: Layout) -> Compute:
    """Return a function that shares batches among actors; a finished batch comes first, whoever did it.

    An actor that dies, or whose node does, is reported; its batch goes back to the queue, and another actor is asked
    for, which need not find room: those that live go on.
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
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, Batch, int]] = {}
        self._idle: list[Any] = []
        self._again: deque[tuple[Batch, int]] = deque()
        self._failed = 0
        for _ in range(layout.workers):
            self._start()

    def _start(self) -> None:
        actor = self._ray.remote(GradientWorker).options(**self._layout.options).remote(self._spec)
        self._starting[actor.ready.remote()] = actor

    def share(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        since = time.monotonic()
        while True:
            while self._idle and self._give(batches):
                pass
            if self._idle and not self._busy:
                return  # nobody has anything to do
            found, _ = self._ray.wait([*self._busy, *self._starting], num_returns=1, timeout=_LOOK_SECONDS)
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
                elif (done := self._done(ref)) is not None:
                    # The next one is on its way before this one is written.
                    self._give(batches)
                    yield done

    def _give(self, batches: Iterator[Batch]) -> bool:
        """Give an idle worker the next batch; say whether there was one."""
        task = self._again.popleft() if self._again else None
        if task is None:
            fresh = next(batches, None)
            if fresh is None:
                return False
            task = fresh, 1
        actor = self._idle.pop()
        self._busy[actor.make.remote(task[0])] = (actor, *task)
        return True

    def _started(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            self._failed += 1
            if self._failed >= _STARTS:
                raise GradientError(f"{self._failed} workers died while they started: {_first(error)}") from error
            self._start()
            return
        self._failed = 0
        self._idle.append(actor)

    def _done(self, ref: Any) -> tuple[Batch, list[Result]] | None:
        actor, batch, attempt = self._busy.pop(ref)
        try:
            answer = self._ray.get(ref)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError) as error:
            self._ray.kill(actor)  # it may only be out of reach
            self._bury(batch, attempt, error)
            return None
        if isinstance(answer, BaseException):
            raise answer
        self._idle.append(actor)
        return batch, answer

    def _bury(self, batch: Batch, attempt: int, error: Exception) -> None:
        names = f"{batch[0].sample_id} to {batch[-1].sample_id}" if len(batch) > 1 else batch[0].sample_id
        if attempt >= _LIVES:
            raise GradientError(
                f"{attempt} workers died on the {len(batch)} samples {names} (the last: {_first(error)}); what was "
                "done before is kept. Run again with fewer --workers-per-device or smaller --batch-tokens"
            ) from error
        logger.warning("a worker died: its %d samples (%s) go back to the queue, and another is started",
                       len(batch), names)  # fmt: skip
        self._again.append((batch, attempt + 1))
        self._start()

    def end(self) -> None:
        """Let all actors go."""
        for actor in [*self._idle, *self._starting.values(), *(actor for actor, _, _ in self._busy.values())]:
            self._ray.kill(actor)


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
