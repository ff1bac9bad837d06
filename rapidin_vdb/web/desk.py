"""Where requests wait for the model: one at a time, fairly among those who ask, searches of a kind together."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rapidin_vdb.database import Database
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.question import Question
from rapidin_vdb.records import Sample


class DeskError(Exception):
    """A request was not answered, for no fault of its own content."""


class BusyError(DeskError):
    """Too many are waiting."""


class LateError(DeskError):
    """Its time was over."""


class CancelledError(DeskError):
    """Whoever asked has gone."""


@dataclass(eq=False)
class Job:
    """One request, on its way."""

    client: str
    """Who asks."""
    deadline: float
    """By the monotonic clock."""
    work: Callable[[Progress], Any] | None = None
    """What to do, unless it is a search."""
    search: tuple[Question, Sample] | None = None
    """What to search for."""
    progress: Progress = silent
    """Who hears how far it is."""
    future: "Future[Any]" = field(default_factory=Future)
    """Its result."""
    cancelled: bool = False
    """Whether nobody waits for it any more."""

    def check(self) -> None:
        """Stop what nobody waits for.

        Raises:
            CancelledError: whoever asked has gone.
            LateError: its time is over.
        """
        if self.cancelled:
            raise CancelledError("the request was given up")
        if time.monotonic() > self.deadline:
            raise LateError(
                "the request took longer than is allowed; ask for less, or start the server with a longer --time-limit"
            )

    def heard(self, stage: str, done: int, total: int) -> None:
        """Pass progress on; here a job can stop."""
        self.check()
        self.progress(stage, done, total)


class Desk:
    """One thread that alone uses the model; requests of each client wait in a line of their own, served in turn."""

    def __init__(
        self, database: Database, *, most_waiting: int = 256, most_together: int = 32, seconds: float = 300.0,
        observe: Callable[[int, float], None] = lambda together, seconds: None,
    ) -> None:  # fmt: skip
        """Open the desk; `observe` hears of every piece of work how many requests it answered, and its seconds."""
        self._database = database
        self._most_waiting = most_waiting
        self._most_together = most_together
        self._seconds = seconds
        self._observe = observe
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._lines.values()))

    def search(self, client: str, question: Question, query: Sample, *, progress: Progress = silent) -> Job:
        """Ask for a ranking.

        Raises:
            BusyError: too many are waiting.
        """
        return self._put(Job(client=client, deadline=self._deadline(), search=(question, query), progress=progress))

    def do(
        self, client: str, work: Callable[[Progress], Any], *, progress: Progress = silent, patient: bool = False
    ) -> Job:
        """Ask for anything else that needs the model; what is `patient` has no time limit.

        Raises:
            BusyError: too many are waiting.
        """
        deadline = float("inf") if patient else self._deadline()
        return self._put(Job(client=client, deadline=deadline, work=work, progress=progress))

    def close(self) -> None:
        """Finish what is under way, and give up the rest."""
        with self._wake:
            self._open = False
            self._wake.notify_all()
        self._thread.join()

    def _deadline(self) -> float:
        return time.monotonic() + self._seconds

    def _put(self, job: Job) -> Job:
        with self._wake:
            if not self._open or self.waiting >= self._most_waiting:
                raise BusyError(f"{self.waiting} requests are waiting already; try again later")
            self._lines.setdefault(job.client, deque()).append(job)
            self._wake.notify()
        return job

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._open and not self._lines:
                    self._wake.wait()
                if not self._open:
                    for line in self._lines.values():
                        for job in line:
                            job.future.set_exception(BusyError("the server is stopping"))
                    return
                jobs = self._next()
            started = time.monotonic()
            self._answer(jobs)
            self._observe(len(jobs), time.monotonic() - started)

    def _next(self) -> list[Job]:
        """Take the first job of the client whose turn it is, and searches of the same kind that lead other lines."""
        client, line = self._lines.popitem(last=False)
        jobs = [line.popleft()]
        if line:
            self._lines[client] = line  # at the end: the others come first
        if jobs[0].search is None:
            return jobs
        question = jobs[0].search[0]
        found = True
        while found and len(jobs) < self._most_together:
            found = False
            for name, other in list(self._lines.items()):
                if len(jobs) < self._most_together and other[0].search is not None and other[0].search[0] == question:
                    jobs.append(other.popleft())
                    found = True
                    if not other:
                        del self._lines[name]
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        ready = []
        for job in jobs:
            try:
                job.check()
                ready.append(job)
            except DeskError as error:
                job.future.set_exception(error)
        if not ready:
            return
        try:
            results = self._results(ready)
        except (RapidInError, DeskError) as error:
            if len(ready) == 1:
                ready[0].future.set_exception(error)
                return
            # One of them is to blame; the others must not suffer for it.
            for job in ready:
                self._answer([job])
            return
        except Exception as error:
            for job in ready:
                job.future.set_exception(error)
            return
        for job, result in zip(ready, results, strict=True):
            job.future.set_result(result)

    def _results(self, jobs: list[Job]) -> list[Any]:
        first = jobs[0]
        if first.search is None:
            assert first.work is not None
            return [first.work(first.heard)]

        def heard(stage: str, done: int, total: int) -> None:
            gone = [job for job in jobs if job.cancelled]
            if len(gone) == len(jobs):
                raise CancelledError("nobody waits for this any more")
            for job in jobs:
                if len(jobs) == 1:
                    job.heard(stage, done, total)
                elif not job.cancelled:
                    job.progress(stage, done, total)

        return list(self._database.ask(first.search[0], [job.search[1] for job in jobs if job.search], progress=heard))
