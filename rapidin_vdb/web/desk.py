"""Where requests wait for the model: one at a time, fairly among those who ask, searches of a kind together."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rapidin_vdb.database import Database
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.explanation import STAGES
from rapidin_vdb.locks import while_waiting
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.question import Question
from rapidin_vdb.records import Sample
from rapidin_vdb.results import Ranking
from rapidin_vdb.web.lines import (
    BusyError,
    CancelledError,
    Client,
    DeskError,
    Job,
    Lines,
    stopping,
)
from rapidin_vdb.web.patience import WAITS, Patience

# Not ended with whoever waits, nor by their limit: what was read is kept, and the next find it done. A table that takes
# longer than the limit would else be begun again for each of them, and never be served.
_OPENS = "index"


class _FewerError(Exception):
    """Some of those who were to be answered together have gone."""


class Desk:
    """One thread that alone uses the model; all who ask get their turn.

    An ingest makes way for whatever has a time limit, between its batches and while it waits for another process that
    writes; what is explained from full gradients makes way between its steps for what is done in a moment.
    """

    def __init__(
        self, database: Database, *, most_waiting: int = 256, most_together: int = 32, seconds: float = 300.0,
        observe: Callable[[int, float], None] = lambda together, seconds: None,
    ) -> None:  # fmt: skip
        """Open the desk; `observe` hears of every piece of work how many requests it answered, and its seconds."""
        self._database = database
        self._most_waiting = most_waiting
        # Whoever asks from one address leaves places for others.
        self._most_of_one = max(1, most_waiting // 2)
        self._most_together = most_together
        self._seconds = seconds
        self._observe = observe
        self._lines = Lines()
        self._busy: set[Job] = set()  # what is under way; not in any line
        self._counted = 0.0  # seconds of work that were observed
        self._wake = threading.Condition()
        self._open = True
        self._stopped = float("inf")  # when it was told to stop, by the monotonic clock
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        with self._wake:
            return len(self._lines)

    @property
    def works(self) -> bool:
        """Whether requests are served."""
        return self._open and self._thread.is_alive()

    def search(self, client: Client, question: Question, query: Sample, *, progress: Progress = silent) -> Job:
        """Ask for a ranking.

        Raises:
            BusyError: too many are waiting.
        """
        deadline = time.monotonic() + self._seconds
        short = not question.exact
        return self._put(
            Job(client=client, deadline=deadline, search=(question, query), progress=progress, short=short)
        )

    def do(
        self, client: Client, work: Callable[[Progress], Any], *, progress: Progress = silent, patient: bool = False,
        short: bool = False,
    ) -> Job:  # fmt: skip
        """Ask for anything else that needs the desk; what is `patient` has no time limit, what is `short` takes none.

        Raises:
            BusyError: too many are waiting.
        """
        deadline = float("inf") if patient else time.monotonic() + self._seconds
        return self._put(Job(client=client, deadline=deadline, work=work, progress=progress, short=short))

    def give_up(self, job: Job, error: DeskError) -> None:
        """Let a job wait no longer; what is under way ends at its next step."""
        with self._wake:
            self._lines.remove(job)
        job.cancelled = True
        job.fail(error)

    def stop(self) -> None:
        """Tell all that no answer comes, at once: what is under way may take long to its next step, where it ends."""
        with self._wake:
            self._open = False
            self._stopped = min(self._stopped, time.monotonic())
            told = [*self._busy]
            while (job := self._lines.take(lambda _: True)) is not None:
                told.append(job)
            self._wake.notify_all()
        for job in told:
            job.fail(stopping())

    def close(self) -> None:
        """Stop, and wait until that is done."""
        self.stop()
        self._thread.join()

    def _put(self, job: Job) -> Job:
        with self._wake:
            waiting, own = len(self._lines), self._lines.of_address(job.client.address)
            if not self._open:
                raise stopping()
            if waiting >= self._most_waiting:
                raise BusyError(f"{waiting} requests are waiting already; try again later")
            if own >= self._most_of_one:
                raise BusyError(f"{own} requests from {job.client.address} are waiting already; try again later")
            self._lines.put(job)
            self._wake.notify()
        return job

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._open and not len(self._lines):
                    self._wake.wait()
                if not self._open:
                    return
                jobs = self._next(lambda _: True)
            self._timed(jobs)

    def _timed(self, jobs: list[Job]) -> None:
        started, before = time.monotonic(), self._counted
        with self._wake:
            self._busy.update(jobs)
        self._answer(jobs)
        with self._wake:
            self._busy.difference_update(jobs)
        seconds = time.monotonic() - started
        # What an ingest let in between was observed by itself.
        self._observe(len(jobs), seconds - (self._counted - before))
        self._counted = before + seconds

    def _next(self, fits: Callable[[Job], bool]) -> list[Job]:
        """Take the job whose turn it is, and searches of the same kind that lead other lines.

        Where each is explained by itself, many together take as long as one after another: an address gets one of them
        a turn, whatever the names that it gives itself.
        """
        first = self._lines.take(fits)
        if first is None:
            return []
        if first.search is None:
            return [first]
        jobs, question, served = [first], first.search[0], {first.client.address}

        def alike(job: Job) -> bool:
            alone = question.exact and job.client.address in served
            return job.search is not None and job.search[0] == question and not alone

        while len(jobs) < self._most_together and (job := self._lines.take(alike)) is not None:
            jobs.append(job)
            served.add(job.client.address)
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job.alive()]
        if not self._open:
            for job in jobs:
                job.fail(stopping())
        if not jobs or not self._open:
            return
        try:
            if jobs[0].search is None:
                self._work(jobs[0])
            else:
                self._search(jobs, jobs[0].search[0])
        except _FewerError:
            self._answer([job for job in jobs if not job.future.done()])
        except (RapidInError, DeskError) as error:
            if len(jobs) == 1:
                jobs[0].fail(error)
                return
            # One of them is to blame; the others must not suffer for it.
            for job in jobs:
                if not job.future.done():
                    self._answer([job])
        except BaseException as error:  # a panic of Lance is no ordinary exception, and must not end this thread either
            for job in jobs:
                job.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def _work(self, job: Job) -> None:
        assert job.work is not None

        def heard(stage: str, done: int, total: int) -> None:
            if not self._open:
                raise stopping()
            if stage == _OPENS:
                job.alive()  # where it is too late, it is told so
            else:
                job.check()
            job.progress(stage, done, total)
            self._make_way(job)

        with while_waiting(Patience(job, make_way=self._make_way, stopped=lambda: self._stopped)):
            job.succeed(job.work(heard))

    def _make_way(self, job: Job) -> bool:
        """Let others in while the model is free between an ingest's batches; say whether there were any."""
        if not job.patient or not self._open:
            return False
        with self._wake:
            others = self._next(lambda other: not other.patient)
        if others:
            self._timed(others)
        return bool(others)

    def _search(self, jobs: list[Job], question: Question) -> None:
        left = deque(jobs)

        began, given, known = time.monotonic(), 0.0, 0.0

        def heard(stage: str, done: int, total: int) -> None:
            nonlocal given
            if not self._open:
                raise stopping()
            alive = [job for job in left if job.alive()]
            if not alive and stage != _OPENS:
                raise CancelledError
            if question.exact and len(alive) < len(left) and stage != _OPENS:
                raise _FewerError  # each is explained by itself, which is not to be done for nobody
            for job in alive:
                job.progress(stage, done, total)
            # Only between steps of the explanation, for an index that is being opened cannot be searched; and half of
            # the time is its own, so that it ends however many others come.
            if question.exact and stage in STAGES and 2 * given <= time.monotonic() - began:
                given += self._let_in(alive)

        queries = [job.search[1] for job in jobs if job.search]

        def waits(keeping: bool) -> bool:
            heard(WAITS, 0, 0)
            return False

        with while_waiting(waits):
            for ranking in self._database.ask(question, queries, progress=heard):
                left.popleft().succeed(_less(ranking, given - known))
                known = given

    def _let_in(self, jobs: list[Job]) -> float:
        """Answer those who take but a moment, in place of these; return the seconds that it took."""
        with self._wake:
            others = self._next(lambda other: other.short)
        if not others:
            return 0.0
        started = time.monotonic()
        for job in jobs:
            job.hold()
        try:
            self._timed(others)
        finally:
            for job in jobs:
                job.go_on()
        return time.monotonic() - started


def _less(ranking: Ranking, seconds: float) -> Ranking:
    """Return a ranking without the seconds in which others were let into its explanation."""
    taken = ranking.seconds
    own = dataclasses.replace(taken, tokens=max(0.0, taken.tokens - seconds), total=max(0.0, taken.total - seconds))
    return dataclasses.replace(ranking, seconds=own) if seconds else ranking
