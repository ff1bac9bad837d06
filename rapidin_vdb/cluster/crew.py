"""The actors of one ingest on a cluster: who has which batch, and what becomes of it where one is lost."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rapidin_vdb.cluster.actor import GradientWorker
from rapidin_vdb.cluster.connection import first_words, lost_errors, lost_with_node, may_lack_memory
from rapidin_vdb.cluster.layout import Layout
from rapidin_vdb.compute import Batch, DeviceError, Result, Waiting, WorkerSpec, names_of
from rapidin_vdb.errors import GradientError, ModelError, SpecError
from rapidin_vdb.worker_log import Hearer

logger = logging.getLogger(__name__)

# A batch that has taken so many workers with it is not tried again; nor are more workers started in a row in vain.
_LIVES = 3
_STARTS = 5
# Nodes that are lost with a batch are not counted among these, up to so many: a batch may be the end of a node, too.
_NODES = 10
# Batches that a worker has at once: the next is there while the driver writes what came before.
_AHEAD = 2
# The cluster may be busy with other work; once much has been done, nodes that were taken back are waited for longer.
_ROOM_SECONDS, _LONGER = 600.0, 6
_LOOK_SECONDS = 5.0
# Without a batch that comes back for so long, and then for twice as long and so on, it is said who is waited for.
_SAY_SECONDS = 120.0


class Crew:
    """The actors of one ingest."""

    def __init__(self, ray: Any, spec: WorkerSpec, layout: Layout) -> None:
        """Ask for them; none need have begun."""
        self._ray, self._spec, self._layout = ray, spec, layout
        self._lost: tuple[type[Exception], ...] = (*lost_errors(ray), DeviceError)
        self._starting: dict[Any, Any] = {}
        # What each actor that runs has been given, in the order in which it does it.
        self._given: dict[Any, list[Any]] = {}
        self._busy: dict[Any, tuple[Any, Batch, int]] = {}
        # Those in the place of one whose GPU failed, most likely on the same, for as long as they have done nothing.
        self._doubted: set[Any] = set()
        self._failed = self._refused = 0
        self._worked = False
        # Those in the place of one that is lost.
        self._instead: set[Any] = set()
        self._nodes = Counter[str]()  # lost with the batch that begins with this sample; "" with none
        self._hearer = Hearer()
        for _ in range(layout.workers):
            self._start()

    def _start(self, *, doubted: bool = False, instead: bool = False) -> None:
        actor = self._ray.remote(GradientWorker).options(**self._layout.options).remote(self._spec)
        self._starting[actor.ready.remote()] = actor
        if doubted:
            self._doubted.add(actor)
        if instead:
            self._instead.add(actor)

    def share(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        """Yield batches with their results, in whatever order they come.

        Raises:
            GradientError: a batch ends whoever takes it, or no worker could begin.
            ModelError: no worker has the model.
            SpecError: the cluster had no room for any.
        """
        waiting, since = Waiting(batches), time.monotonic()
        waited, say = 0.0, _SAY_SECONDS
        while True:
            while self._give(waiting):
                pass
            if self._given and not self._busy:
                return  # nobody has anything to do
            begun = time.monotonic()
            # Of several that are ready Ray names the first: one that has started is not kept waiting by those at work.
            found, _ = self._ray.wait([*self._starting, *self._busy], num_returns=1, timeout=_LOOK_SECONDS)
            now, room = time.monotonic(), _ROOM_SECONDS * (_LONGER if self._worked else 1)
            waited += now - begun
            if not found and waited > say:
                self._say(waited)
                say *= 2
            if self._busy or found:
                since = now
            elif now - since > room:
                raise SpecError(
                    f"the cluster has had no room for a worker for {room:.0f} s; each wants "
                    f"{self._layout.cpus:g} CPUs and {self._layout.gpus:g} GPUs of a node. What was done before is kept"
                )
            for ref in found:
                if ref in self._starting:
                    self._started(ref)
                    continue
                for done in self._done(ref, waiting):
                    waited, say = 0.0, _SAY_SECONDS
                    # The next one is on its way before this one is written.
                    self._give(waiting)
                    yield done

    def _say(self, seconds: float) -> None:
        """Say that nothing has come back for long: a device or a file system may hang, which no error tells."""
        oldest = next((names_of(self._busy[given[0]][1]) for given in self._given.values() if given), None)
        logger.warning(
            "no batch has come back for %.0f s: %d workers are at work%s, and %d wait for room on the cluster",
            seconds, sum(bool(given) for given in self._given.values()),
            f" (one on the samples {oldest})" if oldest else "", len(self._starting),
        )  # fmt: skip

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
            if self._spared("", error):
                logger.warning("a node of the cluster is gone, with a worker that had not begun: another is asked for")
                self._start(doubted=actor in self._doubted, instead=actor in self._instead)
                return
            self._failed += 1
            if self._failed < _STARTS:
                self._start(doubted=actor in self._doubted, instead=actor in self._instead)
            elif self._given:
                logger.warning(
                    "%d workers died while they started: %s; the other %d go on", self._failed, first_words(error),
                    len(self._given),
                )  # fmt: skip
            elif not self._starting:
                raise GradientError(f"{self._failed} workers died while they started: {first_words(error)}") from error
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
        except ModelError as error:
            # Whoever takes the place of one that had the model may be where it is not; the next need not.
            again = actor in self._instead and self._refused < _STARTS
            if len(self._given) + len(self._starting) < 2 and not again:
                raise
            self._dismiss(actor, waiting, error, again=again)
            return []
        self._worked = True
        self._given[actor].remove(ref)
        self._doubted.discard(actor)
        return [(self._busy.pop(ref)[1], answer)]

    def _answer(self, ref: Any) -> list[Result]:
        answer, told = self._ray.get(ref)
        self._hearer.hear(told)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _dismiss(self, actor: Any, waiting: Waiting, error: ModelError, *, again: bool) -> None:
        """Let an actor go that cannot load the model, as on a node that lacks it; ask for another, or for none."""
        logger.warning("%s; %s", error, "another is asked for" if again else "the others go on without that worker")
        self._ray.kill(actor)
        for ref in self._given.pop(actor):
            _, batch, attempt = self._busy.pop(ref)
            waiting.back(batch, attempt)
        if again:
            self._refused += 1
            self._start(instead=True)

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
                if self._with_node(batch, error):
                    waiting.back(batch, attempt)
                    continue
                waiting.back(batch, attempt + 1, too_large=self._bury(actor, batch, attempt, error))
            except ModelError:
                waiting.back(batch, attempt)  # whoever comes in its place finds out
        if not (isinstance(blamed, DeviceError) and actor in self._doubted):
            self._refused = 0
            self._start(doubted=isinstance(blamed, DeviceError), instead=True)
        return done

    def _with_node(self, batch: Batch, error: Exception) -> bool:
        """Report a worker that is gone with its node, of which its batch has no part; say whether it is one."""
        if not self._spared(batch[0].sample_id, error):
            return False
        logger.warning("a node of the cluster is gone: the %d samples (%s) of its worker go back to the queue, and "
                       "another is started", len(batch), names_of(batch))  # fmt: skip
        return True

    def _spared(self, name: str, error: Exception) -> bool:
        """Say whether a worker is gone with its node, for the first few that are lost with the same batch."""
        if not lost_with_node(self._ray, error) or self._nodes[name] >= _NODES:
            return False
        self._nodes[name] += 1
        return True

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
